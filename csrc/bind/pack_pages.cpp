// pack_pages: schema, checks.
#include "kvkernels/ops/pack_pages.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bind/check.h"
#include "bind/exec.h"
#include "bind/pool.h"

namespace kk::bind {
namespace {

constexpr PoolNames kSrc{"src", "k_cache of src", "v_cache of src"};
constexpr PoolNames kDst{"dst", "k_cache of dst", "v_cache of dst"};

// Threads take the pairs in any order, so a page that is written belongs to one pair, and is not read.
void check_written_pages(const Check& c, const PackPagesParams& p) {
  std::vector<std::pair<int32_t, int64_t>> used;  // page, its place in pairs: at an odd one it is written
  used.reserve(static_cast<size_t>(2 * p.N));
  for (int64_t i = 0; i < p.N; ++i) {
    if (p.pairs[2 * i] < 0 || p.pairs[2 * i + 1] < 0) continue;
    if (p.src.k == p.dst.k) used.emplace_back(p.pairs[2 * i], 2 * i);
    used.emplace_back(p.pairs[2 * i + 1], 2 * i + 1);
  }
  std::sort(used.begin(), used.end());
  for (size_t i = 1; i < used.size(); ++i) {
    const auto [page, at] = used[i - 1];
    const auto [next, next_at] = used[i];
    if (page == next && (at % 2 || next_at % 2))
      c.refuse("pairs[", at / 2, ", ", at % 2, "] and pairs[", next_at / 2, ", ", next_at % 2, "] are both page ", page,
               " of dst, but a page that is written belongs to one pair, and is not read");
  }
}

// Pages of a CPU call are visible, so a bad one is an error and not a write outside the pool.
void check_pairs(const Check& c, const PackPagesParams& p) {
  for (int64_t i = 0; i < p.N; ++i) {
    const int32_t s = p.pairs[2 * i], d = p.pairs[2 * i + 1];
    if (s < 0 || d < 0) continue;
    if (s >= p.src.num_pages) c.refuse("pairs[", i, ", 0] = ", s, ", but src has ", p.src.num_pages, " pages");
    if (d >= p.dst.num_pages) c.refuse("pairs[", i, ", 1] = ", d, ", but dst has ", p.dst.num_pages, " pages");
  }
  check_written_pages(c, p);
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
