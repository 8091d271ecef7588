#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Merge partial attention results: lse = ln sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s.
// A state with lse = -inf weighs nothing, whatever its out holds (NaN included); if all do, out = 0 and lse = -inf.
struct MergeStatesParams {
  const void* outs;   // [S, N, D] contiguous, dtype
  const float* lses;  // [S, N] contiguous, natural log
  void* out;          // [N, D] contiguous, dtype
  float* lse;         // [N]
  int64_t S, N, D;
  DType dtype;  // f32 f16 bf16
};

namespace cpu {
void merge_states(const MergeStatesParams& p, const CpuExec& exec);
}
namespace cuda {
void merge_states(const MergeStatesParams& p, const CudaExec& exec);
}

}  // namespace kk
