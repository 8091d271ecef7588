// score_tokens: schema, checks. Of pages too, where the score is that of the best token.
#include "kvkernels/ops/score_tokens.h"

#include <torch/csrc/stable/library.h>

#include "bind/exec.h"
#include "bind/page_table.h"
#include "bind/pool.h"
#include "bind/score.h"
#include "bind/summary.h"

namespace kk::bind {
namespace {

// `tensors` are pools of these formats, or, with channels, records of a label cache.
void score_tokens(const Tensor& q_arg, const std::vector<Tensor>& tensors, const std::vector<int64_t>& formats,
                  int64_t page_size, const std::optional<Tensor>& centre, const std::optional<Tensor>& balance,
                  const std::optional<Tensor>& order, const std::optional<Tensor>& channels_arg, int64_t bits,
                  const Tensor& page_table, const Tensor& seq_lens, double scale, int64_t reduce, bool best_of_page,
                  const Tensor& out) {
  Check c(best_of_page ? "score_pages" : "score_tokens");
  const Queries q = check_queries(c, q_arg);
  ScoreTokensParams p{};
  p.best_of_page = best_of_page;
  if (channels_arg) {
    if (best_of_page) c.refuse("summaries of kind channels have no score for a page; score_tokens takes them");
    check_head_dim(c, q.D(), q.D_from());
    const View channels = check_channels(c, *channels_arg, q.D());
    p.layout = make_layout(c, SummaryKind::channels, bits, q.D(), channels.size[1], page_size);
    const std::vector<View> records = check_records(c, tensors, p.layout);
    for (size_t i = 0; i < records.size(); ++i) {
      p.records[i] = records[i].data<uint8_t>();
      p.pools[i].num_pages = records[i].size[0];
    }
    p.num_pools = static_cast<int>(records.size());
    p.channels = channels.data<int32_t>();
  } else {
    p.num_pools = make_pools(c, tensors, formats, page_size, q.D(), q.D_from(), p.pools);
    p.transform = make_transform(c, {centre, balance, order});
  }
  fill_score(c, p, q, tensors[0].size(1), channels_arg ? "records[0]" : "pool 0",
             {page_table, seq_lens, page_size, scale, reduce});
  fill_scores_out(c, p, best_of_page ? p.max_pages : p.max_pages * page_size,
                  best_of_page ? "the width of page_table" : "the width of page_table, in tokens", out);
  if (p.B == 0 || p.Hq == 0 || p.n == 0) return;
  if (c.on_cpu()) {
    const PageTable table = page_table_of(p);
    check_lengths(c, table);
    for (int64_t b = 0; b < p.B; ++b) check_entries(c, table, b, 0, table.pages_of(p.seq_lens[b]));
  }
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::score_tokens_workspace(p, exec));
    p.workspace = workspace.data();
    backend::score_tokens(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "score_tokens(Tensor q, Tensor[] tensors, int[] formats, SymInt page_size, Tensor? centre, Tensor? balance, "
      "Tensor? order, "
      "Tensor? channels, int bits, Tensor page_table, Tensor seq_lens, float scale, int reduce, bool best_of_page, "
      "Tensor(a!) out) -> ()");
}
KK_REGISTER(score_tokens)
