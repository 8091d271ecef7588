// sparse_attention: schema, a list of pools, and lists of what is read of them.
#include <torch/csrc/stable/library.h>

#include "bind/attention.h"
#include "bind/exec.h"
#include "bind/pool.h"
#include "bind/selection.h"

namespace kk::bind {
namespace {

void sparse_attention(const Tensor& q_arg, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                      int64_t page_size, const Tensor& page_table, const Tensor& seq_lens,
                      const std::optional<Tensor>& pages, const std::optional<Tensor>& tokens,
                      const std::optional<Tensor>& entries, const std::optional<Tensor>& centre,
                      const std::optional<Tensor>& balance, const std::optional<Tensor>& order, double scale,
                      int64_t window_left, double softcap, const std::optional<Tensor>& sinks,
                      const std::optional<Tensor>& alibi_slopes, int64_t split_tokens,
                      const std::optional<Tensor>& tree_mask, const std::optional<Tensor>& head_windows,
                      const std::optional<std::vector<Tensor>>& extra,
                      const std::optional<std::vector<int64_t>>& head_map, const Tensor& out,
                      const std::optional<Tensor>& lse) {
  Check c("sparse_attention");
  AttentionParams p{};
  const Queries q = check_queries(c, q_arg);
  q.fill(p);
  fill_pools(c, p, q, pools, formats, page_size, {centre, balance, order}, head_map.has_value(),
             entries ? Offloaded::taken : Offloaded::refused);
  p.selection = make_selection(c, p, pages, tokens, entries);
  attend(c, p, q, {"page_table", nullptr, pages ? "pages" : "tokens"}, page_table, seq_lens,
         {scale, window_left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, {}},
         out, lse);
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "sparse_attention(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor seq_lens, "
      "Tensor? pages, Tensor? tokens, Tensor? entries, Tensor? centre, Tensor? balance, Tensor? "
      "order, " KK_ATTENTION_OPTIONS ", Tensor(a!) out, Tensor(b!)? lse) -> ()");
}
KK_REGISTER(sparse_attention)
