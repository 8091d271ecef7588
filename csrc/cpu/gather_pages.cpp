// First every (sequence, KV head) decides by itself which pages go where; then all copies are shared out equally.
#include "kvkernels/ops/gather_pages.h"

#include <cstring>

#include "cpu/arena.h"
#include "cpu/entry.h"
#include "cpu/split.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

namespace {

struct Copy {
  int32_t from, to;  // pages of host and cache
  int32_t head;
};

struct Gather {
  const GatherPagesParams& p;
  Copy* copies;      // [B * Hkv][count]
  int32_t* copied;   // [B * Hkv + 1] how many, then how many before
  uint8_t* in_list;  // [B * Hkv][slots] whether a slot holds a page of the list

  Gather(const GatherPagesParams& params, Arena& arena) : p(params) {
    const int64_t heads = p.B * p.Hkv;
    copies = arena.take<Copy>(heads * p.count);
    copied = arena.take<int32_t>(heads + 1);
    in_list = arena.take<uint8_t>(heads * p.slots);
  }

  void place(int64_t head) const {
    const int64_t b = head / p.Hkv, h = head % p.Hkv;
    const int32_t* table = p.page_table + b * p.table_stride;
    const int32_t* pages = p.pages + b * p.pages_batch + h * p.pages_head;
    int32_t *slot_of = p.slot_of + head * p.max_pages, *page_of = p.page_of + head * p.slots;
    int32_t* entries = p.entries + head * p.count;
    uint8_t* taken = in_list + head * p.slots;
    Copy* copy = copies + head * p.count;
    int64_t count = 0;
    memset(taken, 0, static_cast<size_t>(p.slots));
    for (; count < p.count && pages[count] >= 0; ++count)
      if (slot_of[pages[count]] >= 0) taken[slot_of[pages[count]]] = 1;
    int32_t hand = p.hand[head];
    for (int64_t i = 0; i < p.count; ++i) {
      if (i >= count) {
        entries[i] = -1;
        continue;
      }
      const int32_t page = pages[i], entry = table[page];
      if (entry >> 28 != p.pool) {
        entries[i] = entry;
        continue;
      }
#if defined(KK_DEBUG_ASSERT)
      if ((entry & kPageMask) >= p.host_pages)
        fail("gather_pages: page_table holds a page past the end of the host's pool");
#endif
      if (slot_of[page] < 0) {
        while (taken[hand]) hand = hand + 1 == p.slots ? 0 : hand + 1;
        if (page_of[hand] >= 0) slot_of[page_of[hand]] = -1;
        page_of[hand] = page;
        slot_of[page] = hand;
        taken[hand] = 1;
        *copy++ = {entry & kPageMask, static_cast<int32_t>(b * p.slots + hand), static_cast<int32_t>(h)};
        hand = hand + 1 == p.slots ? 0 : hand + 1;
      }
      entries[i] = static_cast<int32_t>(p.pool << 28 | (b * p.slots + slot_of[page]));
    }
    p.hand[head] = hand;
    copied[head] = static_cast<int32_t>(copy - (copies + head * p.count));
  }
};

}  // namespace

int64_t gather_pages_workspace_cpu(const GatherPagesParams& p, const CpuExec&) {
  Arena arena{nullptr};
  Gather(p, arena);
  return arena.used;
}

void gather_pages_cpu(const GatherPagesParams& p, const CpuExec& exec) {
  Arena arena{static_cast<uint8_t*>(p.workspace)};
  const Gather gather(p, arena);
  const int64_t heads = p.B * p.Hkv, pages_per_thread = 1 << 13;  // about 20 us, looked up and placed
  split(exec, heads, pages_per_thread / (p.count + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) gather.place(head);
  });
  int32_t total = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int32_t n = gather.copied[head];
    gather.copied[head] = total;
    total += n;
  }
  gather.copied[heads] = total;
  const int64_t bytes_per_thread = 1 << 17;  // about 20 us
  split(exec, total, bytes_per_thread / p.record_bytes + 1, [&](int64_t begin, int64_t end) {
    int64_t head = 0;
    while (gather.copied[head + 1] <= begin) ++head;
    for (int64_t i = begin; i < end; ++i) {
      while (gather.copied[head + 1] <= i) ++head;
      const Copy& c = gather.copies[head * p.count + i - gather.copied[head]];
      memcpy(p.cache + c.to * p.cache_page + c.head * p.cache_head,
             p.host + c.from * p.host_page + c.head * p.host_head, static_cast<size_t>(p.record_bytes));
    }
  });
}

KK_END

KK_CPU_ENTRY(gather_pages, GatherPagesParams)
KK_CPU_ENTRY_R(int64_t, gather_pages_workspace, GatherPagesParams)
