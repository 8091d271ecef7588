// read_kv: schema, checks.
#include "kvkernels/ops/read_kv.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

constexpr PoolNames kNames{"pool", "k_cache of pool", "v_cache of pool"};

void read_kv(const Tensor& pool, const std::optional<Tensor>& pool_v, int64_t format, int64_t page_size,
             int64_t head_dim, const Tensor& slots_arg, const std::optional<Tensor>& centre,
             const std::optional<Tensor>& balance, const std::optional<Tensor>& order, const Tensor& k_arg,
             const Tensor& v_arg) {
  Check c("read_kv");
  c.bind("D", head_dim, "head_dim");
  const FormatCode f = format_code(c, kNames.record, format);
  check_geometry(c, kNames.record, f, page_size, head_dim, "head_dim");
  ReadKvParams p{};
  p.pool = make_pool(c, kNames, f, pool, pool_v ? &*pool_v : nullptr, page_size, head_dim);
  const View slots = c.is("slots", slots_arg, kI64, "T");
  p.transform = make_transform(c, {centre, balance, order});
  const View k = c.is("k", k_arg, kFloats, "T Hkv D"), v = c.is("v", v_arg, kFloats, "T Hkv D");
  c.same_dtype(v, k);
  for (const View* out : {&k, &v}) {
    c.contiguous(*out);
    c.writable(*out);
  }
  if (c.on_cpu()) check_slots(c, slots, kNames.record, p.pool, page_size);

  p.k = k.mutable_data();
  p.v = v.mutable_data();
  p.dtype = dtype_of(k);
  p.slots = slots.data<int64_t>();
  p.T = k.size[0], p.Hkv = k.size[1], p.D = head_dim;
  p.page_size = page_size;
  if (p.T > 0 && p.Hkv > 0) on_device(c, [&](const auto& exec) { backend::read_kv(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "read_kv(Tensor pool, Tensor? pool_v, int format, SymInt page_size, SymInt head_dim, Tensor slots, Tensor? "
      "centre, Tensor? balance, Tensor? order, Tensor(a!) k, Tensor(b!) v) -> ()");
}
KK_REGISTER(read_kv)
