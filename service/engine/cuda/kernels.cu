// What happens to the rows around a call of the model, in the same graph as the call. One block a row.
//
// `call` is the batch's block of host memory, which the device reads and writes directly: at most a few hundred
// kilobytes, each byte once, for which a copy of its own would cost more than it saves. A row is `width` floats.

typedef long long i64;

// Bytes copied by all blocks together, 16 at a time.
__device__ void copy_block(uint4* to, const uint4* from, i64 bytes) {
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < bytes / 16; i += gridDim.x * (i64)blockDim.x)
    to[i] = from[i];
}

// inputs = the call's inputs; state[row] = arena[sources[row]].
extern "C" __global__ void gather(const float* arena, i64 width, const i64* sources, float* state, uint4* inputs,
                                  const uint4* call_inputs, i64 input_bytes) {
  copy_block(inputs, call_inputs, input_bytes);
  const float* from = arena + sources[blockIdx.x] * width;
  for (i64 i = threadIdx.x; i < width; i += blockDim.x) state[blockIdx.x * width + i] = from[i];
}

// arena[targets[row]] = state[row], unless the new state or one of the row's outputs is not finite: then failed[row].
// checked: `tensors` pairs (first byte of a float output, floats in a row of it).
extern "C" __global__ void commit(float* arena, i64 width, const i64* targets, const float* state, int* failed,
                                  const char* outputs, const i64* checked, i64 tensors, uint4* call_outputs,
                                  i64 output_bytes) {
  int bad = 0;
  for (i64 i = threadIdx.x; i < width; i += blockDim.x) bad |= !isfinite(state[blockIdx.x * width + i]);
  for (i64 t = 0; t < tensors; ++t) {
    const float* values = (const float*)(outputs + checked[2 * t]) + blockIdx.x * checked[2 * t + 1];
    for (i64 i = threadIdx.x; i < checked[2 * t + 1]; i += blockDim.x) bad |= !isfinite(values[i]);
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) failed[blockIdx.x] = bad;
  if (!bad) {
    float* to = arena + targets[blockIdx.x] * width;
    for (i64 i = threadIdx.x; i < width; i += blockDim.x) to[i] = state[blockIdx.x * width + i];
  }
  copy_block(call_outputs, (const uint4*)outputs, output_bytes);
}
