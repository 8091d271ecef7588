// delta_rule_step: schema, checks.
#include "kvkernels/ops/delta_rule_step.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "bind/delta.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

// "slots[2]", "out_slots[2, 0]"
std::string at(const char* name, int64_t b, int64_t t) {
  return std::string(name) + "[" + std::to_string(b) + (t < 0 ? "" : ", " + std::to_string(t)) + "]";
}

struct Use {
  int64_t slot, b, t;  // t: -1 unless there is one
  const char* name;
  bool writes;
};

// A slot that one sequence writes must not be another's.
void check_slots(const Check& c, const DeltaRuleStepParams& p, bool own_slots) {
  const auto range = [&](const Use& use) {
    if (use.slot < -1 || use.slot >= p.num_slots)
      c.refuse(at(use.name, use.b, use.t), " = ", use.slot, ", but slots are 0 to ", p.num_slots - 1, ", or -1");
  };
  std::vector<Use> uses;
  const int64_t T = p.in.T, outs = p.out_tokens ? T : 1;
  uses.reserve(static_cast<size_t>(p.in.B * (1 + outs)));
  for (int64_t b = 0; b < p.in.B; ++b) {
    uses.push_back({p.slots[b], b, -1, "slots", own_slots});
    range(uses.back());
    if (own_slots) continue;
    for (int64_t t = 0; t < outs; ++t) {
      uses.push_back({p.out_slots[b * outs + t], b, p.out_tokens ? t : -1, "out_slots", true});
      range(uses.back());
      if (p.slots[b] < 0) uses.pop_back();  // a padding row writes nothing
    }
  }
  std::sort(uses.begin(), uses.end(), [](const Use& x, const Use& y) {
    return x.slot != y.slot ? x.slot < y.slot : x.writes != y.writes ? x.writes : x.b < y.b;
  });
  for (size_t i = 1, first = 0; i < uses.size(); ++i) {
    if (uses[i].slot != uses[first].slot) first = i;  // a writer, if the slot has one
    const Use &x = uses[first], &y = uses[i];
    if (x.slot >= 0 && x.slot == y.slot && x.b != y.b && x.writes)
      c.refuse(at(x.name, x.b, x.t), " and ", at(y.name, y.b, y.t), " are both slot ", x.slot,
               ", but a slot that is written belongs to one sequence");
  }
}

// A token that goes on from another than the one before it reads that state back: it must be there still.
void check_parents(const Check& c, const DeltaRuleStepParams& p) {
  const int64_t T = p.in.T;
  for (int64_t b = 0; b < p.in.B; ++b) {
    if (p.slots[b] < 0) continue;
    const int32_t *const parent = p.parents + b * T, *const out = p.out_slots + b * T;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t from = parent[t];
      if (from < -1 || from >= t) c.refuse(at("parents", b, t), " = ", from, ", but it must be -1 to ", t - 1);
      if (from == t - 1) continue;
      const int32_t slot = from < 0 ? p.slots[b] : out[from];
      if (slot < 0) c.refuse(at("parents", b, t), " = ", from, ", but the state after that token was not kept");
      for (int64_t other = from + 1; other < t; ++other)
        if (out[other] == slot)
          c.refuse(at("parents", b, t), " = ", from, ", but ", at("out_slots", b, other), " has replaced that state");
    }
  }
}

void delta_rule_step(const Tensor& q_arg, const Tensor& k_arg, const Tensor& v_arg, const std::optional<Tensor>& beta,
                     const std::optional<Tensor>& g, const std::optional<Tensor>& erase,
                     const std::optional<Tensor>& write, const Tensor& state_arg, const Tensor& slots_arg,
                     const std::optional<Tensor>& out_slots_arg, const std::optional<Tensor>& parents_arg,
                     const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias, double lower_bound,
                     double scale, bool l2norm, int64_t beta_rule, const Tensor& out_arg) {
  Check c("delta_rule_step");
  const int64_t dim = q_arg.dim();
  if (dim != 3 && dim != 4) {
    const View q = view("q", q_arg);
    c.refuse("q must be [B, H, K] or [B, T, H, K], got ", shape_text(q.size, q.dim));
  }
  const bool several = dim == 4;
  DeltaRuleStepParams p{};
  p.in = check_delta(c, {q_arg, k_arg, v_arg, beta, g, erase, write}, several, scale, l2norm, beta_rule);
  if (!several) c.bind("T", 1, "q being [B, H, K]");

  const View state = c.is("state", state_arg, kF32 | kBF16, "num_slots HV K V");
  if (state.size[0] > 0) {  // of a slot
    View slot = state;
    ++slot.size, ++slot.stride, --slot.dim;
    if (!slot.contiguous())
      c.refuse("state must be contiguous within a slot, got strides ", shape_text(state.stride, state.dim));
  }
  c.writable(state);
  p.state_dtype = dtype_of(state);
  p.num_slots = state.size[0];
  p.state_stride = state.stride[0];

  const View slots = c.is("slots", slots_arg, kI32, "B");
  p.slots = p.out_slots = slots.data<int32_t>();
  if (out_slots_arg) {
    p.out_tokens = out_slots_arg->dim() == 2;
    const View out_slots = c.is("out_slots", *out_slots_arg, kI32, p.out_tokens ? "B T" : "B");
    c.contiguous(out_slots);
    p.out_slots = out_slots.data<int32_t>();
  }
  if (parents_arg) {
    const View parents = c.is("parents", *parents_arg, kI32, "B T");
    c.contiguous(parents);
    if (!p.out_tokens) c.refuse("parents needs out_slots [B, T], where the state after each token goes");
    p.parents = parents.data<int32_t>();
  }

  if (A_log) {
    if (!g) c.refuse("gate was given, but g, which it makes a gate of, was not");
    const View a = c.is("gate A_log", *A_log, kF32, "HV");
    p.gate.A_log = a.data<float>();
    if (dt_bias) {
      const View bias = c.is("gate dt_bias", *dt_bias, kF32, p.in.vector_gate ? "HV K" : "HV");
      c.contiguous(bias);
      p.gate.dt_bias = bias.data<float>();
    }
    if (!(lower_bound <= 0)) c.refuse("gate lower_bound must be negative, or 0 for none; got ", lower_bound);
    p.gate.lower_bound = static_cast<float>(lower_bound);
  }

  const View o = c.is("out", out_arg, kFloats, several ? "B T HV V" : "B HV V");
  c.same_dtype(o, view("q", q_arg));
  c.contiguous(o);
  c.writable(o);
  if (p.in.B == 0 || p.in.T == 0) return;
  if (c.on_cpu()) {
    check_slots(c, p, !out_slots_arg);
    if (p.parents) check_parents(c, p);
  }
  p.state = state.mutable_data();
  p.o = o.mutable_data();
  on_device(c, [&](const auto& exec) { backend::delta_rule_step(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? erase, Tensor? write, "
      "Tensor(a!) state, Tensor slots, Tensor? out_slots, Tensor? parents, Tensor? A_log, Tensor? dt_bias, "
      "float lower_bound, float scale, bool qk_l2norm, int beta_rule, Tensor(b!) out) -> ()");
}
KK_REGISTER(delta_rule_step)
