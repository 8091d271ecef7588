// (I + L)^-1 in shared memory, by one block of threads: substitution within 16 x 16 blocks on the diagonal, which are then
// merged pairwise:
//   | A 0 |^-1   |  A^-1           0   |
//   | L B |    = | -B^-1 L A^-1   B^-1 |
#pragma once
#include "cuda/delta_mma.cuh"

namespace kk::cuda {

// Floats of the scratch that the merges of n x n take, n >= 32.
constexpr int tril_scratch(int n) { return n / 2 * (n / 2 + 4); }

// x [n][ld] holds L below the diagonal; n is 16 times a power of two. The inverse takes its place: zeros above the
// diagonal of each 16 x 16 block; what lies above the blocks is not touched. Ends with a barrier.
template <Operands O>
__device__ __forceinline__ void invert_unit_lower(float* x, int ld, float* scratch, int n) {
  const int block = threadIdx.x / 16, column = threadIdx.x % 16;
  float* diagonal = x + 16 * block * (ld + 1);
  float v[16];
  if (16 * block < n) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int m = 0; m < i; ++m) sum = fmaf(-diagonal[i * ld + m], v[m], sum);
      v[i] = sum;
    }
  }
  __syncthreads();
  if (16 * block < n) {
#pragma unroll
    for (int i = 0; i < 16; ++i) diagonal[i * ld + column] = v[i];
  }
  __syncthreads();

  const auto rows = [](const float* p, int stride) {
    return [p, stride](int i, int j) { return operand<O>(p[i * stride + j]); };
  };
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int s = 16; s < n; s *= 2) {  // of two s x s blocks on the diagonal one of 2 s
    const int per_row = s / 16, per_pair = per_row * per_row, tiles = n / (2 * s) * per_pair, ld_scratch = s + 4;
    for (int tile = warp; tile < tiles; tile += warps) {  // scratch = L A^-1
      const int pair = tile / per_pair, i = tile % per_pair / per_row * 16, j = tile % per_row * 16;
      const float* a = x + 2 * s * pair * (ld + 1);
      float c[1][2][4] = {};
      multiply_add<O>(c, rows(a + (s + i) * ld + j, ld), rows(a + j * ld + j, ld), s - j);
      each(c, [&](int r, int q, float value) { scratch[(pair * s + i + r) * ld_scratch + j + q] = value; });
    }
    __syncthreads();
    for (int tile = warp; tile < tiles; tile += warps) {
      const int pair = tile / per_pair, i = tile % per_pair / per_row * 16, j = tile % per_row * 16;
      float* b = x + 2 * s * pair * (ld + 1) + s * ld;
      float c[1][2][4] = {};
      multiply_add<O>(c, rows(b + s + i * ld, ld), rows(scratch + pair * s * ld_scratch + j, ld_scratch), i + 16);
      each(c, [&](int r, int q, float value) { b[(i + r) * ld + j + q] = -value; });
    }
    __syncthreads();
  }
}

}  // namespace kk::cuda
