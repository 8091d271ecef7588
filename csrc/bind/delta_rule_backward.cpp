// delta_rule_backward: schema, checks, outputs.
#include "kvkernels/ops/delta_rule_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/delta.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bit i of `wanted` asks for gradient i of the order in which they are returned.
Gradients delta_rule_backward(const std::optional<Tensor>& q, const Tensor& k, const Tensor& v,
                              const std::optional<Tensor>& beta, const std::optional<Tensor>& g,
                              const std::optional<Tensor>& erase, const std::optional<Tensor>& write,
                              const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
                              const std::optional<Tensor>& checkpoints, const std::optional<Tensor>& d_out,
                              const std::optional<Tensor>& d_final, double scale, bool l2norm, int64_t beta_rule,
                              std::optional<int64_t> chunk_size, int64_t checkpoint_every, int64_t wanted) {
  Check c("delta_rule_backward");
  DeltaRuleBackwardParams p{};
  p.in = check_delta(c, {q, k, v, beta, g, erase, write}, true, scale, l2norm, beta_rule);
  check_sequences(c, p.in, initial_state, cu_seqlens, chunk_size, checkpoint_every);
  const DeltaInputs& in = p.in;
  if (checkpoints) {
    c.bind("T/every", checkpoint_every > 0 ? in.T / checkpoint_every : 0, "k.size(1) / checkpoint_every");
    const char* const shape = cu_seqlens ? "T/every HV K V" : "B T/every HV K V";
    const View states = c.is("checkpoints", *checkpoints, kF32, shape);
    c.contiguous(states);
    p.checkpoints = states.data<float>();
    p.checkpoint_every = checkpoint_every;
  }
  if (d_out && !q) c.refuse("d_out was given, but q was not");
  p.d_out = delta_rows(c.is("d_out", d_out, kFloats, "B T HV V"), true);
  if (d_final) {
    const View d = c.is("d_final", *d_final, kF32, "N HV K V");
    c.contiguous(d);
    p.d_final = d.data<float>();
  }

  Tensor made[8];
  const auto want = [&](int i, const char* name, const std::optional<Tensor>& of, bool same_dtype) -> void* {
    if (!(wanted >> i & 1)) {
      made[i] = no_tensor(c);
      return nullptr;
    }
    if (!of) c.refuse(name, " is wanted, but there is no such input");
    const View like = view(name, *of);
    made[i] = same_dtype ? new_like(c, name, like) : new_f32(c, name, like.size, like.dim);
    return made[i].mutable_data_ptr();
  };
  p.dq = want(0, "dq", q, true);
  p.dk = want(1, "dk", k, true);
  p.dv = want(2, "dv", v, true);
  p.dbeta = static_cast<float*>(want(3, "dbeta", beta, false));
  p.dg = static_cast<float*>(want(4, "dg", g, false));
  p.derase = static_cast<float*>(want(5, "derase", erase, false));
  p.dwrite = static_cast<float*>(want(6, "dwrite", write, false));
  p.dinitial = static_cast<float*>(want(7, "dinitial", initial_state, false));
  if (in.B > 0)
    on_device(c, [&](const auto& exec) {
      const Workspace workspace(c, backend::delta_rule_backward_workspace(p, exec));
      p.workspace = workspace.data();
      backend::delta_rule_backward(p, exec);
    });
  return {made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7]};
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "delta_rule_backward(Tensor? q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? erase, Tensor? write, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor? checkpoints, Tensor? d_out, Tensor? d_final, float scale, "
      "bool qk_l2norm, int beta_rule, int? chunk_size, SymInt checkpoint_every, int wanted) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dg, Tensor derase, Tensor dwrite, Tensor dinitial)");
}
KK_REGISTER(delta_rule_backward)
