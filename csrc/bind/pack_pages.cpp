// pack_pages: schema, checks.
#include "kvkernels/ops/pack_pages.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

constexpr PoolNames kSrc{"src", "k_cache of src", "v_cache of src"};
constexpr PoolNames kDst{"dst", "k_cache of dst", "v_cache of dst"};

// Pages of a CPU call are visible, so a bad one is an error and not a write outside the pool.
void check_pairs(const Check& c, const PackPagesParams& p) {
  for (int64_t i = 0; i < p.N; ++i) {
    const int32_t s = p.pairs[2 * i], d = p.pairs[2 * i + 1];
    if (s < 0 || d < 0) continue;
    if (s >= p.src.num_pages) c.refuse("pairs[", i, ", 0] = ", s, ", but src has ", p.src.num_pages, " pages");
    if (d >= p.dst.num_pages) c.refuse("pairs[", i, ", 1] = ", d, ", but dst has ", p.dst.num_pages, " pages");
  }
}

void pack_pages(const Tensor& src, const std::optional<Tensor>& src_v, int64_t src_format, const Tensor& dst,
                const std::optional<Tensor>& dst_v, int64_t dst_format, int64_t page_size, int64_t head_dim,
                const Tensor& pairs_arg, const std::optional<Tensor>& centre, const std::optional<Tensor>& balance,
                const std::optional<Tensor>& order) {
  Check c("pack_pages");
  c.bind("D", head_dim, "head_dim");
  const FormatCode fs = format_code(c, kSrc.record, src_format), fd = format_code(c, kDst.record, dst_format);
  check_geometry(c, kSrc.record, fs, page_size, head_dim, "head_dim");
  check_geometry(c, kDst.record, fd, page_size, head_dim, "head_dim");
  PackPagesParams p{};
  p.src = make_pool(c, kSrc, fs, src, src_v ? &*src_v : nullptr, page_size, head_dim);
  p.dst = make_writable_pool(c, kDst, fd, dst, dst_v ? &*dst_v : nullptr, page_size, head_dim);
  const View pairs = c.is("pairs", pairs_arg, kI32, "N 2");
  c.contiguous(pairs);
  p.transform = make_transform(c, {centre, balance, order});

  p.pairs = pairs.data<int32_t>();
  p.N = pairs.size[0];
  p.Hkv = src.size(1);
  p.D = head_dim;
  p.page_size = page_size;
  if (c.on_cpu()) check_pairs(c, p);
  if (p.N > 0 && p.Hkv > 0) on_device(c, [&](const auto& exec) { backend::pack_pages(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "pack_pages(Tensor src, Tensor? src_v, int src_format, Tensor(a!) dst, Tensor(b!)? dst_v, int dst_format, "
      "SymInt page_size, SymInt head_dim, Tensor pairs, Tensor? centre, Tensor? balance, Tensor? order) -> ()");
}
KK_REGISTER(pack_pages)
