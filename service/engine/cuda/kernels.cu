// Gathers and commits the rows around a step of the model, in the same graph as the step. One block per row.
//
// `host` is host memory that the device accesses directly: at most some hundred kilobytes, each byte once. Copies would
// take as long and add two nodes. A row of the arena is `width` floats.

typedef long long i64;

// Copy bytes with all blocks together, 16 bytes at a time.
__device__ void copy_block(uint4* to, const uint4* from, i64 bytes) {
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < bytes / 16; i += gridDim.x * (i64)blockDim.x)
    to[i] = from[i];
}

// call = host, which includes the inputs of this step; if there is a `state`, state[row] = arena[sources[row]]. In the
// first step of a batch, no row has failed yet.
extern "C" __global__ void gather(const float* arena, i64 width, const i64* sources, float* state, int* failed,
                                  const i64* first, uint4* call, const uint4* host, i64 bytes) {
  copy_block(call, host, bytes);
  if (threadIdx.x == 0 && *first) failed[blockIdx.x] = 0;
  if (!state) return;
  const float* from = arena + sources[blockIdx.x] * width;
  for (i64 i = threadIdx.x; i < width; i += blockDim.x) state[blockIdx.x * width + i] = from[i];
}

// arena[targets[row]] = state[row], unless the row has failed: its new state or an output is not finite. Rows without a
// target (-1) are skipped. checked: `tensors` pairs (first byte of a float output, floats per row). host = outputs, and
// host_failed = failed.
extern "C" __global__ void commit(float* arena, i64 width, const i64* targets, const float* state, int* failed,
                                  int* host_failed, const char* outputs, const i64* checked, i64 tensors, uint4* host,
                                  i64 bytes) {
  const i64 target = targets[blockIdx.x];
  int bad = failed[blockIdx.x];
  if (target >= 0) {
    for (i64 i = threadIdx.x; i < width; i += blockDim.x) bad |= !isfinite(state[blockIdx.x * width + i]);
    for (i64 t = 0; t < tensors; ++t) {
      const float* values = (const float*)(outputs + checked[2 * t]) + blockIdx.x * checked[2 * t + 1];
      for (i64 i = threadIdx.x; i < checked[2 * t + 1]; i += blockDim.x) bad |= !isfinite(values[i]);
    }
    bad = __syncthreads_or(bad);
    for (i64 i = threadIdx.x; i < width && !bad; i += blockDim.x)
      arena[target * width + i] = state[blockIdx.x * width + i];
  }
  if (threadIdx.x == 0) host_failed[blockIdx.x] = failed[blockIdx.x] = bad;
  copy_block(host, (const uint4*)outputs, bytes);
}
