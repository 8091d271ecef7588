#pragma once
#include "kvkernels/delta.h"

namespace kk {

// Gates from what a model's projections give, in fp32, x = g + dt_bias (of the head, or of the head and channel):
//   lower_bound = 0:  g' = -exp(A_log) softplus(x)         softplus(x) = x above 20
//   lower_bound < 0:  g' = lower_bound * sigmoid(exp(A_log) x)
struct DeltaGate {
  const float* A_log;    // [HV]; null: g is the gate itself
  const float* dt_bias;  // [HV], or [HV, K] with vector_gate; null: 0
  float lower_bound;
};

// Decode: T tokens of each of B sequences, one after the other, on states that lie in a pool and are changed in place.
// in.N = B, in.cu_seqlens, in.initial_state and in.chunk are not used, in.q is given. A state is rounded to the pool's dtype
// after every token, so that T tokens in one call give the bits of T calls.
struct DeltaRuleStepParams {
  DeltaInputs in;
  DeltaGate gate;
  void* state;        // [num_slots, HV, K, V], slots state_stride elements apart, otherwise contiguous
  DType state_dtype;  // f32 bf16
  int64_t num_slots, state_stride;
  const int32_t*
      slots;  // [B] where a sequence's state is read; -1: a padding row, o = 0 and nothing is read or written
  // Where states are written; -1: nowhere. [B]: after the last token (`slots` itself is the default). [B, T], out_tokens:
  // after each token, so that a rejected one is undone by reading an earlier slot next time. Several sequences may read one
  // slot that none of them writes.
  const int32_t* out_slots;
  bool out_tokens;
  // [B, T] or null; only with out_tokens. Token t goes on from the state after token parents[b, t] < t, from the initial one
  // where that is -1. A parent other than t - 1 must have been written: its state is read back from its slot.
  const int32_t* parents;
  void* o;  // [B, T, HV, V] contiguous, dtype of q
};

namespace cpu {
void delta_rule_step(const DeltaRuleStepParams& p, const CpuExec& exec);
}
namespace cuda {
void delta_rule_step(const DeltaRuleStepParams& p, const CudaExec& exec);
}

}  // namespace kk
