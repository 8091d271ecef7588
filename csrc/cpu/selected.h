// The runs of tokens that sparse attention reads (AttentionParams::selection). Their tokens one behind the other are a
// sequence of its own; work is cut along it, and what a query sees goes by the tokens' positions in the real one.
#pragma once
#include "cpu/visible.h"

KK_BEGIN

struct Runs {
  const int32_t* index;  // null: no selection, every token is read
  const int32_t* entries;
  int64_t tokens;  // of a run
};
inline Runs selected_runs(const AttentionParams& p, int64_t b, int64_t g) {
  const Selection& s = p.selection;
  if (!s.index) return {nullptr, nullptr, 0};
  return {s.index + b * s.index_batch + g * s.index_head,
          s.entries ? s.entries + b * s.entries_batch + g * s.entries_head : nullptr, s.tokens};
}

// Whether the KV heads of a sequence may differ in their runs.
inline bool own_selection(const AttentionParams& p) {
  return p.selection.index && (p.selection.index_head != 0 || (p.selection.entries && p.selection.entries_head != 0));
}

// Runs before the first negative index. Sixteen at a time, which is a vector or a few.
inline int64_t count_runs(const int32_t* index, int64_t most) {
  int64_t n = 0;
  for (; n + 16 <= most; n += 16) {
    int32_t any = 0;
    for (int i = 0; i < 16; ++i) any |= index[n + i];
    if (any < 0) break;
  }
  while (n < most && index[n] >= 0) ++n;
  return n;
}

// visible_tokens of the sequence of selected tokens. Runs that lie in nobody's window are left out, too.
inline Visible visible_selected(const AttentionParams& p, int64_t b, int64_t g) {
  const Runs runs = selected_runs(p, b, g);
  const Visible seen = visible_tokens(p, b, g);
  const int64_t count = count_runs(runs.index, p.selection.count);
  const auto begin_before = [&](int64_t position) {  // how many of the runs
    int64_t lo = 0, hi = count;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (runs.index[mid] * runs.tokens < position)
        lo = mid + 1;
      else
        hi = mid;
    }
    return lo;
  };
  const int64_t used = begin_before(seen.end);
  if (used == 0) return {0, 0, 0};
  const int64_t left = seen.end - runs.index[used - 1] * runs.tokens;  // from the last run to the end of the sequence
  const int64_t end = (used - 1) * runs.tokens + (left < runs.tokens ? left : runs.tokens);
  const int64_t sink = begin_before(seen.sink) * runs.tokens;
  const int64_t begin = begin_before(seen.begin - runs.tokens + 1) * runs.tokens;
  return begin > sink ? Visible{sink, begin, end} : Visible{0, 0, end};
}

KK_END
