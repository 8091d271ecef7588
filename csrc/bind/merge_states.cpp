// merge_states: schema, checks.
#include "kvkernels/ops/merge_states.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <vector>

#include "bind/check.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

void same_shape(const Check& c, const View& v, const char* rule, const int64_t* size, int64_t dim) {
  if (v.dim == dim && std::equal(size, size + dim, v.size)) return;
  c.refuse(v.name, " must be ", rule, " = ", shape_text(size, dim), ", got ", shape_text(v.size, v.dim));
}

// What the tensors of a list are called: "outs[0]", ...
using Names = std::array<std::string, kMaxMergeParts>;
Names numbered(const char* list) {
  Names names;
  for (size_t i = 0; i < names.size(); ++i) names[i] = list + ("[" + std::to_string(i) + "]");
  return names;
}

// `copy` keeps what had to be copied.
View contiguous(Check& c, const char* name, const Tensor& t, unsigned dtypes, std::vector<Tensor>& copies) {
  const View v = c.any(name, t, dtypes);
  if (v.contiguous()) return v;
  copies.push_back(torch::stable::contiguous(t));
  return c.any(name, copies.back(), dtypes);
}

void merge_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& temperature, const Tensor& out_arg, const Tensor& lse_arg) {
  Check c("merge_states");
  const size_t parts = outs.size();
  if (parts < 1 || lses.size() != parts) c.refuse("outs has ", parts, " tensors and lses ", lses.size());
  if (parts > kMaxMergeParts) c.refuse("outs has ", parts, " tensors, but at most ", kMaxMergeParts, " go uncopied");
  MergeStatesParams p{};
  std::vector<Tensor> copies;
  copies.reserve(2 * parts);
  static const Names out_names = numbered("outs"), lse_names = numbered("lses");
  View a, l;
  const bool stacked = outs[0].dim() > out_arg.dim();
  for (size_t s = 0; s < parts; ++s) {
    const View x = contiguous(c, stacked ? "outs" : out_names[s].c_str(), outs[s], kFloats, copies);
    if (s == 0) a = x;
    same_shape(c, x, "outs[0].shape", a.size, a.dim);
    c.same_dtype(x, a);
    if (x.dim < 1 + stacked) c.refuse("outs must be [S, ..., D], got ", shape_text(x.size, x.dim));
    l = contiguous(c, stacked ? "lses" : lse_names[s].c_str(), lses[s], kF32, copies);
    same_shape(c, l, "outs.shape[:-1]", a.size, a.dim - 1);
    p.outs[s] = x.data();
    p.lses[s] = l.data<float>();
  }
  p.num_parts = stacked ? 0 : static_cast<int>(parts);
  p.S = stacked ? a.size[0] : p.num_parts;
  p.D = a.size[a.dim - 1];
  p.N = 1;
  for (int64_t i = stacked; i < a.dim - 1; ++i) p.N *= a.size[i];
  c.bind("S", p.S, stacked ? "outs.size(0)" : "the length of outs");
  if (scale) p.scale = c.is("scale", *scale, kF32, "S").data<float>();
  if (temperature) p.temperature = c.is("temperature", *temperature, kF32, "S").data<float>();

  const View o = c.any("out", out_arg, kFloats), e = c.any("lse", lse_arg, kF32);
  same_shape(c, o, "outs.shape[1:]", a.size + stacked, a.dim - stacked);
  same_shape(c, e, "lses.shape[1:]", l.size + stacked, l.dim - stacked);
  c.same_dtype(o, a);
  for (const View* written : {&o, &e}) {
    c.contiguous(*written);
    c.writable(*written);
  }
  if (p.N == 0 || p.D == 0) return;
  p.out = o.mutable_data();
  p.lse = e.mutable_data<float>();
  p.dtype = dtype_of(a);
  on_device(c, [&](const auto& exec) { backend::merge_states(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "merge_states(Tensor[] outs, Tensor[] lses, Tensor? scale, Tensor? temperature, Tensor(a!) out, Tensor(b!) lse) "
      "-> ()");
}
KK_REGISTER(merge_states)
