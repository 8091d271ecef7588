// quant_attention: schema, and a list of pools.
#include <torch/csrc/stable/library.h>

#include "bind/attention.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

void quant_attention(const Tensor& q_arg, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                     int64_t page_size, const Tensor& page_table, const Tensor& seq_lens,
                     const std::optional<Tensor>& centre, const std::optional<Tensor>& balance,
                     const std::optional<Tensor>& order, double scale, int64_t window_left, double softcap,
                     const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
                     int64_t split_tokens, const std::optional<Tensor>& tree_mask,
                     const std::optional<Tensor>& head_windows, const std::optional<std::vector<Tensor>>& extra,
                     const std::optional<std::vector<int64_t>>& head_map,
                     const std::optional<std::vector<Tensor>>& plan, const Tensor& out,
                     const std::optional<Tensor>& lse) {
  Check c("quant_attention");
  AttentionParams p{};
  const Queries q = check_queries(c, q_arg);
  q.fill(p);

  fill_pools(c, p, q, pools, formats, page_size, {centre, balance, order}, head_map.has_value());
  attend(
      c, p, q, {"page_table", nullptr, nullptr}, page_table, seq_lens,
      {scale, window_left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, plan},
      out, lse);
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "quant_attention(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor seq_lens, "
      "Tensor? centre, Tensor? balance, Tensor? order, " KK_ATTENTION_OPTIONS
      ", Tensor[]? plan, Tensor(a!) out, Tensor(b!)? lse) -> ()");
}
KK_REGISTER(quant_attention)
