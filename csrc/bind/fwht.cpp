// fwht: schema, checks, output.
#include "kvkernels/ops/fwht.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bind/check.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

bool has_hadamard(int64_t n) {
  if (n < 1) return false;
  int64_t odd = n;
  while (odd % 2 == 0) odd /= 2;
  return odd == 1 || ((odd == 3 || odd == 5 || odd == 7) && n / odd >= 4);
}

// One stride for all rows, or false.
bool one_row_stride(const View& x, int64_t* stride) {
  *stride = x.size[x.dim - 1];
  int64_t expect = -1;
  for (int64_t i = x.dim - 2; i >= 0; --i) {
    if (x.size[i] == 1) continue;
    if (expect < 0)
      *stride = x.stride[i];
    else if (x.stride[i] != expect)
      return false;
    expect = x.stride[i] * x.size[i];
  }
  return true;
}

Tensor fwht(const Tensor& input, double scale) {
  Check c("fwht");
  View x = c.any("x", input, kFloats | kF64);
  if (x.dim < 1) c.refuse("x must have at least one dim, got a scalar");
  FwhtParams p{};
  p.n = x.size[x.dim - 1];
  if (!has_hadamard(p.n))
    c.refuse("the last dim of x must be m * 2^k with m one of 1, 12, 20, 28; got ", shape_text(x.size, x.dim));

  Tensor copy = input;
  if (!one_row_stride(x, &p.x_stride)) {
    copy = torch::stable::contiguous(input);
    x = c.any("x", copy, kFloats | kF64);
    p.x_stride = p.n;
  }
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.handle, &dtype);
  Tensor out = empty(x.size, x.dim, dtype, c.device_type(), c.device_index());
  p.rows = 1;
  for (int64_t i = 0; i < x.dim - 1; ++i) p.rows *= x.size[i];
  if (p.rows == 0) return out;
  p.x = x.data();
  const View y = view("out", out);
  c.writable(y);
  p.y = y.mutable_data();
  p.dtype = dtype_of(x);
  p.scale = scale;
  on_device(c, [&](const auto& exec) { backend::fwht(p, exec); });
  return out;
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) { m.def("fwht(Tensor x, float scale) -> Tensor"); }
KK_REGISTER(fwht)
