// Lines of the chunk to come. Rows of a head lie all the other heads apart, where no hardware prefetcher looks: waiting
// for them took a tenth of the time. They are asked for in steps between pieces of the products of a chunk.
#pragma once
#include "cpu/delta_chunk.h"

KK_BEGIN

// Elements [from, to) of rows of share `share` of `shares` of `tokens` tokens from `begin` on. Inlined or lost: GCC
// drops calls of functions that only prefetch.
[[gnu::always_inline]] inline void ask_for_rows(const DeltaRows& x, int64_t batch, int64_t begin, int64_t tokens,
                                                int64_t head, int64_t share, int64_t shares, int64_t from, int64_t to) {
  if (!x.p) return;
  const int64_t element = x.dtype == DType::f32 ? 4 : 2;
  for (int64_t i = tokens * share / shares; i < tokens * (share + 1) / shares; ++i) {
    const uint8_t* row = delta_row(x, batch, begin + i, head);
    for (int64_t byte = from * element; byte < to * element; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

class DeltaAhead {
 public:
  // Columns [from, to) of value head `head`, chunk from token `begin` on. Rows of the key head are asked for by all
  // `lanes` lanes of a task together, this one being number `lane`; where there are none (0), nothing of keys is asked for.
  DeltaAhead(const DeltaInputs& in, const DeltaSequence& s, int64_t begin, int64_t head, int64_t from, int64_t to,
             int64_t lane, int64_t lanes)
      : in_(in), batch_(s.batch), begin_(begin), head_(head), from_(from), to_(to), lane_(lane), lanes_(lanes) {
    tokens_ = s.end - begin < in.chunk ? s.end - begin : in.chunk;
  }
  // Share `step` of `steps`.
  [[gnu::always_inline]] void take(int64_t step, int64_t steps) const {
    if (tokens_ <= 0) return;
    const int64_t key_head = head_ / (in_.HV / in_.H);
    rows(in_.v, head_, step, steps, from_, to_);
    rows(in_.write, head_, step, steps, from_, to_);
    if (lanes_ == 0) return;
    rows(in_.k, key_head, lane_ * steps + step, lanes_ * steps, 0, in_.K);
    rows(in_.q, key_head, lane_ * steps + step, lanes_ * steps, 0, in_.K);
    const int64_t panels = (in_.V + kDeltaPanel - 1) / kDeltaPanel, panel = from_ / kDeltaPanel;
    if (in_.vector_gate) rows(in_.g, head_, panel * steps + step, panels * steps, 0, in_.K);
    rows(in_.erase, head_, panel * steps + step, panels * steps, 0, in_.K);
  }

 private:
  [[gnu::always_inline]] void rows(const DeltaRows& x, int64_t head, int64_t share, int64_t shares, int64_t from,
                                   int64_t to) const {
    ask_for_rows(x, batch_, begin_, tokens_, head, share, shares, from, to);
  }
  const DeltaInputs& in_;
  int64_t batch_, begin_, head_, from_, to_, lane_, lanes_, tokens_;
};

KK_END
