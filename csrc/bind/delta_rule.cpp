// delta_rule: schema, checks, outputs.
#include "kvkernels/ops/delta_rule.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/delta.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor> delta_rule(const std::optional<Tensor>& q, const Tensor& k, const Tensor& v,
                                              const std::optional<Tensor>& beta, const std::optional<Tensor>& g,
                                              const std::optional<Tensor>& erase, const std::optional<Tensor>& write,
                                              const std::optional<Tensor>& initial_state,
                                              const std::optional<Tensor>& cu_seqlens, double scale, bool l2norm,
                                              int64_t beta_rule, std::optional<int64_t> chunk_size,
                                              int64_t checkpoint_every, bool want_final, bool recurrent) {
  Check c("delta_rule");
  DeltaRuleParams p{};
  p.in = check_delta(c, {q, k, v, beta, g, erase, write}, true, scale, l2norm, beta_rule);
  check_sequences(c, p.in, initial_state, cu_seqlens, chunk_size, checkpoint_every);
  p.checkpoint_every = checkpoint_every;
  p.recurrent = recurrent;

  const DeltaInputs& in = p.in;
  Tensor o = q ? new_like(c, "o", view("v", v)) : no_tensor(c);
  const int64_t final_size[] = {in.N, in.HV, in.K, in.V};
  Tensor final_state = want_final ? new_f32(c, "final_state", final_size, 4) : no_tensor(c);
  Tensor checkpoints = no_tensor(c);
  if (checkpoint_every > 0) {
    const int64_t size[] = {in.B, in.T / checkpoint_every, in.HV, in.K, in.V};
    const int64_t one_row = cu_seqlens ? 1 : 0;
    checkpoints = new_f32(c, "checkpoints", size + one_row, 5 - one_row);
  }
  if (in.B == 0) return {o, final_state, checkpoints};
  if (q) p.o = o.mutable_data_ptr();
  if (want_final) p.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  if (checkpoint_every > 0) p.checkpoints = static_cast<float*>(checkpoints.mutable_data_ptr());
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::delta_rule_workspace(p, exec));
    p.workspace = workspace.data();
    backend::delta_rule(p, exec);
  });
  return {o, final_state, checkpoints};
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "delta_rule(Tensor? q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? erase, Tensor? write, "
      "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool qk_l2norm, int beta_rule, int? chunk_size, "
      "SymInt checkpoint_every, bool want_final, bool recurrent) -> (Tensor o, Tensor final_state, Tensor "
      "checkpoints)");
}
KK_REGISTER(delta_rule)
