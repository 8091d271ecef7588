// What the kernels of the delta rule's backward pass share. A chunk has 64 tokens here, whatever the forward pass had.
#pragma once
#include "cuda/delta_intra.cuh"
#include "cuda/delta_mma.cuh"
#include "kvkernels/ops/delta_rule_backward.h"

namespace kk::cuda {

constexpr int kBackwardChunk = 64;

// Per begun chunk (its slot) and value head, in fp32; dk and dq: per key head.
struct BackwardWorkspace {
  DeltaIntra intra;
  float* n;        // [C][V] N
  float* dr;       // [C][V] gradient of R
  float* states;   // [K][V] before the chunk
  float* dstates;  // [K][V] gradient of the state after the chunk
  float *dq, *dk;  // [C][K] of q and k after their norms
};

struct BackwardArgs {
  DeltaRuleBackwardParams p;  // in.chunk = 64
  BackwardWorkspace w;

  __device__ __forceinline__ int64_t rows_at(int64_t slot, int64_t hv) const {
    return (slot * p.in.HV + hv) * kBackwardChunk * p.in.V;
  }
  __device__ __forceinline__ int64_t state_at(int64_t slot, int64_t hv) const {
    return (slot * p.in.HV + hv) * p.in.K * p.in.V;
  }
  __device__ __forceinline__ int64_t keys_at(int64_t slot, int64_t h) const {
    return (slot * p.in.H + h) * kBackwardChunk * p.in.K;
  }
};

// A chunk's rows on their way into shared memory, [64][ld]: `Slice` channels from c0 on, zeros where there are none. All
// threads call the functions together, each has the same elements in all of them.
template <int Slice>
struct ChunkSlice {
  const DeltaInputs& p;
  const DeltaChunk& chunk;
  const float* factors;  // [kDeltaFactors][64]
  int64_t hv;
  int c0;

  __device__ __forceinline__ float factor(DeltaFactor f, int i) const { return factors[f * kBackwardChunk + i]; }

  // f(i, channel within the slice, 8 numbers)
  template <typename F>
  __device__ __forceinline__ void each8(F f) const {
    for (int u = threadIdx.x; u < kBackwardChunk * (Slice / 8); u += kDeltaThreads) {
      const int i = u / (Slice / 8), c = u % (Slice / 8) * 8;
      float x[8] = {};
      f(i, c, x);
    }
  }
  __device__ __forceinline__ void read(const DeltaRows& rows, int64_t head, int i, int c, float (&x)[8]) const {
    if (i < chunk.rows) read8(row_of(rows, chunk.b, chunk.first + i, head), c0 + c, static_cast<int>(p.K), x);
  }

  // k, q and e, row i times factor(i).
  template <Operands O, typename Factor>
  __device__ __forceinline__ void keys(float* to, int ld, Factor factor_of) const {
    each8([&](int i, int c, float (&x)[8]) {
      read(p.k, hv / (p.HV / p.H), i, c, x);
      const float f = factor(kKeyNorm, i) * factor_of(i);
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] *= f;
      store8_operands<O>(to + i * ld + c, x);
    });
  }
  template <Operands O, typename Factor>
  __device__ __forceinline__ void queries(float* to, int ld, Factor factor_of) const {
    each8([&](int i, int c, float (&x)[8]) {
      if (p.q.p) read(p.q, hv / (p.HV / p.H), i, c, x);
      const float f = factor(kQueryNorm, i) * factor_of(i);
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] *= f;
      store8_operands<O>(to + i * ld + c, x);
    });
  }
  template <Operands O, typename Factor>
  __device__ __forceinline__ void erased(float* to, int ld, Factor factor_of) const {
    each8([&](int i, int c, float (&x)[8]) {
      read(p.k, hv / (p.HV / p.H), i, c, x);
      const float f = factor(kBeta, i) * factor(kKeyNorm, i) * factor_of(i);
      float e[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) e[n] = 1.0f;
      if (p.erase.p) read(p.erase, hv, i, c, e);
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] *= f * e[n];
      store8_operands<O>(to + i * ld + c, x);
    });
  }
  // Gates of channels, 1 where there are none.
  __device__ __forceinline__ void alphas(float* to, int ld) const {
    each8([&](int i, int c, float (&x)[8]) {
      read(p.g, hv, i, c, x);
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] = expf(x[n]);
      store8_operands<Operands::fp32>(to + i * ld + c, x);
    });
  }
};

// Products of a channel's gates outside the 8 rows that a thread has: thread 32 b + c has rows 8 b ... 8 b + 7 of channel c.
struct ChannelDecay {
  float before, after, total;  // of the rows before and after the thread's, and of all 64
};
// alpha: the thread's channel, rows `ld` apart. `totals`: [8][32] of shared memory. All threads call it.
__device__ __forceinline__ ChannelDecay channel_decay(const float* alpha, int ld, float* totals) {
  const int c = threadIdx.x % 32, block = threadIdx.x / 32;
  float run = 1.0f;
#pragma unroll
  for (int r = 0; r < 8; ++r) run *= alpha[(8 * block + r) * ld];
  totals[threadIdx.x] = run;
  __syncthreads();
  ChannelDecay d{1.0f, 1.0f, 1.0f};
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const float x = totals[32 * b + c];
    d.total *= x;
    if (b < block) d.before *= x;
    if (b > block) d.after *= x;
  }
  return d;
}

// Columns v0 ... v0 + 31 of fp32 rows [rows][V] of the workspace, as operands; zeros past the last row and column.
template <Operands O, int Rows = kBackwardChunk>
__device__ __forceinline__ void load_columns(const float* from, int rows, int v0, int V, float* to, int ld) {
  for (int u = threadIdx.x; u < Rows * 4; u += kDeltaThreads) {
    const int i = u / 4, c = u % 4 * 8;
    float x[8] = {};
    if (i < rows) read8({from + static_cast<int64_t>(i) * V, DType::f32}, v0 + c, V, x);
    store8_operands<O>(to + i * ld + c, x);
  }
}
// The same of d_out, which may be none.
template <Operands O>
__device__ __forceinline__ void load_d_out(const DeltaRows& d_out, const DeltaChunk& chunk, int64_t hv, int v0, int V,
                                           float* to, int ld) {
  for (int u = threadIdx.x; u < kBackwardChunk * 4; u += kDeltaThreads) {
    const int i = u / 4, c = u % 4 * 8;
    float x[8] = {};
    if (d_out.p && i < chunk.rows) read8(row_of(d_out, chunk.b, chunk.first + i, hv), v0 + c, V, x);
    store8_operands<O>(to + i * ld + c, x);
  }
}

}  // namespace kk::cuda
