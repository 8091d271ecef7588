// quant_attention: schema, and a list of pools.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind/attention.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

void quant_attention(const Tensor& q_arg, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                     int64_t page_size, const Tensor& page_table, const Tensor& seq_lens,
                     const std::optional<std::vector<Tensor>>& transform, double scale, int64_t window_left,
                     double softcap, const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
                     int64_t split_tokens, const std::optional<Tensor>& tree_mask,
                     const std::optional<Tensor>& head_windows, const std::optional<std::vector<Tensor>>& extra,
                     const std::optional<std::vector<int64_t>>& head_map,
                     const std::optional<std::vector<Tensor>>& plan, const Tensor& out,
                     const std::optional<Tensor>& lse) {
  Check c("quant_attention");
  AttentionParams p{};
  const Queries q = check_queries(c, q_arg);
  q.fill(p);

  std::optional<Tensor> basis[3];  // centre, balance, order
  if (transform) {
    if (transform->size() > 3)
      c.refuse("transform must be (centre, balance, order), got ", transform->size(), " tensors");
    std::copy(transform->begin(), transform->end(), basis);
  }
  fill_pools(c, p, q, pools, formats, page_size, {basis[0], basis[1], basis[2]}, head_map.has_value());
  attend(
      c, p, q, {"page_table", nullptr, nullptr}, page_table, seq_lens,
      {scale, window_left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, plan},
      out, lse);
}

void quant_attention_plain(const Tensor& q, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                           int64_t page_size, const Tensor& page_table, const Tensor& seq_lens,
                           const std::optional<std::vector<Tensor>>& transform, double scale, const Tensor& out) {
  quant_attention(q, pools, formats, page_size, page_table, seq_lens, transform, scale, -1, 0.0, {}, {}, 0, {}, {}, {},
                  {}, {}, out, {});
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "quant_attention(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor seq_lens, "
      "Tensor[]? transform, " KK_ATTENTION_OPTIONS ", Tensor[]? plan, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  // Without options: torch takes 0.1 us for each argument of a call, given or not.
  m.def(
      "quant_attention.plain(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor "
      "seq_lens, Tensor[]? transform, float scale, Tensor(a!) out) -> ()");
}
KK_REGISTER(quant_attention)
KK_REGISTER_AS("quant_attention.plain", quant_attention_plain)
