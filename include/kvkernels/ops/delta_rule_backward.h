#pragma once
#include "kvkernels/delta.h"

namespace kk {

// Gradients of delta_rule. Nothing but the inputs and some states is kept from the forward pass; the rest is computed again.
// in.q may be null (states only): then so are d_out and dq.
struct DeltaRuleBackwardParams {
  DeltaInputs in;
  const float* checkpoints;  // as delta_rule wrote them, or null: then from initial_state
  int64_t checkpoint_every;
  DeltaRows d_out;       // [B, T, HV, V]; null: zeros
  const float* d_final;  // [N, HV, K, V] contiguous, or null: zeros
  // Contiguous. dq, dk, dv have the dtype of in.q, in.k, in.v; the others are fp32. Null where not wanted.
  void* dq;         // [B, T, H, K] summed over the value heads of a key head
  void* dk;         // [B, T, H, K]
  void* dv;         // [B, T, HV, V]
  float* dbeta;     // [B, T, HV] of beta as it was given
  float* dg;        // [B, T, HV] or [B, T, HV, K]
  float* derase;    // [B, T, HV, K]
  float* dwrite;    // [B, T, HV, V]
  float* dinitial;  // [N, HV, K, V]
  void* workspace;  // delta_rule_backward_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& p, const CpuExec& exec);
void delta_rule_backward(const DeltaRuleBackwardParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& p, const CudaExec& exec);
void delta_rule_backward(const DeltaRuleBackwardParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
