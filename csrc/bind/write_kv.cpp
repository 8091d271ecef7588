// write_kv: schema, checks.
#include "kvkernels/ops/write_kv.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

constexpr PoolNames kNames{"pool", "k_cache of pool", "v_cache of pool"};

// Tokens are read while others are written, in any order, so none may stand in a page that is written.
void check_overlap(const Check& c, const View& tokens, const View& pool, const View& slots, int64_t page_size) {
  const auto *from = tokens.data<uint8_t>(), *to = from + tokens.span();
  const auto* pages = pool.data<uint8_t>();
  const int64_t bytes = pool.span();
  if (from >= pages + bytes || pages >= to || pool.size[0] == 0) return;
  const int64_t page = pool.stride[0] * (pool.dtype == kU8 ? 1 : 2), rest = bytes - (pool.size[0] - 1) * page;
  for (int64_t i = 0; i < slots.size[0]; ++i) {
    const int64_t slot = slots.data<int64_t>()[i];
    if (slot < 0) continue;
    const uint8_t* at = pages + slot / page_size * page;
    if (from < at + rest && at < to)
      c.refuse(tokens.name, " shares memory with page ", slot / page_size, " of ", pool.name, ", which slots[", i,
               "] = ", slot, " writes; pass ", tokens.name, ".clone()");
  }
}

void write_kv(const Tensor& k_arg, const Tensor& v_arg, const Tensor& pool, const std::optional<Tensor>& pool_v,
              int64_t format, int64_t page_size, const Tensor& slots_arg, const std::optional<Tensor>& centre,
              const std::optional<Tensor>& balance, const std::optional<Tensor>& order) {
  Check c("write_kv");
  const View k = c.is("k", k_arg, kFloats, "T Hkv D"), v = c.is("v", v_arg, kFloats, "T Hkv D");
  c.same_dtype(v, k);
  const FormatCode f = format_code(c, kNames.record, format);
  check_geometry(c, kNames.record, f, page_size, k.size[2], "k.size(2)");
  if (f.k == Format::kivi2)
    c.refuse(
        "kivi2 codes the keys of a whole page at once, so they cannot be written token by token; write the tokens to a "
        "16-bit pool and re-encode its full pages with pack_pages");
  WriteKvParams p{};
  p.pool = make_writable_pool(c, kNames, f, pool, pool_v ? &*pool_v : nullptr, page_size, k.size[2]);
  const View slots = c.is("slots", slots_arg, kI64, "T");
  p.transform = make_transform(c, {centre, balance, order});
  if (c.on_cpu()) {
    check_slots(c, slots, kNames.record, p.pool, page_size);
    for (const View* tokens : {&k, &v}) {
      check_overlap(c, *tokens, view(f.two_caches ? kNames.k : kNames.record, pool), slots, page_size);
      if (pool_v) check_overlap(c, *tokens, view(kNames.v, *pool_v), slots, page_size);
    }
  }

  p.k = k.data();
  p.v = v.data();
  p.k_token = k.stride[0], p.k_head = k.stride[1];
  p.v_token = v.stride[0], p.v_head = v.stride[1];
  p.dtype = dtype_of(k);
  p.slots = slots.data<int64_t>();
  p.T = k.size[0], p.Hkv = k.size[1], p.D = k.size[2];
  p.page_size = page_size;
  if (p.T > 0 && p.Hkv > 0) on_device(c, [&](const auto& exec) { backend::write_kv(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) pool, Tensor(b!)? pool_v, int format, SymInt page_size, Tensor slots, "
      "Tensor? centre, Tensor? balance, Tensor? order) -> ()");
}
KK_REGISTER(write_kv)
