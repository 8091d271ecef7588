// quant_attention: schema, and a list of pools.
#include <torch/csrc/stable/library.h>

#include "bind/attention.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

void quant_attention(const Tensor& q_arg, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                     int64_t page_size, const Tensor& page_table, const Tensor& seq_lens,
                     const std::optional<Tensor>& centre, const std::optional<Tensor>& balance, double scale,
                     int64_t window_left, double softcap, const std::optional<Tensor>& sinks,
                     const std::optional<Tensor>& alibi_slopes, int64_t split_tokens,
                     const std::optional<Tensor>& tree_mask, const std::optional<Tensor>& head_windows,
                     const std::optional<std::vector<Tensor>>& extra,
                     const std::optional<std::vector<int64_t>>& head_map,
                     const std::optional<std::vector<Tensor>>& plan, const Tensor& out,
                     const std::optional<Tensor>& lse) {
  Check c("quant_attention");
  AttentionParams p{};
  const Queries q = check_queries(c, q_arg, p);

  if (formats.empty()) c.refuse("kv needs at least one pool");
  if (formats.size() > kMaxPools)
    c.refuse("kv has ", formats.size(), " pools, but a page table tells at most ", kMaxPools, " apart");
  size_t used = 0;
  for (size_t i = 0; i < formats.size(); ++i) {
    const PoolNames& names = kPoolNames[i];
    const FormatCode f = format_code(c, names.record, formats[i]);
    check_geometry(c, names.record, f, page_size, p.D, q.several ? "q.size(3)" : "q.size(2)");
    if (used + 1 + f.two_caches > pools.size())
      c.refuse("formats ask for more tensors than the ", pools.size(), " in pools");
    p.pools[i] = make_pool(c, names, f, pools[used], f.two_caches ? &pools[used + 1] : nullptr, page_size, p.D);
    used += 1 + f.two_caches;
  }
  if (used != pools.size()) c.refuse("formats ask for ", used, " tensors, but pools has ", pools.size());
  p.num_pools = static_cast<int>(formats.size());
  p.page_size = page_size;
  p.Hkv = pools[0].size(1);
  p.k_share = p.v_share = 1;
  p.Dv = p.D;
  c.bind("Dv", p.Dv, "D");
  if (!head_map) check_heads(c, q, p.Hkv, "Hkv", "pool 0");
  p.transform = make_transform(c, centre, balance);
  attend(
      c, p, q, {"page_table", nullptr}, page_table, seq_lens,
      {scale, window_left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, plan},
      out, lse);
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "quant_attention(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor seq_lens, "
      "Tensor? centre, Tensor? balance, " KK_ATTENTION_OPTIONS ", Tensor(a!) out, Tensor(b!)? lse) -> ()");
}
KK_REGISTER(quant_attention)
