#include "bind/score.h"

#include <cmath>

namespace kk::bind {

void fill_score(Check& c, ScoreCommon& p, const Queries& q, int64_t Hkv, const char* from, const ScoreArguments& a) {
  q.fill(p);
  check_heads(c, q, Hkv, "Hkv", from);
  p.Hkv = Hkv;
  const View page_table = c.is("page_table", a.page_table, kI32, "B ?max_pages");
  const View seq_lens = c.is("seq_lens", a.seq_lens, kI32, "B");
  p.page_table = page_table.data<int32_t>();
  p.max_pages = page_table.size[1];
  p.table_stride = page_table.stride[0];
  p.page_size = a.page_size;
  p.seq_lens = seq_lens.data<int32_t>();
  if (std::isnan(a.scale)) c.refuse("scale is NaN");
  p.scale = static_cast<float>(a.scale);
  if (a.reduce < 0 || a.reduce > 3)
    c.refuse("reduce must be 0 (max), 1 (sum), 2 (softmax_max) or 3 (softmax_sum), got ", a.reduce);
  p.reduce = static_cast<Reduce>(a.reduce);
}

void fill_scores_out(Check& c, ScoreCommon& p, int64_t n, const char* name, const Tensor& out_arg) {
  c.bind("n", n, name);
  const View out = c.is("out", out_arg, kF32, "B Hkv n");
  c.contiguous(out);
  c.writable(out);
  p.out = out.mutable_data<float>();
  p.n = n;
}

}  // namespace kk::bind
