// tril_inverse: schema, checks, output.
#include "kvkernels/ops/tril_inverse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bind/delta.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

Tensor tril_inverse(const Tensor& input, int64_t method) {
  Check c("tril_inverse");
  View a = c.any("A", input, kFloats, LastDim::strided);
  if (a.dim < 2 || a.size[a.dim - 1] != a.size[a.dim - 2])
    c.refuse("A must be [..., n, n], got ", shape_text(a.size, a.dim));
  TrilInverseParams p{};
  p.n = a.size[a.dim - 1];
  if (p.n < 1 || p.n > kMaxTrilSize)
    c.refuse("n must be 1 to ", kMaxTrilSize, ", got ", p.n, " from A.size(", a.dim - 1, ")");
  if (method < 0 || method > static_cast<int64_t>(TrilMethod::blocked_bf16x3))
    c.refuse("method must be 0 to 3, got ", method);
  p.method = static_cast<TrilMethod>(method);
  Tensor copy = input;
  if (!a.contiguous()) {
    copy = torch::stable::contiguous(input);
    a = c.any("A", copy, kFloats);
  }
  Tensor inverse = new_like(c, "inverse", a);
  p.batch = 1;
  for (int64_t i = 0; i < a.dim - 2; ++i) p.batch *= a.size[i];
  if (p.batch == 0) return inverse;
  p.a = a.data();
  p.inverse = inverse.mutable_data_ptr();
  p.dtype = dtype_of(a);
  on_device(c, [&](const auto& exec) { backend::tril_inverse(p, exec); });
  return inverse;
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) { m.def("tril_inverse(Tensor A, int method) -> Tensor"); }
KK_REGISTER(tril_inverse)
