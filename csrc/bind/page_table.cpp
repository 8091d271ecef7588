#include "bind/page_table.h"

namespace kk::bind {

void refuse_entry(const Check& c, const PageTable& t, const std::string& where, int32_t entry) {
  const int64_t pool = entry >> 28, page = entry & kPageMask;
  if (t.names.cache) c.refuse(where, " = ", entry, ", but ", t.names.cache, " has ", t.num_pages[0], " blocks");
  if (entry < 0 || pool >= t.num_pools)
    c.refuse(where, " = ", entry, " means pool ", pool, ", but there are ", t.num_pools);
  c.refuse(where, " means page ", page, " of pool ", pool, ", which has ", t.num_pages[pool], " pages");
}

void check_entries(const Check& c, const PageTable& t, int64_t b, int64_t first, int64_t end) {
  const int32_t* row = t.entries + b * t.stride;
  for (int64_t i = first; i < end; ++i)
    if (!t.has(row[i]))
      refuse_entry(c, t, std::string(t.names.table) + "[" + std::to_string(b) + ", " + std::to_string(i) + "]", row[i]);
}

void check_lengths(const Check& c, const PageTable& t) {
  for (int64_t b = 0; b < t.B; ++b) {
    const int64_t len = t.seq_lens[b];
    if (len < 0) c.refuse("seq_lens[", b, "] = ", len, " is negative");
    if (t.pages_of(len) > t.max_pages)
      c.refuse(t.names.table, " is too narrow: seq_lens[", b, "] = ", len, " needs ", t.pages_of(len), " pages of ",
               t.page_size, " tokens, but ", t.names.table, ".size(1) = ", t.max_pages);
  }
}

}  // namespace kk::bind
