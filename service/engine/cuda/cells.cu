// One step of a recurrent layer in one launch:  gates = [x, h] · [W, R]ᵀ + b, then the cell, for B sessions with h and c
// in the arena rows `slots`.  LSTM, PARTS, VEC and the tile are set by cells.py.
//
// The product runs on the tensor cores (m16n8k16): 16 gate rows are operand A, 8 sessions operand B.  A number enters as
// two halves, v = high + low with 11 bits each, and low·high + high·low + high·high is summed in fp32: fp32's accuracy, at
// several times the speed of the fp32 units.  The weights are split when packed, so they take 4 bytes as before; with
// PARTS = 1 only the high halves are kept and multiplied: tf32's accuracy, from half the bytes.  Half's narrow range is
// met by powers of two: one for the weights, a fixed one for h, which lies in [-1, 1], and for x one per session and chunk.
//
// The depth I + H is cut into chunks of 32, the chunks into SLICES slices.  Tensor cores truncate as they accumulate, so a
// chunk starts from zero and joins its slice by an fp32 addition; the slices are added last, in order.  That order is the
// same for every tile: a session's bits depend neither on its neighbours nor on the tile.
//
// A block owns BU hidden units (all their gates) and BN sessions, a warp WG unit groups and NT x 8 sessions of them.  With
// SPLIT the slices are spread over a cluster of blocks, which add up through one another's shared memory; that fills the
// chip when the batch is small.  Without it one block takes the slices in turn.

#if LSTM  // MMA tiles of a group of 8 units: rows (i, o), rows (f, c)
constexpr int GROUP = 8, GROUP_TILES = 2, GROUP_SUMS = 2;
#else     // z, r and n of 16 units; n is summed apart over x and over h, for r scales only the latter
constexpr int GROUP = 16, GROUP_TILES = 3, GROUP_SUMS = 4;
#endif
constexpr int CHUNK = 32, SLICES = 4, RANKS = SPLIT ? SLICES : 1, GATES = 4, THREADS = 32 * WM * WN;
constexpr int TILES = WG * GROUP_TILES, SUMS = WG * GROUP_SUMS, BU = WM * WG * GROUP, BN = WN * NT * 8;
constexpr int PITCH = CHUNK + 4;                                   // floats per session in shared memory: no bank conflicts
constexpr int FRAGMENTS = GROUP_TILES * (CHUNK / 16) * PARTS * 32;  // uint4 of packed weights per group and chunk
constexpr int STAGE = WM * WG * FRAGMENTS + BN * PITCH / 4;         // uint4 of the copy ring per chunk
constexpr int EACH = (BN * BU + RANKS * THREADS - 1) / (RANKS * THREADS);  // cells per thread
constexpr float STATE_SCALE = 256;
#define EVERY(i, count) _Pragma("unroll") for (int i = 0; i < (count); i++)

template <int BYTES>  // asynchronous copy to shared memory; zeros where there is nothing to read
__device__ void copy(void* to, const void* from, bool inside = true) {
  const unsigned at = __cvta_generic_to_shared(to), size = inside ? BYTES : 0;
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(size));
}

// The high and the low halves of two numbers.
__device__ void split(float v, float w, unsigned& high, unsigned& low) {
  float v_high, w_high;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(w), "f"(v));
  asm("{.reg .b16 v, w; mov.b32 {v, w}, %2; cvt.f32.f16 %0, v; cvt.f32.f16 %1, w;}" : "=f"(v_high), "=f"(w_high) : "r"(high));
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(w - w_high), "f"(v - v_high));
}

__device__ void mma(float (&d)[4], const uint4& a, const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
}

// The power of two that brings a session's largest x of a chunk (8 in each of 4 lanes) to half's upper range.
__device__ float headroom(const float* session) {
  float most = 0;
  EVERY(i, 8) most = fmaxf(most, fabsf(session[i]));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
  return __int_as_float((127 + 127 + 13 - max(__float_as_int(most) >> 23, 16)) << 23);
}

__device__ float inverse(float power) { return __int_as_float((254 << 23) - __float_as_int(power)); }

// part += one chunk.  Lane 4g + t holds depths 8t .. 8t+7 of rows g and g + 8 (weights) and of session g, and MMA step s
// takes 8t + 4s .. 8t + 4s + 3: an order of the depth that lets both operands be read 16 bytes at a time.
__device__ void multiply(float (&part)[TILES][NT][4], const uint4* weights, const float* sessions, const float (&scale)[NT]) {
  EVERY(s, 2) {
    uint4 a[PARTS][TILES];
    unsigned b[2][NT][2];
    EVERY(m, TILES)
      EVERY(p, PARTS) a[p][m] = weights[((m * 2 + s) * PARTS + p) * 32];
    EVERY(n, NT) {
      const float4 v = *(const float4*)(sessions + n * 8 * PITCH + s * 4);
      split(v.x * scale[n], v.y * scale[n], b[0][n][0], b[1][n][0]);
      split(v.z * scale[n], v.w * scale[n], b[0][n][1], b[1][n][1]);
    }
#pragma unroll
    for (int product = PARTS == 2 ? 0 : 2; product < 3; product++)  // low·high, high·low, high·high
      EVERY(m, TILES)
        EVERY(n, NT) mma(part[m][n], a[product == 0][m], b[product == 1][n]);
  }
}

// Where a block keeps the sum of one gate, session and unit (sessions swapped in places, against bank conflicts).
__device__ int place(int gate, int session, int unit) {
  return ((gate * (BU / 8) + unit / 8) * BN + (session ^ (session >> 2 & 1))) * 8 + unit % 8;
}

__device__ void barrier() {  // of the cluster, or of a single block
  if (SPLIT) asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  else __syncthreads();
}

__device__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
step(const float* x,          // (B, I)
     const float* arena,      // (slots, S): this layer's h at h_offset, its c at c_offset
     const long long* slots,  // (B)
     float* state_out,        // (B, S): this layer's part is written
     float* y,                // (B, H): h again, packed for the next layer
     const uint4* weights,    // (unit groups, chunks, GROUP_TILES, 2, PARTS, 32): in the order the lanes read them
     const float* bias,       // (4, H): i o f c, or z r and n over x, n over h
     float unscale,           // takes back the weights' power of two
     int bounded,             // x is the h of another layer, else numbers of any size
     int B, int I, int H, int S, int h_offset, int c_offset) {
  extern __shared__ uint4 ring[];
  __shared__ const float* source[2][BN];  // of the sessions: x and h
  const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 % WN, wm = threadIdx.x / 32 / WN;
  const int rank = blockIdx.x % RANKS, column = blockIdx.x / RANKS, first = blockIdx.y * BN;
  const int x_chunks = (I + CHUNK - 1) / CHUNK, chunks = x_chunks + (H + CHUNK - 1) / CHUNK;
  const int slice = (chunks + SLICES - 1) / SLICES, begin = rank * slice, end = SPLIT ? min(begin + slice, chunks) : chunks;

  auto fetch_weights = [&](int chunk, uint4* stage) {
    if (chunk >= end) return;
    constexpr int STRIDE = WN * 32;
    const int mine = wn * 32 + lane;
    EVERY(u, WG) {
      const uint4* from = weights + ((size_t)((column * WM + wm) * WG + u) * chunks + chunk) * FRAGMENTS + mine;
      uint4* to = stage + (wm * WG + u) * FRAGMENTS + mine;
      EVERY(r, (FRAGMENTS + STRIDE - 1) / STRIDE)
        if (FRAGMENTS % STRIDE == 0 || r * STRIDE + mine < FRAGMENTS) copy<16>(to + r * STRIDE, from + r * STRIDE);
    }
  };
  auto fetch_sessions = [&](int chunk, uint4* stage) {
    if (chunk >= end) return;
    constexpr int LANES = CHUNK / VEC, STRIDE = THREADS / LANES, ROUNDS = (BN + STRIDE - 1) / STRIDE;
    const bool of_h = chunk >= x_chunks;
    const int at = threadIdx.x % LANES * VEC, mine = threadIdx.x / LANES;
    const int depth = at + CHUNK * (of_h ? chunk - x_chunks : chunk);
    float* to = (float*)(stage + WM * WG * FRAGMENTS) + mine * PITCH + at;
    const float* from[ROUNDS];
    EVERY(r, ROUNDS) from[r] = source[of_h][min(r * STRIDE + mine, BN - 1)];
    EVERY(r, ROUNDS)
      if (BN % STRIDE == 0 || r * STRIDE + mine < BN)
        copy<4 * VEC>(to + r * STRIDE * PITCH, from[r] + depth, depth < (of_h ? H : I));
  };

  // Weights depend on no earlier kernel: under a programmatic launch they arrive while the one before finishes.
  asm volatile("griddepcontrol.launch_dependents;");
  for (int s = 0; s < STAGES - 1; s++) fetch_weights(begin + s, ring + s * STAGE);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int n = threadIdx.x; n < BN; n += THREADS) {
    const int row = min(first + n, B - 1);  // past the batch: repeat its last row, without writing results
    source[0][n] = x + (size_t)row * I;
    source[1][n] = arena + slots[row] * S + h_offset;
  }
  __syncthreads();
  for (int s = 0; s < STAGES - 1; s++) {
    fetch_sessions(begin + s, ring + s * STAGE);
    asm volatile("cp.async.commit_group;");
  }

  float* total = (float*)(ring + (SPLIT ? 0 : STAGES * STAGE));  // gate sums of this block; the ring is drained by then
  float sum[SUMS][NT][4] = {};
  auto store = [&](bool add) {
    EVERY(m, SUMS)
      EVERY(n, NT)
        EVERY(i, 4) {  // accumulator i of lane 4g + t: row g + 8 (i / 2), session 2t + i % 2
          const int gate = LSTM ? m % 2 * 2 + i / 2 : m % 4;
          const int unit = (wm * WG + m / GROUP_SUMS) * GROUP + lane / 4 + (LSTM ? 0 : i / 2 * 8);
          float& to = total[place(gate, (wn * NT + n) * 8 + lane % 4 * 2 + i % 2, unit)];
          to = add ? to + sum[m][n][i] : sum[m][n][i];
          sum[m][n][i] = 0;
        }
  };

  for (int chunk = begin, slot = 0; chunk < end; chunk++, slot = slot + 1 == STAGES ? 0 : slot + 1) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    uint4 *stage = ring + slot * STAGE, *drained = ring + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE;
    fetch_weights(chunk + STAGES - 1, drained);
    fetch_sessions(chunk + STAGES - 1, drained);
    asm volatile("cp.async.commit_group;");
    const bool of_h = chunk >= x_chunks;
    const float* sessions = (float*)(stage + WM * WG * FRAGMENTS) + (wn * NT * 8 + lane / 4) * PITCH + lane % 4 * 8;
    float part[TILES][NT][4] = {}, scale[NT], back[NT][2];
    EVERY(n, NT) scale[n] = STATE_SCALE, back[n][0] = back[n][1] = unscale / STATE_SCALE;
    if (!of_h && !bounded)
      EVERY(n, NT) {
        scale[n] = headroom(sessions + n * 8 * PITCH);
        for (int i = 0; i < 2; i++) back[n][i] = unscale * inverse(__shfl_sync(~0u, scale[n], lane % 4 * 8 + i * 4));
      }
    multiply(part, stage + wm * WG * FRAGMENTS + lane, sessions, scale);
    EVERY(m, TILES)
      EVERY(n, NT)
        EVERY(i, 4) {
          float* to = &sum[m / GROUP_TILES * GROUP_SUMS + m % GROUP_TILES][n][i];
          if (!LSTM && m % 3 == 2 && of_h) to += NT * 4;  // GRU's n over h: the sum after
          *to = fmaf(part[m][n][i], back[n][i % 2], *to);
        }
    if (!SPLIT && (chunk + 1 == end || (chunk + 1) % slice == 0)) store(chunk >= slice);
  }
  __syncthreads();
  if (SPLIT) store(false);

  auto index = [&](int e) { return (e * RANKS + rank) * THREADS + (int)threadIdx.x; };  // of a thread's cells
  float old[EACH];                                                                      // LSTM: c; GRU: h
  EVERY(e, EACH)
    old[e] = source[1][min(index(e) / BU, BN - 1)][min(column * BU + index(e) % BU, H - 1) + (LSTM ? c_offset - h_offset : 0)];
  barrier();
  const float* totals[RANKS] = {total};  // of the cluster's blocks, in order
  if (SPLIT)
    for (int r = 0; r < RANKS; r++) asm("mapa.u64 %0, %1, %2;" : "=l"(totals[r]) : "l"(total), "r"(r));
  EVERY(e, EACH) {
    const int n = min(index(e) / BU, BN - 1), u = index(e) % BU, unit = column * BU + u;
    const size_t row = first + n;
    float gate[GATES];
    for (int g = 0; g < GATES; g++) {
      const int at = place(g, n, u);
      gate[g] = totals[0][at];
      for (int r = 1; r < RANKS; r++) gate[g] += totals[r][at];
      gate[g] += __ldg(bias + g * H + min(unit, H - 1));
    }
    const bool mine = index(e) < BN * BU && row < B && unit < H;
#if LSTM
    const float c = fmaf(sigmoid(gate[2]), old[e], sigmoid(gate[0]) * tanhf(gate[3]));
    const float h = sigmoid(gate[1]) * tanhf(c);
    if (mine) state_out[row * S + c_offset + unit] = c;
#else
    const float candidate = tanhf(fmaf(sigmoid(gate[1]), gate[3], gate[2]));
    const float h = fmaf(sigmoid(gate[0]), old[e] - candidate, candidate);
#endif
    if (mine) state_out[row * S + h_offset + unit] = h, y[row * H + unit] = h;
  }
  if (SPLIT) barrier();  // no block leaves while another reads its sums
}
