// Products of small fp32 matrices in shared memory, by one warp and mma.m16n8k8 with tf32 operands and fp32 sums.
//
// A matrix is anything that gives element (i, j) when called: Rows, Columns or a lambda that scales on the way. No lane
// meets a bank twice where the leading dimension is 4 (mod 8) of a left operand by rows and a right one by columns, and
// 8 or 24 (mod 32) of a left operand by columns and a right one by rows.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace kk::cuda {

// How operands become tf32 numbers of 10 mantissa bits.
enum class Operands {
  tf32,    // they are tf32 numbers already (operand<...>() rounded them when they were stored), or are truncated
  tf32x3,  // two terms each: big big + big small + small big, near fp32
  bf16x3,  // two terms of 7 mantissa bits each
  fp32,    // fused multiply-adds instead of the matrix instruction
};

// What is stored in shared memory of a number that will be an operand.
template <Operands O>
__device__ __forceinline__ float operand(float x) {
  return O == Operands::tf32 ? ptx::tf32(x) : x;
}

template <Operands O>
__device__ __forceinline__ void store8_operands(float* to, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 v = make_float4(operand<O>(x[i]), operand<O>(x[i + 1]), operand<O>(x[i + 2]), operand<O>(x[i + 3]));
    *reinterpret_cast<float4*>(to + i) = v;
  }
}

struct Rows {  // element (i, j) is p[i * ld + j]
  const float* p;
  int ld;
  __device__ __forceinline__ float operator()(int i, int j) const { return p[i * ld + j]; }
};
struct Columns {  // element (i, j) is p[j * ld + i]: the transpose of Rows
  const float* p;
  int ld;
  __device__ __forceinline__ float operator()(int i, int j) const { return p[j * ld + i]; }
};

// x becomes the big term of two; the small one is returned through `small`.
template <Operands O, int N>
__device__ __forceinline__ void split(float (&x)[N], float (&small)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (O == Operands::bf16x3) {
      const float big = __bfloat162float(__float2bfloat16_rn(x[i]));
      small[i] = __bfloat162float(__float2bfloat16_rn(x[i] - big));
      x[i] = big;
    } else {
      const float big = __uint_as_float(__float_as_uint(ptx::tf32(x[i])) & ~0x1fffu);
      small[i] = ptx::tf32(x[i] - big);
      x[i] = big;
    }
  }
}

// f(row, column, x, y) for every two neighbours in a row of c that this lane holds.
template <int M, int N, typename F>
__device__ __forceinline__ void each_pair(float (&c)[M][N][4], F f) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) f(16 * m + g + 4 * i, 8 * n + 2 * t, c[m][n][i], c[m][n][i + 1]);
}
// f(row, column, x) for every element of c that this lane holds.
template <int M, int N, typename F>
__device__ __forceinline__ void each(float (&c)[M][N][4], F f) {
  each_pair(c, [&](int i, int j, float& x, float& y) {
    f(i, j, x);
    f(i, j + 1, y);
  });
}

// c [16 M][8 N] += a [16 M][k] b [k][8 N], k a multiple of 8. Lane 4g + t holds rows g, g + 8 and columns 2t, 2t + 1 of
// each 16 x 8 tile (each() names them). All lanes of the warp call it.
template <Operands O, int M, int N, typename A, typename B>
__device__ __forceinline__ void multiply_add(float (&c)[M][N][4], const A& a, const B& b, int k) {
  if constexpr (O == Operands::fp32) {
    each(c, [&](int i, int j, float& x) {
      for (int l = 0; l < k; ++l) x = fmaf(a(i, l), b(l, j), x);
    });
  } else {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int l = 0; l < k; l += 8) {
      float left[M][4], right[N][2];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m][i] = a(16 * m + g + 8 * (i % 2), l + t + 4 * (i / 2));
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) right[n][i] = b(l + t + 4 * i, 8 * n + g);
      if constexpr (O == Operands::tf32) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < N; ++n) ptx::mma_m16n8k8_tf32(c[m][n], left[m], right[n], c[m][n]);
      } else {
        float small_right[N][2];
#pragma unroll
        for (int n = 0; n < N; ++n) split<O>(right[n], small_right[n]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float small_left[4];
          split<O>(left[m], small_left);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            ptx::mma_m16n8k8_tf32(c[m][n], small_left, right[n], c[m][n]);
            ptx::mma_m16n8k8_tf32(c[m][n], left[m], small_right[n], c[m][n]);
            ptx::mma_m16n8k8_tf32(c[m][n], left[m], right[n], c[m][n]);
          }
        }
      }
    }
  }
}

}  // namespace kk::cuda
