// What the chunks of a sequence need that does not depend on the state, for all chunks at once: T = (I + L)^-1, P and the
// factors of the rows (delta.h). The forward pass and the backward pass both start with it.
#pragma once
#include "cuda/delta_rows.cuh"

namespace kk::cuda {

constexpr int kDeltaThreads = 256;

// Tokens [first, first + rows) of batch row b. rows = 0: a slot that no sequence has.
struct DeltaChunk {
  int64_t b, first;
  int rows;
};
// The chunk whose slot this is (DeltaSlots::begun).
__device__ __forceinline__ DeltaChunk chunk_of(const DeltaInputs& p, int64_t slot) {
  int64_t n, in_sequence;
  if (p.cu_seqlens) {
    int64_t low = 0, high = p.N;  // the last sequence whose first slot is not after this one
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (p.cu_seqlens[mid] / p.chunk + mid <= slot ? low : high) = mid;
    }
    n = low, in_sequence = slot - (p.cu_seqlens[n] / p.chunk + n);
  } else {
    const int64_t chunks = (p.T + p.chunk - 1) / p.chunk;
    n = slot / chunks, in_sequence = slot % chunks;
  }
  const DeltaSequence s = sequence_of(p, n);
  const int64_t first = s.begin + in_sequence * p.chunk;
  return {s.b, first, static_cast<int>(max(int64_t{0}, min(p.chunk, s.end - first)))};
}

// What is kept of a chunk and a value head, in fp32: T [C][C], P [C][C] (if there is a q), L [C][C] (if asked for), then
// C each of
enum DeltaFactor {
  kBeta,       // after its rule; 0 past the last row
  kKeyNorm,    // what a row of k is multiplied by, 1 without l2norm
  kQueryNorm,  // and of q
  kAlpha,      // exp(g) with one gate per head, else 1
  kFromStart,  // a_i, the product of alphas up to row i, itself included
  kToEnd,      // D_Ci, the product of those after row i
  kDeltaFactors
};
struct DeltaIntra {
  float* p;
  int64_t C, HV;
  bool has_q, has_l;

  KK_HD int64_t squares() const { return 1 + has_q + has_l; }
  KK_HD int64_t size() const { return C * C * squares() + C * kDeltaFactors; }
  __device__ __forceinline__ float* inverse(int64_t slot, int64_t hv) const { return p + (slot * HV + hv) * size(); }
  __device__ __forceinline__ float* scores(int64_t slot, int64_t hv) const { return inverse(slot, hv) + C * C; }
  __device__ __forceinline__ float* lower(int64_t slot, int64_t hv) const {
    return inverse(slot, hv) + C * C * (has_q ? 2 : 1);
  }
  __device__ __forceinline__ float* factors(int64_t slot, int64_t hv) const {
    return inverse(slot, hv) + C * C * squares();
  }
};
inline DeltaIntra delta_intra_at(const DeltaInputs& p, void* workspace, bool keep_l) {
  return {static_cast<float*>(workspace), p.chunk, p.HV, p.q.p != nullptr, keep_l};
}
inline int64_t delta_intra_bytes(const DeltaInputs& p, bool keep_l = false) {
  const int64_t floats = delta_intra_at(p, nullptr, keep_l).size();
  return delta_begun_slots(p, p.chunk) * p.HV * floats * static_cast<int64_t>(sizeof(float));
}

// Fills `workspace`, delta_intra_bytes(p, keep_l) of it.
DeltaIntra delta_intra(const DeltaInputs& p, void* workspace, const CudaExec& exec, bool keep_l = false);

}  // namespace kk::cuda
