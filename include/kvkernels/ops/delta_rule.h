#pragma once
#include "kvkernels/delta.h"

namespace kk {

struct DeltaRuleParams {
  DeltaInputs in;
  void* o;             // [B, T, HV, V] contiguous, dtype of q; null with q
  float* final_state;  // [N, HV, K, V] contiguous, or null
  // The state after every `checkpoint_every` tokens of a sequence (a multiple of chunk), or null. State j of a sequence is
  // number delta_slots(...).whole + j of [delta_whole_slots, HV, K, V]; numbers that no sequence has are zeros.
  float* checkpoints;
  int64_t checkpoint_every;
  bool recurrent;   // token by token: the arithmetic of delta_rule_step
  void* workspace;  // delta_rule_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t delta_rule_workspace(const DeltaRuleParams& p, const CpuExec& exec);
void delta_rule(const DeltaRuleParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t delta_rule_workspace(const DeltaRuleParams& p, const CudaExec& exec);
void delta_rule(const DeltaRuleParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
