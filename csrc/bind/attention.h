// What the attention ops have in common: everything but where K and V lie.
//
//   Check c("op");
//   AttentionParams p{};
//   const Queries q = check_queries(c, q_arg);  // binds B Tq Hq D
//   q.fill(p);
//   ... pools, page_size, Hkv, k_share, v_share, Dv, transform; binds Dv, and Hkv where K and V have as many heads ...
//   attend(c, p, q, names, page_table, seq_lens, options, out, lse);
#pragma once
#include <vector>

#include "bind/check.h"
#include "bind/page_table.h"
#include "bind/pool.h"
#include "bind/queries.h"
#include "kvkernels/ops/attention.h"

namespace kk::bind {

// As they come from torch.
struct AttentionOptions {
  double scale;
  int64_t window_left;
  double softcap;
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& alibi_slopes;
  int64_t split_tokens;
  const std::optional<Tensor>& tree_mask;
  const std::optional<Tensor>& head_windows;
  const std::optional<std::vector<Tensor>>& extra;
  const std::optional<std::vector<int64_t>>& head_map;
  const std::optional<std::vector<Tensor>>& plan;
};
// Their part of a schema, but for plan.
#define KK_ATTENTION_OPTIONS                                                                                           \
  "float scale, SymInt window_left, float softcap, Tensor? sinks, Tensor? alibi_slopes, SymInt split_tokens, Tensor? " \
  "tree_mask, Tensor? head_windows, Tensor[]? extra, int[]? head_map"

// K and V in the pools of a PagedKV: all that has to be known before attend. With a head map Hq may be any.
void fill_pools(Check& c, AttentionParams& p, const Queries& q, const std::vector<Tensor>& pools,
                const std::vector<int64_t>& formats, int64_t page_size, const TransformArguments& transform,
                bool mapped, Offloaded offloaded = Offloaded::refused);

// Checks the rest, fills it in and runs.
void attend(Check& c, AttentionParams& p, const Queries& q, const PageNames& names, const Tensor& page_table,
            const Tensor& seq_lens, const AttentionOptions& options, const Tensor& out,
            const std::optional<Tensor>& lse);

}  // namespace kk::bind
