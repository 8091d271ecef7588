#include "bind/selection.h"

#include "bind/lists.h"

namespace kk::bind {

Selection make_selection(Check& c, const AttentionParams& p, const std::optional<Tensor>& pages,
                         const std::optional<Tensor>& tokens, const std::optional<Tensor>& entries) {
  if (pages.has_value() == tokens.has_value())
    c.refuse("one of pages and tokens must be given, got ", pages ? "both" : "none");
  if (tokens && entries) c.refuse("entries are those of pages, and cannot go together with tokens");
  const Lists list = pages ? check_lists(c, "pages", *pages) : check_lists(c, "tokens", *tokens);
  Selection s{list.index, list.count, list.batch, list.head, pages ? p.page_size : 1, nullptr, 0, 0};
  if (entries) {
    const Lists of = check_lists(c, "entries", *entries);
    s.entries = of.index;
    s.entries_batch = of.batch, s.entries_head = of.head;
  }
  return s;
}

void check_selection(const Check& c, const AttentionParams& p, const PageTable& table) {
  const Selection& s = p.selection;
  const char* name = table.names.lists;
  const bool heads_alike = s.index_head == 0 && (!s.entries || s.entries_head == 0);
  const auto at = [](const char* list, int64_t b, int64_t g, int64_t i) {
    return std::string(list) + "[" + std::to_string(b) + ", " + std::to_string(g) + ", " + std::to_string(i) + "]";
  };
  const bool of_pages = s.tokens == p.page_size;
  const uint32_t page_size = static_cast<uint32_t>(p.page_size);
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t* row = table.entries + b * table.stride;
    const int64_t len = p.seq_lens[b], runs = (len + s.tokens - 1) / s.tokens;
    for (int64_t g = 0; g < (heads_alike ? 1 : p.Hkv); ++g) {
      const int32_t* list = s.index + b * s.index_batch + g * s.index_head;
      const int32_t* entries = s.entries ? s.entries + b * s.entries_batch + g * s.entries_head : nullptr;
      int64_t last = -1;
      for (int64_t i = 0; i < s.count && list[i] >= 0; ++i) {
        const int64_t run = list[i];
        if (run <= last)
          c.refuse(at(name, b, g, i), " = ", run, " comes after ", last, ", but a list must be ascending, each once");
        if (run >= runs)
          c.refuse(at(name, b, g, i), " = ", run, ", but seq_lens[", b, "] = ", len, " has ", runs, " ", name);
        last = run;
        if (entries) {
          if (!table.has(entries[i])) refuse_entry(c, table, at("entries", b, g, i), entries[i]);
          continue;
        }
        // A division of 32 bits: lists of tokens take three times as long with one of 64.
        const uint32_t page = of_pages ? static_cast<uint32_t>(run) : static_cast<uint32_t>(run) / page_size;
        if (!table.has(row[page])) check_entries(c, table, b, page, page + 1);
      }
    }
  }
}

}  // namespace kk::bind
