// gather_pages: schema, checks.
#include "kvkernels/ops/gather_pages.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/lists.h"

namespace kk::bind {
namespace {

// All that decides where something is read or written.
void check_values(const Check& c, const GatherPagesParams& p) {
  const auto at = [](int64_t b, int64_t h, int64_t i) {
    return "[" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(i) + "]";
  };
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.Hkv; ++h) {
      const int64_t row = b * p.Hkv + h;
      if (p.hand[row] < 0 || p.hand[row] >= p.slots)
        c.refuse("hand[", b, ", ", h, "] = ", p.hand[row], ", but there are ", p.slots, " slots");
      for (int64_t s = 0; s < p.slots; ++s) {
        const int32_t page = p.page_of[row * p.slots + s];
        if (page < -1 || page >= p.max_pages || (page >= 0 && p.slot_of[row * p.max_pages + page] != s))
          c.refuse("page_of", at(b, h, s), " = ", page, ", but slot_of says otherwise, or there is no such page");
      }
      const int32_t* list = p.pages + b * p.pages_batch + h * p.pages_head;
      int64_t last = -1;
      for (int64_t i = 0; i < p.count && list[i] >= 0; ++i) {
        const int32_t page = list[i];
        if (page <= last)
          c.refuse("pages", at(b, h, i), " = ", page, " comes after ", last,
                   ", but a list must be ascending, each once");
        if (page >= p.max_pages)
          c.refuse("pages", at(b, h, i), " = ", page, ", but page_table.size(1) = ", p.max_pages);
        last = page;
        const int32_t entry = p.page_table[b * p.table_stride + page];
        if (entry < 0) c.refuse("page_table[", b, ", ", page, "] = ", entry, " is negative");
        if (entry >> 28 == p.pool && (entry & kPageMask) >= p.host_pages)
          c.refuse("page_table[", b, ", ", page, "] means page ", entry & kPageMask, " of pool ", p.pool,
                   ", of which host has ", p.host_pages);
        const int32_t slot = p.slot_of[row * p.max_pages + page];
        if (slot < -1 || slot >= p.slots || (slot >= 0 && p.page_of[row * p.slots + slot] != page))
          c.refuse("slot_of", at(b, h, page), " = ", slot, ", but page_of says otherwise, or there is no such slot");
      }
    }
}

void gather_pages(const Tensor& host_arg, const Tensor& cache_arg, const Tensor& page_table_arg, int64_t pool,
                  const Tensor& pages_arg, const Tensor& slot_of_arg, const Tensor& page_of_arg, const Tensor& hand_arg,
                  const Tensor& entries_arg) {
  Check c("gather_pages");
  const View cache = c.is("cache", cache_arg, kU8, "?num_pages Hkv page_bytes");
  const View page_table = c.is("page_table", page_table_arg, kI32, "B max_pages");
  const Lists pages = check_lists(c, "pages", pages_arg);
  const View slot_of = c.is("slot_of", slot_of_arg, kI32, "B Hkv max_pages");
  const View page_of = c.is("page_of", page_of_arg, kI32, "B Hkv slots");
  const View hand = c.is("hand", hand_arg, kI32, "B Hkv");
  const View entries = c.is("entries", entries_arg, kI32, "B Hkv K");
  for (const View* written : {&slot_of, &page_of, &hand, &entries}) {
    c.contiguous(*written);
    c.writable(*written);
  }
  c.writable(cache);
  // Main memory serves a GPU too: its kernels read what is pinned by address.
  Check h("gather_pages");
  const View host = h.is("host", host_arg, kU8, "?num_pages ?Hkv ?page_bytes");
  if (host.size[1] != cache.size[1] || host.size[2] != cache.size[2])
    c.refuse("host must be [num_pages, Hkv, page_bytes], got ", shape_text(host.size, 3), "; cache is ",
             shape_text(cache.size, 3));
  if (!h.on_cpu() && h.device() != c.device())
    c.refuse("host must be on cpu, or on ", c.device(), " like cache; got ", h.device());

  GatherPagesParams p{};
  p.B = page_table.size[0], p.Hkv = cache.size[1];
  p.slots = page_of.size[2];
  p.count = pages.count;
  p.record_bytes = cache.size[2];
  if (p.record_bytes % 16) c.refuse("page_bytes must be a multiple of 16, got ", p.record_bytes, " from cache.size(2)");
  for (const View* v : {&host, &cache})
    if (reinterpret_cast<uintptr_t>(v->data()) % 16 || v->stride[0] % 16 || v->stride[1] % 16)
      c.refuse(v->name, ": every record must begin at a multiple of 16 bytes, got strides ",
               shape_text(v->stride, v->dim));
  if (pool < 0 || pool >= kMaxPools) c.refuse("pool must be 0 to ", kMaxPools - 1, ", got ", pool);
  if (cache.size[0] != p.B * p.slots)
    c.refuse("cache must have B * slots = ", p.B, " * ", p.slots, " pages, got ", cache.size[0]);
  if (p.count > p.slots)
    c.refuse("pages lists ", p.count, " pages of a head, but the cache holds ", p.slots, " slots for them");
  p.host = host.data<uint8_t>();
  p.cache = cache.mutable_data<uint8_t>();
  p.host_page = host.stride[0], p.host_head = host.stride[1], p.host_pages = host.size[0];
  p.cache_page = cache.stride[0], p.cache_head = cache.stride[1];
  p.page_table = page_table.data<int32_t>();
  p.max_pages = page_table.size[1];
  p.table_stride = page_table.stride[0];
  p.pool = static_cast<int32_t>(pool);
  p.pages = pages.index;
  p.pages_batch = pages.batch, p.pages_head = pages.head;
  p.slot_of = slot_of.mutable_data<int32_t>();
  p.page_of = page_of.mutable_data<int32_t>();
  p.hand = hand.mutable_data<int32_t>();
  p.entries = entries.mutable_data<int32_t>();
  if (p.B == 0 || p.Hkv == 0 || p.count == 0) return;
  if (c.on_cpu()) check_values(c, p);
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::gather_pages_workspace(p, exec));
    p.workspace = workspace.data();
    backend::gather_pages(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "gather_pages(Tensor host, Tensor(a!) cache, Tensor page_table, SymInt pool, Tensor pages, Tensor(b!) slot_of, "
      "Tensor(c!) page_of, Tensor(d!) hand, Tensor(e!) entries) -> ()");
}
KK_REGISTER(gather_pages)
