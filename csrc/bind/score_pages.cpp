// score_pages: schema, checks.
#include "kvkernels/ops/score_pages.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind/exec.h"
#include "bind/page_table.h"
#include "bind/pool.h"
#include "bind/score.h"
#include "bind/summary.h"

namespace kk::bind {
namespace {

void check_values(const Check& c, const ScorePagesParams& p) {
  PageTable table{{"page_table", nullptr, nullptr},
                  p.page_table,
                  p.offsets ? kAnyWidth : p.max_pages,
                  p.table_stride,
                  p.seq_lens,
                  p.B,
                  p.page_size,
                  p.num_pools,
                  {}};
  std::copy(p.num_pages, p.num_pages + p.num_pools, table.num_pages);
  check_lengths(c, table);
  for (int64_t b = 0; b < p.B && !p.offsets; ++b) check_entries(c, table, b, 0, table.pages_of(p.seq_lens[b]));
}

void score_pages(const Tensor& q_arg, const std::vector<Tensor>& records_arg, int64_t kind, int64_t bits,
                 const Tensor& page_table, const Tensor& seq_lens, int64_t page_size,
                 const std::optional<Tensor>& segments_arg, double scale, int64_t reduce, const Tensor& out) {
  Check c("score_pages");
  const Queries q = check_queries(c, q_arg);
  check_head_dim(c, q.D(), q.D_from());
  ScorePagesParams p{};
  if (static_cast<SummaryKind>(kind) == SummaryKind::channels)
    c.refuse("summaries of kind channels have no score for a page; score_tokens takes them");
  p.layout = make_layout(c, static_cast<SummaryKind>(kind), bits, q.D(), 0, page_size);
  const std::vector<View> records = check_records(c, records_arg, p.layout);
  fill_score(c, p, q, records[0].size[1], "records[0]", {page_table, seq_lens, page_size, scale, reduce});
  p.num_pools = static_cast<int>(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    p.records[i] = records[i].data<uint8_t>();
    p.num_pages[i] = records[i].size[0];
  }
  if (segments_arg) {
    const View segments = check_segments(c, *segments_arg);
    const int64_t count = segments.size[1] - 1;
    p.offsets = segments.data<int32_t>();
    p.offsets_stride = segments.stride[0];
    if (records.size() != 1 || records[0].size[0] != p.B * count)
      c.refuse("records must be one tensor with B * num_segments = ", p.B * count, " records of a head, got ",
               records.size(), " with ", records[0].size[0]);
    fill_scores_out(c, p, count, "segments", out);
  } else {
    fill_scores_out(c, p, p.max_pages, "the width of page_table", out);
  }
  if (p.B == 0 || p.Hq == 0 || p.n == 0) return;
  if (c.on_cpu()) check_values(c, p);
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::score_pages_workspace(p, exec));
    p.workspace = workspace.data();
    backend::score_pages(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "score_pages(Tensor q, Tensor[] records, int kind, int bits, Tensor page_table, Tensor seq_lens, SymInt "
      "page_size, Tensor? segments, float scale, int reduce, Tensor(a!) out) -> ()");
}
KK_REGISTER(score_pages)
