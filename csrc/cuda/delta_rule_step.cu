#include "kvkernels/ops/delta_rule_step.h"

#include "cuda/delta_token.cuh"

namespace kk::cuda {
namespace {

// States in a pool.
struct PoolStates {
  void* state;
  int64_t num_slots, stride;
  const int32_t *slots, *out_slots, *parents;
  bool out_tokens;

  // -1, and what bind refuses where it can look: padding, or a state that is not written.
  __device__ bool in_pool(int64_t slot) const { return slot >= 0 && slot < num_slots; }

  __device__ void* at(const DeltaTokenArgs& a, int64_t slot, int64_t hv) const {
    const int64_t i = slot * stride + hv * a.in.K * a.in.V;
    return static_cast<uint8_t*>(state) + i * (a.state_dtype == DType::f32 ? 4 : 2);
  }
  __device__ DeltaSequence sequence(const DeltaTokenArgs& a, int64_t n) const { return {n, 0, a.in.T}; }
  __device__ bool exists(const DeltaTokenArgs&, int64_t n) const { return in_pool(slots[n]); }
  __device__ const void* initial(const DeltaTokenArgs& a, int64_t n, int64_t hv) const { return at(a, slots[n], hv); }

  // The state before token t, where it is not the one that the thread has. It wrote what it reads here.
  __device__ const void* parent(const DeltaTokenArgs& a, int64_t n, int64_t hv, int64_t t) const {
    if (!parents || t == 0) return nullptr;
    const int32_t parent = parents[n * a.in.T + t];
    if (parent >= t - 1) return nullptr;
    const int32_t slot = parent < 0 ? slots[n] : out_slots[n * a.in.T + parent];
    return in_pool(slot) ? at(a, slot, hv) : nullptr;
  }
  template <typename State>
  __device__ void after_token(const DeltaTokenArgs& a, int64_t n, int64_t hv, const DeltaSequence&, int64_t t,
                              const State& state, int column) const {
    if (!out_tokens) return;
    const int32_t slot = out_slots[n * a.in.T + t];
    if (in_pool(slot)) state.write(a, at(a, slot, hv), column);
  }
  template <typename State>
  __device__ void after_last(const DeltaTokenArgs& a, int64_t n, int64_t hv, const DeltaSequence&, const State& state,
                             int column) const {
    if (!out_tokens && in_pool(out_slots[n])) state.write(a, at(a, out_slots[n], hv), column);
  }
  template <typename State>
  __device__ void without_tokens(const DeltaTokenArgs&, const DeltaSequence&, int64_t, const State&, int) const {}
};

}  // namespace

void delta_rule_step(const DeltaRuleStepParams& p, const CudaExec& exec) {
  DeltaTokenArgs a{p.in, p.gate, p.o, p.state_dtype};
  const int64_t size = p.state_dtype == DType::f32 ? 4 : 2;
  a.vector = p.in.V % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % (4 * size) == 0 && p.state_stride % 4 == 0;
  const PoolStates states{p.state, p.num_slots, p.state_stride, p.slots, p.out_slots, p.parents, p.out_tokens};
  launch_delta_tokens("delta_rule_step", a, states, p.in.B, exec);
}

}  // namespace kk::cuda
