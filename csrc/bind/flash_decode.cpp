// flash_decode: schema, and two 16-bit caches as a pool.
#include <torch/csrc/stable/library.h>

#include <numeric>

#include "bind/attention.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

Format format_of(const View& cache) { return cache.dtype == kBF16 ? Format::bf16 : Format::f16; }

void flash_decode(const Tensor& q_arg, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                  const Tensor& seq_lens, double scale, int64_t window_left, double softcap,
                  const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes, int64_t split_tokens,
                  const std::optional<Tensor>& tree_mask, const std::optional<Tensor>& head_windows,
                  const std::optional<std::vector<Tensor>>& extra, const std::optional<std::vector<int64_t>>& head_map,
                  const std::optional<std::vector<Tensor>>& plan, const Tensor& out, const std::optional<Tensor>& lse) {
  Check c("flash_decode");
  AttentionParams p{};
  const Queries q = check_queries(c, q_arg);
  q.fill(p);
  const View k = c.is("k_cache", k_cache, kF16 | kBF16, "num_blocks page_size Hk D");
  p.page_size = k.size[1];
  if (p.page_size < 1) c.refuse("k_cache must have pages of at least 1 token, got ", shape_text(k.size, 4));
  p.Dv = p.D == 576 ? 512 : p.D;
  if (p.D != 576) check_head_dim(c, p.D, q.D_from(), " (or 576, with values of 512)");
  c.bind("Dv", p.Dv, p.D == 576 ? "D = 576" : "D");
  const View v = c.is("v_cache", v_cache, kF16 | kBF16, "num_blocks page_size Hv Dv");

  const int64_t Hk = k.size[2], Hv = v.size[2];
  if (!head_map || Hk != Hv) {
    check_heads(c, q, Hk, "Hk", "k_cache.size(2)");
    check_heads(c, q, Hv, "Hv", "v_cache.size(2)");
  }
  p.Hkv = std::lcm(Hk, Hv);
  p.k_share = Hk ? p.Hkv / Hk : 1;
  p.v_share = Hv ? p.Hkv / Hv : 1;
  c.bind("Hkv", Hk, "k_cache.size(2)");

  Pool& pool = p.pools[0];
  p.num_pools = 1;
  pool.k = const_cast<uint8_t*>(k.data<uint8_t>());
  pool.v = const_cast<uint8_t*>(v.data<uint8_t>());
  pool.k_page = k.stride[0] * 2, pool.k_token = k.stride[1] * 2, pool.k_head = k.stride[2] * 2;
  pool.v_page = v.stride[0] * 2, pool.v_token = v.stride[1] * 2, pool.v_head = v.stride[2] * 2;
  pool.num_pages = k.size[0];
  pool.k_format = format_of(k);
  pool.v_format = format_of(v);
  if (pool.num_pages > kPageMask + 1)
    c.refuse("k_cache has ", pool.num_pages, " blocks, but at most 2^28 are told apart");
  attend(
      c, p, q, {"block_table", "k_cache", nullptr}, block_table, seq_lens,
      {scale, window_left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, plan},
      out, lse);
}

void flash_decode_plain(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                        const Tensor& seq_lens, double scale, const Tensor& out) {
  flash_decode(q, k_cache, v_cache, block_table, seq_lens, scale, -1, 0.0, {}, {}, 0, {}, {}, {}, {}, {}, out, {});
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor "
      "seq_lens, " KK_ATTENTION_OPTIONS ", Tensor[]? plan, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  // As quant_attention.plain.
  m.def(
      "flash_decode.plain(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, float scale, "
      "Tensor(a!) out) -> ()");
}
KK_REGISTER(flash_decode)
KK_REGISTER_AS("flash_decode.plain", flash_decode_plain)
