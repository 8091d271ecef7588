// What the kernels of the delta rule's backward pass share. A chunk has 64 tokens here, whatever the forward pass had.
#pragma once
#include "cuda/delta_intra.cuh"
#include "cuda/delta_mma.cuh"
#include "kvkernels/ops/delta_rule_backward.h"

namespace kk::cuda {

constexpr int kBackwardChunk = 64;

// Per begun chunk (its slot) and value head, in fp32; "dk", "dq": per key head, before the norm's part.
struct BackwardWorkspace {
  DeltaIntra intra;
  float* n;        // [C][V] N
  float* dr;       // [C][V] gradient of R
  float* states;   // [K][V] before the chunk
  float* dstates;  // [K][V] gradient of the state after the chunk
  float *dq, *dk;  // [C][K]
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

// One channel of 16 rows of a chunk, by one thread; zeros past the last row and the last channel, gates 1.
struct ChannelRows {
  const DeltaInputs& p;
  const DeltaChunk& chunk;
  const float* factors;  // [kDeltaFactors][64]
  int64_t hv;
  int channel, first_row;

  __device__ __forceinline__ bool exists(int r) const { return first_row + r < chunk.rows && channel < p.K; }
  __device__ __forceinline__ float factor(DeltaFactor f, int r) const {
    return factors[f * kBackwardChunk + first_row + r];
  }
  __device__ __forceinline__ float read(const DeltaRows& rows, int64_t head, int r) const {
    return row_of(rows, chunk.b, chunk.first + first_row + r, head)[channel];
  }
  __device__ __forceinline__ float k(int r) const {
    return exists(r) ? read(p.k, hv / (p.HV / p.H), r) * factor(kKeyNorm, r) : 0.0f;
  }
  __device__ __forceinline__ float q(int r) const {
    return p.q.p && exists(r) ? read(p.q, hv / (p.HV / p.H), r) * factor(kQueryNorm, r) : 0.0f;
  }
  __device__ __forceinline__ float erase(int r) const { return p.erase.p && exists(r) ? read(p.erase, hv, r) : 1.0f; }
  __device__ __forceinline__ float alpha(int r) const {
    if (!p.g.p || !exists(r)) return 1.0f;
    return p.vector_gate ? expf(read(p.g, hv, r)) : factor(kAlpha, r);
  }
};

// Products of the gates of a channel: a row's own are the thread's business.
struct ChannelDecay {
  float before, after, total;  // of the blocks of 16 rows before, after, and of all four
};
// All threads call it: thread 64 b + c has block b of channel c. `totals`: [4][64] of shared memory.
__device__ __forceinline__ ChannelDecay channel_decay(const ChannelRows& rows, float* totals) {
  const int c = threadIdx.x % 64, block = threadIdx.x / 64;
  float run = 1.0f;
#pragma unroll
  for (int r = 0; r < 16; ++r) run *= rows.alpha(r);
  totals[threadIdx.x] = run;
  __syncthreads();
  ChannelDecay d{1.0f, 1.0f, 1.0f};
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const float x = totals[64 * b + c];
    d.total *= x;
    if (b < block) d.before *= x;
    if (b > block) d.after *= x;
  }
  return d;
}

// Columns v0 ... v0 + 31 of fp32 rows [64][V] of the workspace, as operands; zeros past the last row and column.
template <Operands O>
__device__ __forceinline__ void load_columns(const float* from, int rows, int v0, int V, float* to, int ld) {
  for (int i = threadIdx.x; i < kBackwardChunk * 32; i += kDeltaThreads) {
    const int r = i / 32, c = i % 32;
    to[r * ld + c] = r < rows && v0 + c < V ? operand<O>(from[static_cast<int64_t>(r) * V + v0 + c]) : 0.0f;
  }
}
// The same of d_out, which may be none.
template <Operands O>
__device__ __forceinline__ void load_d_out(const DeltaRows& d_out, const DeltaChunk& chunk, int64_t hv, int v0, int V,
                                           float* to, int ld) {
  for (int i = threadIdx.x; i < kBackwardChunk * 32; i += kDeltaThreads) {
    const int r = i / 32, c = i % 32;
    const bool exists = d_out.p && r < chunk.rows && v0 + c < V;
    to[r * ld + c] = exists ? operand<O>(row_of(d_out, chunk.b, chunk.first + r, hv)[v0 + c]) : 0.0f;
  }
}

}  // namespace kk::cuda
