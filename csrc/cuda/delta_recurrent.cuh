// delta_rule token by token, for mode="recurrent".
#pragma once
#include "cuda/delta_token.cuh"
#include "kvkernels/ops/delta_rule.h"

namespace kk::cuda {
namespace {

// With cu_seqlens, sequence N is the tokens that belong to none.
struct SequenceStates {
  float *final_state, *checkpoints;
  int64_t every;

  __device__ int64_t size(const DeltaTokenArgs& a) const { return a.in.K * a.in.V; }
  __device__ DeltaSequence sequence(const DeltaTokenArgs& a, int64_t n) const {
    if (n == a.in.N) return {0, a.in.cu_seqlens[n], a.in.T};
    return sequence_of(a.in, n);
  }
  __device__ bool exists(const DeltaTokenArgs& a, int64_t n) const { return n < a.in.N; }
  __device__ const void* initial(const DeltaTokenArgs& a, int64_t n, int64_t hv) const {
    return a.in.initial_state ? a.in.initial_state + (n * a.in.HV + hv) * size(a) : nullptr;
  }
  __device__ const void* parent(const DeltaTokenArgs&, int64_t, int64_t, int64_t) const { return nullptr; }

  template <typename State>
  __device__ void after_token(const DeltaTokenArgs& a, int64_t n, int64_t hv, const DeltaSequence& own, int64_t t,
                              const State& state, int column) const {
    const int64_t done = t + 1 - own.begin;
    if (!checkpoints || done % every != 0) return;
    const int64_t slot = delta_slots(a.in, n, own.begin, every).whole + done / every - 1;
    state.write(a, checkpoints + (slot * a.in.HV + hv) * size(a), column);
  }
  template <typename State>
  __device__ void after_last(const DeltaTokenArgs& a, int64_t n, int64_t hv, const DeltaSequence& own, State& state,
                             int column) const {
    if (final_state) state.write(a, final_state + (n * a.in.HV + hv) * size(a), column);
    if (checkpoints && a.in.cu_seqlens)
      clear(a, own.begin / every + (own.end - own.begin) / every, own.end / every, hv, state, column);
  }
  template <typename State>
  __device__ void without_tokens(const DeltaTokenArgs& a, const DeltaSequence& own, int64_t hv, State& state,
                                 int column) const {
    if (checkpoints) clear(a, own.begin / every, own.end / every, hv, state, column);
  }

  // Checkpoints that no sequence has.
  template <typename State>
  __device__ void clear(const DeltaTokenArgs& a, int64_t from, int64_t to, int64_t hv, State& state, int column) const {
    state.clear();
    for (int64_t slot = from; slot < to; ++slot) state.write(a, checkpoints + (slot * a.in.HV + hv) * size(a), column);
  }
};

void delta_rule_recurrent(const DeltaRuleParams& p, const CudaExec& exec) {
  DeltaTokenArgs a{p.in, {}, p.in.q.p ? p.o : nullptr, DType::f32};
  a.vector = p.in.V % 4 == 0;
  for (const void* states : {static_cast<const void*>(p.in.initial_state), static_cast<const void*>(p.final_state),
                             static_cast<const void*>(p.checkpoints)})
    a.vector &= reinterpret_cast<uintptr_t>(states) % 16 == 0;
  const SequenceStates states{p.final_state, p.checkpoints, p.checkpoint_every};
  launch_delta_tokens("delta_rule", a, states, p.in.N + (p.in.cu_seqlens ? 1 : 0), exec);
}

}  // namespace
}  // namespace kk::cuda
