#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

constexpr int kMaxMergeParts = 16;

// Merge partial attention results: lse = ln sum_s exp(f_s lse_s), out = sum_s exp(f_s lse_s - lse) out_s with
// f_s = scale_s * temperature_s. A state with lse_s = -inf weighs nothing, whatever its out, scale and temperature are (NaN
// included); if all do, out = 0 and lse = -inf.
struct MergeStatesParams {
  // One array of all states, or, if num_parts = S > 0, one for each.
  const void* outs[kMaxMergeParts];   // [S, N, D] or [N, D] contiguous, dtype
  const float* lses[kMaxMergeParts];  // [S, N] or [N] contiguous, natural log
  int num_parts;
  const float* scale;        // [S] or null: 1
  const float* temperature;  // [S] or null: 1
  void* out;                 // [N, D] contiguous, dtype
  float* lse;                // [N]
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
