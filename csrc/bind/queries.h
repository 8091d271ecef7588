// q of attention and of scores: the last tokens of each sequence.
#pragma once
#include "bind/check.h"

namespace kk::bind {

struct Queries {
  View view;
  bool several;  // [B, Tq, Hq, D], else [B, Hq, D]

  int64_t Tq() const { return several ? view.size[1] : 1; }
  int64_t Hq() const { return view.size[view.dim - 2]; }
  int64_t D() const { return view.size[view.dim - 1]; }
  const char* D_from() const { return several ? "q.size(3)" : "q.size(2)"; }

  // Params: any with q, its strides, dtype, B, Tq, Hq, D.
  template <typename Params>
  void fill(Params& p) const {
    p.q = view.data();
    p.q_batch = view.stride[0], p.q_token = several ? view.stride[1] : 0, p.q_head = view.stride[view.dim - 2];
    p.dtype = dtype_of(view);
    p.B = view.size[0], p.Tq = Tq(), p.Hq = Hq(), p.D = D();
  }
};
// Binds B Tq Hq D.
Queries check_queries(Check& c, const Tensor& q);

// Hq must be a multiple of the KV heads; they are `name`, and their number came from `from`.
void check_heads(const Check& c, const Queries& q, int64_t kv_heads, const char* name, const char* from);

}  // namespace kk::bind
