// quant_attention: schema, checks, workspace.
#include "kvkernels/ops/attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

// Lengths and page ids of a CPU call are visible, so a bad one is an error and not a read outside the pool. One compare per
// page, against all its tokens. Pages before a sliding window are not looked at; the caller may have freed them.
void check_pages(const Check& c, const AttentionParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t len = p.seq_lens[b];
    if (len < 0) c.refuse("seq_lens[", b, "] = ", len, " is negative");
    const int64_t end = (len + p.page_size - 1) / p.page_size;
    if (end > p.max_pages)
      c.refuse("page_table is too narrow: seq_lens[", b, "] = ", len, " needs ", end, " pages of ", p.page_size,
               " tokens, but page_table.size(1) = ", p.max_pages);
    const int64_t first = p.window_left < 0 ? 0 : std::max<int64_t>(0, len - p.Tq - p.window_left) / p.page_size;
    const int32_t* row = p.page_table + b * p.table_stride;
    for (int64_t i = first; i < end; ++i) {
      const int32_t entry = row[i];
      const int64_t pool = entry >> 28, page = entry & kPageMask;
      if (entry < 0 || pool >= p.num_pools)
        c.refuse("page_table[", b, ", ", i, "] = ", entry, " means pool ", pool, ", but there are ", p.num_pools);
      if (page >= p.pools[pool].num_pages)
        c.refuse("page_table[", b, ", ", i, "] means page ", page, " of pool ", pool, ", which has ",
                 p.pools[pool].num_pages, " pages");
    }
  }
}

void quant_attention(const Tensor& q_arg, const std::vector<Tensor>& pools, const std::vector<int64_t>& formats,
                     int64_t page_size, const Tensor& page_table_arg, const Tensor& seq_lens_arg,
                     const std::optional<Tensor>& centre, const std::optional<Tensor>& balance, double scale,
                     int64_t window_left, double softcap, const std::optional<Tensor>& sinks_arg,
                     const std::optional<Tensor>& alibi_arg, int64_t split_tokens, const Tensor& out_arg,
                     const std::optional<Tensor>& lse_arg) {
  Check c("quant_attention");
  const bool several = q_arg.dim() == 4;
  if (!several && q_arg.dim() != 3) {
    const View q = view("q", q_arg);
    c.refuse("q must be [B, Hq, D] or [B, Tq, Hq, D], got ", shape_text(q.size, q.dim));
  }
  const char* const q_shape = several ? "B Tq Hq D" : "B Hq D";
  const View q = c.is("q", q_arg, kFloats, q_shape);
  AttentionParams p{};
  p.B = q.size[0];
  p.Tq = several ? q.size[1] : 1;
  p.Hq = q.size[q.dim - 2];
  p.D = q.size[q.dim - 1];
  if (p.Tq < 1 || p.Tq > 16) c.refuse("q must have 1 to 16 tokens per sequence, got Tq = ", p.Tq, " from q.size(1)");

  if (formats.empty()) c.refuse("kv needs at least one pool");
  if (formats.size() > kMaxPools)
    c.refuse("kv has ", formats.size(), " pools, but a page table tells at most ", kMaxPools, " apart");
  size_t used = 0;
  for (size_t i = 0; i < formats.size(); ++i) {
    const PoolNames& names = kPoolNames[i];
    const FormatCode f = format_code(c, names.record, formats[i]);
    check_geometry(c, names.record, f, page_size, p.D, several ? "q.size(3)" : "q.size(2)");
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
  if (p.Hkv < 1 || p.Hq % p.Hkv)
    c.refuse("Hq must be a multiple of Hkv; Hq = ", p.Hq, " from q.size(", q.dim - 2, "), Hkv = ", p.Hkv,
             " from pool 0");

  const View page_table = c.is("page_table", page_table_arg, kI32, "B ?max_pages");
  const View seq_lens = c.is("seq_lens", seq_lens_arg, kI32, "B");
  p.transform = make_transform(c, centre, balance);
  const View sinks = c.is("sinks", sinks_arg, kF32, "Hq");
  if (alibi_arg) {
    const View alibi = c.is("alibi_slopes", *alibi_arg, kF32, alibi_arg->dim() == 1 ? "Hq" : "B Hq");
    p.alibi_slopes = alibi.data<float>();
    p.alibi_stride = alibi.dim == 1 ? 0 : alibi.stride[0];
  }
  const View out = c.is("out", out_arg, kFloats, q_shape);
  c.same_dtype(out, q);
  c.writable(out);
  if (lse_arg) {
    const View lse = c.is("lse", *lse_arg, kF32, several ? "B Tq Hq" : "B Hq");
    c.contiguous(lse);
    c.writable(lse);
    p.lse = lse.mutable_data<float>();
  }
  if (split_tokens < 0 || split_tokens % 16)
    c.refuse("split_tokens must be a positive multiple of 16 (or None), got ", split_tokens);
  if (!(softcap >= 0.0)) c.refuse("softcap must be positive, or 0 for none; got ", softcap);
  if (std::isnan(scale)) c.refuse("scale is NaN");
  if (p.B == 0 || p.Hq == 0) return;

  p.q = q.data();
  p.q_batch = q.stride[0], p.q_token = several ? q.stride[1] : 0, p.q_head = q.stride[q.dim - 2];
  p.out = out.mutable_data();
  p.out_batch = out.stride[0], p.out_token = several ? out.stride[1] : 0, p.out_head = out.stride[q.dim - 2];
  p.dtype = dtype_of(q);
  p.page_table = page_table.data<int32_t>();
  p.max_pages = page_table.size[1];
  p.table_stride = page_table.stride[0];
  p.seq_lens = seq_lens.data<int32_t>();
  p.scale = static_cast<float>(scale);
  p.window_left = window_left;
  p.softcap = static_cast<float>(softcap);
  if (sinks) p.sinks = sinks.data<float>();
  p.split_tokens = split_tokens;
  if (c.on_cpu()) check_pages(c, p);

  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::attention_workspace(p, exec));
    p.workspace = workspace.data();
    backend::attention(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "quant_attention(Tensor q, Tensor[] pools, int[] formats, SymInt page_size, Tensor page_table, Tensor seq_lens, "
      "Tensor? centre, Tensor? balance, float scale, SymInt window_left, float softcap, Tensor? sinks, Tensor? "
      "alibi_slopes, "
      "SymInt split_tokens, Tensor(a!) out, Tensor(b!)? lse) -> ()");
}
KK_REGISTER(quant_attention)
