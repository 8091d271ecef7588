// Which tokens of its sequence a query sees.
#pragma once
#include <cmath>

#include "kvkernels/ops/attention.h"

KK_BEGIN

// The query heads of a group.
struct GroupHeads {
  const uint8_t* list;  // null: first, first + 1, ...
  int64_t first, n;
  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};
inline GroupHeads group_heads(const AttentionParams& p, int64_t g) {
  const HeadMap& map = p.heads;
  if (map.mapped) return {map.order + map.first[g], 0, map.first[g + 1] - map.first[g]};
  const int64_t n = p.Hq / p.Hkv;
  return {nullptr, g * n, n};
}

// A query at position i sees keys j < sink and j >= i - left; left < 0: every key.
struct Window {
  int64_t sink, left;
};
inline Window window_of(const AttentionParams& p, int64_t g) {
  return p.head_windows ? Window{p.head_windows[2 * g], p.head_windows[2 * g + 1]} : Window{0, p.window_left};
}

// The last Tq tokens of a sequence are the queries' own: bit j of own_tokens says whether query t sees token L - Tq + j, which
// stands at position L - Tq + depth(j).
inline uint32_t own_tokens(const AttentionParams& p, int64_t b, int64_t t) {
  return p.tree_mask ? static_cast<uint32_t>(p.tree_mask[b * p.tree_stride + t]) & ((1u << p.Tq) - 1) : (2u << t) - 1;
}
inline int64_t depth(const AttentionParams& p, int64_t b, int64_t t) {
  return p.tree_mask ? __builtin_popcount(own_tokens(p, b, t)) - 1 : t;
}

// Tokens [0, sink) and [begin, end), sink <= begin: what some query of a sequence sees. No page between is looked at. With a
// selection they are counted along its tokens (selected.h).
struct Visible {
  int64_t sink, begin, end;
  int64_t tokens() const { return sink + end - begin; }
};
inline Visible visible_tokens(const AttentionParams& p, int64_t b, int64_t g) {
  const int64_t len = p.seq_lens[b] > 0 ? p.seq_lens[b] : 0;
  const Window w = window_of(p, g);
  if (w.left < 0) return {0, 0, len};
  int64_t lowest = 0;
  if (p.tree_mask) {
    lowest = p.Tq;
    for (int64_t t = 0; t < p.Tq; ++t)
      if (depth(p, b, t) < lowest) lowest = depth(p, b, t);
  }
  const int64_t begin = len - p.Tq + lowest - w.left;
  return begin > w.sink ? Visible{w.sink, begin, len} : Visible{0, 0, len};
}

// A query row: query head `head` of token t of sequence b.
struct QueryRow {
  int64_t b, t, head;
  int64_t base;         // L - Tq; of the tokens before it the row sees those below `sink` and those from `begin` on
  int64_t sink, begin;  // sink <= begin or begin <= 0
  int64_t position;     // in the sequence, along its branch of the tree
  uint32_t own;         // bit j: sees token base + j
};

// In place: a row made elsewhere and copied by a vector would wait for the scalar stores that made it.
inline void set_row(QueryRow& r, const AttentionParams& p, int64_t b, int64_t t, int64_t head, Window w) {
  r.b = b, r.t = t, r.head = head;
  r.base = p.seq_lens[b] - p.Tq;
  r.own = own_tokens(p, b, t);
  r.position = r.base + depth(p, b, t);
  r.sink = r.begin = 0;
  if (w.left < 0) return;
  r.sink = w.sink;
  r.begin = r.position - w.left;
  if (r.begin >= r.base)
    for (int64_t j = 0; j < p.Tq; ++j) {
      const int64_t position = r.base + depth(p, b, j);
      if (position < r.begin && position >= r.sink) r.own &= ~(1u << j);
    }
}

// Without tree and sinks a row sees one run of tokens: from `begin` to its own.
inline bool sees_one_run(const AttentionParams& p) { return !p.tree_mask && !p.head_windows; }

// Tokens that all rows of a block see: those below `sink`, and those in [begin, end).
struct Unmasked {
  int64_t sink = INT64_MAX, begin = 0, end = INT64_MAX;
  void add(const QueryRow& r) {
    const int64_t last = r.base + __builtin_ctz(~r.own);
    if (r.sink < sink) sink = r.sink;
    if (r.begin > begin) begin = r.begin;
    if (last < end) end = last;
  }
  bool contains(int64_t from, int64_t to) const { return to <= end && (from >= begin || to <= sink); }
};

// Scores x of tokens in ascending order become -inf where the row does not see the token; column(i) of them stand before
// position i.
template <typename Column>
inline void hide_tokens(const AttentionParams& p, const QueryRow& r, const Column& column, float* x) {
  const int64_t from = column(r.sink), to = column(r.begin < r.base ? r.begin : r.base);
  for (int64_t i = from; i < to; ++i) x[i] = -INFINITY;
  for (int64_t j = 0; j < p.Tq; ++j) {
    if (r.own >> j & 1) continue;
    const int64_t i = column(r.base + j);
    if (i < column(r.base + j + 1)) x[i] = -INFINITY;
  }
}

KK_END
