#include "bind/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bind/exec.h"
#include "bind/pool.h"
#include "bind/selection.h"

namespace kk::bind {
namespace {

void check_head_windows(const Check& c, const AttentionParams& p) {
  for (int64_t g = 0; g < p.Hkv; ++g)
    if (p.head_windows[2 * g] < 0)
      c.refuse("head_windows[", g, ", 0] = ", p.head_windows[2 * g], " is a negative number of sink tokens");
}

// What no head sees is not looked at; the caller may have freed it: pages before a window, and between the sinks and the
// windows of the heads.
void check_seen_pages(const Check& c, const AttentionParams& p, const PageTable& table) {
  int64_t sink = 0, window = p.window_left;
  for (int64_t g = 0; p.head_windows && g < p.Hkv; ++g) {
    const int32_t *own = p.head_windows + 2 * g, own_sink = own[0], own_window = own[1];
    sink = std::max<int64_t>(sink, own_sink);
    window = g == 0 ? own_window : window < 0 || own_window < 0 ? -1 : std::max<int64_t>(window, own_window);
  }
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t len = p.seq_lens[b], end = table.pages_of(len);
    const int64_t first = window < 0 ? 0 : std::max<int64_t>(0, len - p.Tq - window) / p.page_size;
    check_entries(c, table, b, 0, std::min(first, table.pages_of(std::min(sink, len))));
    check_entries(c, table, b, first, end);
  }
}

void check_tree(const Check& c, const AttentionParams& p) {
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t i = std::max<int64_t>(0, p.Tq - p.seq_lens[b]); i < p.Tq; ++i) {
      const uint32_t bits = static_cast<uint32_t>(p.tree_mask[b * p.tree_stride + i]);
      if (bits >> p.Tq)
        c.refuse("tree_mask[", b, ", ", i, "] = ", bits, " has bits beyond those of the Tq = ", p.Tq, " tokens");
      if (bits >> i >> 1)
        c.refuse("tree_mask[", b, ", ", i, "] = ", bits, " has bits above ", i,
                 ": a token's ancestors stand before it");
      if (!(bits >> i & 1)) c.refuse("tree_mask[", b, ", ", i, "] = ", bits, " lacks bit ", i, ": a token sees itself");
    }
}

// The nodes hold every token of every sequence once, and those that share one have its pages in common.
void check_plan(const Check& c, const AttentionParams& p, const PageTable& table) {
  const SharingPlan& plan = p.plan;
  std::vector<int32_t> place(static_cast<size_t>(p.B), -1);  // in order
  for (int64_t i = 0; i < p.B; ++i) {
    const int32_t b = plan.order[i];
    if (b < 0 || b >= p.B || place[static_cast<size_t>(b)] >= 0)
      c.refuse("plan.order[", i, "] = ", b, ", but order holds every number below B = ", p.B, " once");
    place[static_cast<size_t>(b)] = static_cast<int32_t>(i);
  }
  for (int64_t i = 0; i < plan.num_nodes; ++i) {
    const PlanNode& n = plan.nodes[i];
    if (n.first == n.last) continue;
    const auto bad = [&](const char* why) {
      c.refuse("plan.nodes[", i, "] = (", n.first, ", ", n.last, ", ", n.begin, ", ", n.end, ", ", n.parent, ") ", why);
    };
    if (n.first < 0 || n.last < n.first || n.last > p.B) bad("is no range of sequences");
    if (n.begin < 0 || n.end <= n.begin || n.begin % p.page_size) bad("is no range of tokens that begins with a page");
    if (n.parent < -1 || n.parent >= i) bad("stands before its parent");
    const PlanNode* parent = n.parent < 0 ? nullptr : &plan.nodes[n.parent];
    if (parent ? n.first < parent->first || n.last > parent->last || n.begin != parent->end : n.begin != 0)
      bad("does not continue its parent");
    const bool shared = n.last - n.first > 1;
    if (shared && n.end % p.page_size) bad("is shared, but does not end with a page");
    const int64_t first_page = n.begin / p.page_size, end_page = table.pages_of(n.end), leader = plan.order[n.first];
    for (int32_t s = n.first; s < n.last; ++s) {
      const int32_t b = plan.order[s];
      const int64_t len = p.seq_lens[b];
      if (n.end > (shared ? len - p.Tq : len))
        c.refuse("plan.nodes[", i, "] holds tokens up to ", n.end, ", but seq_lens[", b, "] = ", len,
                 shared ? ", and the queries' own tokens are not shared" : "",
                 "; was the plan made from these lengths, with num_queries = ", p.Tq, "?");
      if (s == n.first) {
        check_entries(c, table, b, first_page, end_page);
      } else if (std::memcmp(p.page_table + b * p.table_stride + first_page,
                             p.page_table + leader * p.table_stride + first_page,
                             static_cast<size_t>(end_page - first_page) * sizeof(int32_t)) != 0) {
        c.refuse("plan.nodes[", i, "] is shared by sequences ", leader, " and ", b, ", but their rows of ",
                 table.names.table, " differ within tokens ", n.begin, " to ", n.end,
                 "; was the plan made from this table?");
      }
    }
  }
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t leaf = plan.leaf[b], at = place[static_cast<size_t>(b)];
    if (leaf < 0 ? p.seq_lens[b] == 0 : p.seq_lens[b] > 0 && leaf < plan.num_nodes) {
      if (leaf < 0) continue;
      const PlanNode& n = plan.nodes[leaf];
      int depth = 1;
      for (int32_t up = n.parent; up >= 0; up = plan.nodes[up].parent) ++depth;
      if (depth > kMaxPlanDepth)
        c.refuse("plan.leaf[", b, "] = ", leaf, " has ", depth - 1, " nodes above it, but a plan has at most ",
                 kMaxPlanDepth, " on one another");
      if (n.first <= at && at < n.last && n.end == p.seq_lens[b]) continue;
    }
    c.refuse("plan.leaf[", b, "] = ", leaf, " is not the node with the end of the sequence; seq_lens[", b,
             "] = ", p.seq_lens[b]);
  }
}

void fill_head_map(const Check& c, AttentionParams& p, const Queries& q, const std::vector<int64_t>& map) {
  const int64_t groups = p.Hkv;
  if (p.Hq > kMaxMappedHeads) c.refuse("head_map takes at most ", kMaxMappedHeads, " query heads, got Hq = ", p.Hq);
  if (static_cast<int64_t>(map.size()) != p.Hq)
    c.refuse("head_map must have Hq entries, got ", map.size(), "; Hq = ", p.Hq, " from q.size(", q.view.dim - 2, ")");
  // The first group of kMaxMappedHeads + 1 would have no place; without query heads it has no purpose either.
  if (groups > kMaxMappedHeads) c.refuse("head_map takes at most ", kMaxMappedHeads, " KV heads, got ", groups);
  HeadMap& heads = p.heads;
  heads.mapped = true;
  for (const int64_t group : map)
    if (group < 0 || group >= groups)
      c.refuse("head_map holds ", group, ", but there are ", groups, " KV heads, 0 to ", groups - 1);
  int16_t placed = 0;
  for (int64_t g = 0; g < groups; ++g) {
    heads.first[g] = placed;
    for (int64_t h = 0; h < p.Hq; ++h)
      if (map[static_cast<size_t>(h)] == g) heads.order[placed++] = static_cast<uint8_t>(h);
  }
  heads.first[groups] = placed;
}

// [B, ...] or [1, ...]; the stride from one sequence to the next is then 0.
View per_sequence(Check& c, const AttentionParams& p, const char* name, const Tensor& t, unsigned dtypes,
                  const char* shape, const char* shape_of_one, int64_t* stride) {
  const bool one = t.dim() > 0 && p.B != 1 && t.size(0) == 1;
  const View v = c.is(name, t, dtypes, one ? shape_of_one : shape);
  *stride = one ? 0 : v.stride[0];
  return v;
}

void fill_extra(Check& c, AttentionParams& p, const Queries& q, const AttentionOptions& o) {
  if (!o.extra) return;
  const std::vector<Tensor>& parts = *o.extra;
  if (parts.size() != 3) c.refuse("extra must be (k, v, bias), got ", parts.size(), " tensors");
  ExtraToken& e = p.extra;
  const View k = per_sequence(c, p, "extra k", parts[0], kFloats, "B Hkv D", "1 Hkv D", &e.k_batch);
  const View v = per_sequence(c, p, "extra v", parts[1], kFloats, "B Hkv Dv", "1 Hkv Dv", &e.v_batch);
  const View bias = per_sequence(c, p, "extra bias", parts[2], kF32, "B Hkv", "1 Hkv", &e.bias_batch);
  c.same_dtype(k, q.view);
  c.same_dtype(v, q.view);
  e.k = k.data();
  e.v = v.data();
  e.bias = bias.data<float>();
  e.k_head = k.stride[1];
  e.v_head = v.stride[1];
  e.bias_head = bias.stride[1];
}

void fill_plan(Check& c, AttentionParams& p, const AttentionOptions& o) {
  if (!o.plan) return;
  const std::vector<Tensor>& parts = *o.plan;
  if (parts.size() != 3) c.refuse("plan must be (nodes, order, leaf), got ", parts.size(), " tensors");
  const char* other = p.window_left >= 0   ? "window"
                      : p.head_windows     ? "head_windows"
                      : p.split_tokens > 0 ? "split_tokens"
                                           : nullptr;
  if (other) c.refuse("plan cannot go together with ", other);
  const View nodes = c.is("plan.nodes", parts[0], kI32, "?nodes 5");
  if (nodes.size[0] != 2 * p.B)
    c.refuse("plan.nodes must be [2 B, 5], got ", shape_text(nodes.size, 2), "; B = ", p.B, " from q.size(0)");
  c.contiguous(nodes);
  static_assert(sizeof(PlanNode) == 5 * sizeof(int32_t));
  p.plan.nodes = nodes.data<PlanNode>();
  p.plan.order = c.is("plan.order", parts[1], kI32, "B").data<int32_t>();
  p.plan.leaf = c.is("plan.leaf", parts[2], kI32, "B").data<int32_t>();
  p.plan.num_nodes = nodes.size[0];
}

// Refusals of the kernels come as "attention: ..." and speak of pools.
[[noreturn]] void refuse_as_kernel(const Check& c, const PageNames& names, std::string message) {
  const auto replace = [&](const char* what, const char* by) {
    const size_t at = message.find(what);
    if (at != std::string::npos) message.replace(at, std::strlen(what), by);
  };
  replace("attention: ", "");
  if (names.cache)
    replace("pool 0, keys", "k_cache"), replace("pool 0, values", "v_cache"), replace("pool 0", "a cache");
  c.refuse(message);
}

}  // namespace

void fill_pools(Check& c, AttentionParams& p, const Queries& q, const std::vector<Tensor>& pools,
                const std::vector<int64_t>& formats, int64_t page_size, const TransformArguments& transform,
                bool mapped, Offloaded offloaded) {
  p.num_pools = make_pools(c, pools, formats, page_size, p.D, q.D_from(), p.pools, offloaded);
  p.page_size = page_size;
  p.Hkv = pools[0].size(1);
  p.k_share = p.v_share = 1;
  p.Dv = p.D;
  c.bind("Dv", p.Dv, "D");
  if (!mapped) check_heads(c, q, p.Hkv, "Hkv", "pool 0");
  p.transform = make_transform(c, transform);
}

void attend(Check& c, AttentionParams& p, const Queries& q, const PageNames& names, const Tensor& page_table_arg,
            const Tensor& seq_lens_arg, const AttentionOptions& o, const Tensor& out_arg,
            const std::optional<Tensor>& lse_arg) {
  const View page_table = c.is(names.table, page_table_arg, kI32, "B ?max_pages");
  const View seq_lens = c.is("seq_lens", seq_lens_arg, kI32, "B");
  p.page_table = page_table.data<int32_t>();
  p.max_pages = page_table.size[1];
  p.table_stride = page_table.stride[0];
  p.seq_lens = seq_lens.data<int32_t>();

  p.scale = static_cast<float>(o.scale);
  p.window_left = o.window_left < 0 ? -1 : o.window_left;
  p.softcap = static_cast<float>(o.softcap);
  p.split_tokens = o.split_tokens;
  if (o.sinks) p.sinks = c.is("sinks", *o.sinks, kF32, "Hq").data<float>();
  if (o.alibi_slopes) {
    const View alibi = c.is("alibi_slopes", *o.alibi_slopes, kF32, o.alibi_slopes->dim() == 1 ? "Hq" : "B Hq");
    p.alibi_slopes = alibi.data<float>();
    p.alibi_stride = alibi.dim == 1 ? 0 : alibi.stride[0];
  }
  if (o.tree_mask) {
    if (!q.several) c.bind("Tq", 1, "q being [B, Hq, D]");
    const View tree = c.is("tree_mask", *o.tree_mask, kI32, "B Tq");
    p.tree_mask = tree.data<int32_t>();
    p.tree_stride = tree.stride[0];
  }
  if (p.k_share != p.v_share && (o.head_windows || o.extra || o.head_map))
    c.refuse(o.head_windows ? "head_windows"
             : o.extra      ? "extra"
                            : "head_map",
             " needs as many heads of K as of V; there are ", p.Hkv / p.k_share, " and ", p.Hkv / p.v_share);
  if (o.head_windows) {
    const View windows = c.is("head_windows", *o.head_windows, kI32, "Hkv 2");
    c.contiguous(windows);
    if (p.window_left >= 0) c.refuse("head_windows cannot go together with window");
    p.head_windows = windows.data<int32_t>();
  }
  fill_extra(c, p, q, o);
  if (o.head_map) fill_head_map(c, p, q, *o.head_map);
  fill_plan(c, p, o);

  const View out = c.is("out", out_arg, kFloats,
                        p.Dv == p.D ? (q.several ? "B Tq Hq D" : "B Hq D") : (q.several ? "B Tq Hq Dv" : "B Hq Dv"));
  c.same_dtype(out, q.view);
  c.writable(out);
  p.out = out.mutable_data();
  p.out_batch = out.stride[0], p.out_token = q.several ? out.stride[1] : 0, p.out_head = out.stride[out.dim - 2];
  if (lse_arg) {
    const View lse = c.is("lse", *lse_arg, kF32, q.several ? "B Tq Hq" : "B Hq");
    c.contiguous(lse);
    c.writable(lse);
    p.lse = lse.mutable_data<float>();
  }
  if (p.split_tokens < 0 || p.split_tokens % 16)
    c.refuse("split_tokens must be a positive multiple of 16 (or None), got ", p.split_tokens);
  if (!(p.softcap >= 0.0f && std::isfinite(p.softcap)))
    c.refuse("softcap must be positive and finite, or 0 for none; got ", o.softcap);
  if (std::isnan(o.scale)) c.refuse("scale is NaN");
  if (p.B == 0 || p.Hq == 0) return;

  if (c.on_cpu()) {
    PageTable table = page_table_of(p, names);
    if (p.selection.entries) table.max_pages = kAnyWidth;
    check_lengths(c, table);
    if (p.head_windows) check_head_windows(c, p);
    if (p.plan.nodes)
      check_plan(c, p, table);
    else if (p.selection.index)
      check_selection(c, p, table);
    else
      check_seen_pages(c, p, table);
    if (p.tree_mask) check_tree(c, p);
  }
  on_device(c, [&](const auto& exec) {
    try {
      const Workspace workspace(c, backend::attention_workspace(p, exec));
      p.workspace = workspace.data();
      backend::attention(p, exec);
    } catch (const std::invalid_argument& e) {
      refuse_as_kernel(c, names, e.what());
    }
  });
}

}  // namespace kk::bind
