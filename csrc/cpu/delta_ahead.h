// Lines of the chunk to come. Rows of a head lie all the other heads apart, where no hardware prefetcher looks: waiting
// for them took a tenth of the time. They are asked for in steps between pieces of the products of a chunk.
#pragma once
#include "cpu/delta_chunk.h"

KK_BEGIN

// Elements [from, to) of rows of `tokens` tokens from `begin` on. Inlined or lost: GCC drops calls of functions that only
// prefetch.
[[gnu::always_inline]] inline void ask_for_rows(const DeltaRows& x, int64_t batch, int64_t begin, int64_t tokens,
                                                int64_t head, int64_t from, int64_t to) {
  if (!x.p || tokens <= 0) return;
  const int64_t element = x.dtype == DType::f32 ? 4 : 2, stride = x.token * element;
  const uint8_t* row = delta_row(x, batch, begin, head);
  for (int64_t i = 0; i < tokens; ++i, row += stride)
    for (int64_t byte = from * element; byte < to * element; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

class DeltaAhead {
 public:
  // In `steps` steps: of value head `head` columns [from, to) of v in the chunk from token `begin` on, and what the chunk
  // from `keys_begin` on is formed of. Rows of the key head are asked for by all `lanes` lanes of a task together, this one
  // being number `lane`.
  DeltaAhead(const DeltaInputs& in, const DeltaSequence& s, int64_t begin, int64_t keys_begin, int64_t head,
             int64_t from, int64_t to, int64_t lane, int64_t lanes, int64_t steps)
      : in_(in), batch_(s.batch), head_(head), key_head_(head / (in.HV / in.H)), from_(from), to_(to) {
    values_ = Share(in, s, begin, 0, 1, steps);
    keys_ = Share(in, s, keys_begin, lane, lanes, steps);
    if (!in.vector_gate && !in.erase.p) return;
    const int64_t panels = (in.V + kDeltaPanel - 1) / kDeltaPanel;
    head_rows_ = Share(in, s, keys_begin, from / kDeltaPanel, panels, steps);
  }
  [[gnu::always_inline]] void take(int64_t step) const {
    ask(in_.v, head_, values_, step, from_, to_);
    ask(in_.write, head_, values_, step, from_, to_);
    ask(in_.k, key_head_, keys_, step, 0, in_.K);
    ask(in_.q, key_head_, keys_, step, 0, in_.K);
    if (in_.vector_gate) ask(in_.g, head_, head_rows_, step, 0, in_.K);
    ask(in_.erase, head_, head_rows_, step, 0, in_.K);
  }

 private:
  // Tokens of a share of a chunk, and those of one step.
  struct Share {
    int64_t begin = 0, end = 0, step = 0;
    Share() = default;
    Share(const DeltaInputs& in, const DeltaSequence& s, int64_t chunk, int64_t share, int64_t shares, int64_t steps) {
      const int64_t tokens = s.end - chunk < in.chunk ? s.end - chunk : in.chunk;
      if (tokens <= 0) return;
      begin = chunk + tokens * share / shares;
      end = chunk + tokens * (share + 1) / shares;
      step = (end - begin + steps - 1) / steps;
    }
  };
  [[gnu::always_inline]] void ask(const DeltaRows& x, int64_t head, const Share& rows, int64_t step, int64_t from,
                                  int64_t to) const {
    const int64_t begin = rows.begin + step * rows.step;
    ask_for_rows(x, batch_, begin, rows.end - begin < rows.step ? rows.end - begin : rows.step, head, from, to);
  }
  const DeltaInputs& in_;
  int64_t batch_, head_, key_head_, from_, to_;
  Share values_, keys_, head_rows_;
};

KK_END
