#include "bind/queries.h"

namespace kk::bind {

Queries check_queries(Check& c, const Tensor& arg) {
  Queries q{{}, arg.dim() == 4};
  if (!q.several && arg.dim() != 3) {
    const View v = view("q", arg);
    c.refuse("q must be [B, Hq, D] or [B, Tq, Hq, D], got ", shape_text(v.size, v.dim));
  }
  q.view = c.is("q", arg, kFloats, q.several ? "B Tq Hq D" : "B Hq D");
  if (q.Tq() < 1 || q.Tq() > 16)
    c.refuse("q must have 1 to 16 tokens per sequence, got Tq = ", q.Tq(), " from q.size(1)");
  return q;
}

void check_heads(const Check& c, const Queries& q, int64_t kv_heads, const char* name, const char* from) {
  if (kv_heads < 1 || q.Hq() % kv_heads)
    c.refuse("Hq must be a multiple of ", name, "; Hq = ", q.Hq(), " from q.size(", q.view.dim - 2, "), ", name, " = ",
             kv_heads, " from ", from);
}

}  // namespace kk::bind
