// Page tables, as the ops that read sequences take them, and checks of their values. Those of a CPU call are visible, so a
// bad one is an error and not a read outside the pool.
#pragma once
#include "bind/check.h"

namespace kk::bind {

// How messages call what differs.
struct PageNames {
  const char* table;
  const char* cache;  // that the entries of the table are pages of; null: they name a pool too
  const char* lists;  // of what is selected, if anything is
};

constexpr int64_t kAnyWidth = INT64_MAX;  // max_pages of a table that is not read: never too narrow

struct PageTable {
  PageNames names;
  const int32_t* entries;  // [B, max_pages], rows stride apart
  int64_t max_pages, stride;
  const int32_t* seq_lens;  // [B]
  int64_t B, page_size;
  int num_pools;
  int64_t num_pages[kMaxPools];

  int64_t pages_of(int64_t tokens) const { return (tokens + page_size - 1) / page_size; }
  bool has(int32_t entry) const {
    return entry >= 0 && entry >> 28 < num_pools && (entry & kPageMask) < num_pages[entry >> 28];
  }
};

// Params: any with page_table, max_pages, table_stride, seq_lens, B, page_size, pools, num_pools.
template <typename Params>
PageTable page_table_of(const Params& p, const PageNames& names = {"page_table", nullptr, nullptr}) {
  PageTable t{names, p.page_table, p.max_pages, p.table_stride, p.seq_lens, p.B, p.page_size, p.num_pools, {}};
  for (int i = 0; i < p.num_pools; ++i) t.num_pages[i] = p.pools[i].num_pages;
  return t;
}

// None is negative, and the table is wide enough for each.
void check_lengths(const Check& c, const PageTable& t);
// first ... end - 1 of sequence b.
void check_entries(const Check& c, const PageTable& t, int64_t b, int64_t first, int64_t end);
// `where` is what it is called, for an entry that the table has not.
[[noreturn]] void refuse_entry(const Check& c, const PageTable& t, const std::string& where, int32_t entry);

}  // namespace kk::bind
