// merge_states: schema, checks.
#include "kvkernels/ops/merge_states.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bind/check.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

void same_shape(const Check& c, const View& v, const char* rule, const int64_t* size, int64_t dim) {
  if (v.dim == dim && std::equal(size, size + dim, v.size)) return;
  c.refuse(v.name, " must be ", rule, " = ", shape_text(size, dim), ", got ", shape_text(v.size, v.dim));
}

void merge_states(const Tensor& outs, const Tensor& lses, const Tensor& out, const Tensor& lse) {
  Check c("merge_states");
  View a = c.any("outs", outs, kFloats);
  if (a.dim < 2) c.refuse("outs must be [S, ..., D], got ", shape_text(a.size, a.dim));
  View l = c.any("lses", lses, kF32);
  same_shape(c, l, "outs.shape[:-1]", a.size, a.dim - 1);
  const View o = c.any("out", out, kFloats), e = c.any("lse", lse, kF32);
  same_shape(c, o, "outs.shape[1:]", a.size + 1, a.dim - 1);
  same_shape(c, e, "lses.shape[1:]", l.size + 1, l.dim - 1);
  c.same_dtype(o, a);
  for (const View* written : {&o, &e}) {
    c.contiguous(*written);
    c.writable(*written);
  }

  MergeStatesParams p{};
  p.S = a.size[0];
  p.D = a.size[a.dim - 1];
  p.N = 1;
  for (int64_t i = 1; i < a.dim - 1; ++i) p.N *= a.size[i];
  if (p.N == 0 || p.D == 0) return;

  Tensor outs_copy = outs, lses_copy = lses;
  if (!a.contiguous()) outs_copy = torch::stable::contiguous(outs), a = c.any("outs", outs_copy, kFloats);
  if (!l.contiguous()) lses_copy = torch::stable::contiguous(lses), l = c.any("lses", lses_copy, kF32);
  p.outs = a.data();
  p.lses = l.data<float>();
  p.out = o.mutable_data();
  p.lse = e.mutable_data<float>();
  p.dtype = dtype_of(a);
  on_device(c, [&](const auto& exec) { backend::merge_states(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def("merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
}
KK_REGISTER(merge_states)
