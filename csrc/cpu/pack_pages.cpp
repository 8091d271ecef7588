// One task: an interval of (pair, KV head). A row goes through fp32 in the user's basis and stays in L1 on the way.
#include "kvkernels/ops/pack_pages.h"

#include "cpu/entry.h"
#include "cpu/kivi2_rows.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

struct SidePair {
  PoolSide src, dst;
};

SidePair side_pair(const PackPagesParams& p, Side side) {
  return {PoolSide(p.src, side, p.transform, DType::f32, p.page_size, p.D),
          PoolSide(p.dst, side, p.transform, DType::f32, p.page_size, p.D)};
}

void pack_side(const SidePair& s, int64_t from, int64_t to, int64_t head) {
  constexpr int64_t batch = 16;
  const int64_t page_size = s.src.codec.page_size;
  if (!s.dst.codec.encode) {
    const auto load_token = [&](int64_t token, float* x) {
      const Row row = s.src.row(from, head, token, reinterpret_cast<uint8_t*>(x));
      s.src.decode(&row, 1);
    };
    one_of<64, 128, 256>("head_dim", s.src.codec.head_dim, [&](auto D) {
      Kivi2Keys<DType::f32, D.value>::encode_page(load_token, s.dst.row(to, head, 0, nullptr).side, page_size);
    });
    return;
  }
  for (int64_t token = 0; token < page_size; token += batch) {
    alignas(64) float x[batch][256];
    Row src[batch], dst[batch];
    const int64_t n = page_size - token < batch ? page_size - token : batch;
    for (int64_t i = 0; i < n; ++i) {
      uint8_t* row = reinterpret_cast<uint8_t*>(x[i]);
      src[i] = s.src.row(from, head, token + i, row);
      dst[i] = s.dst.row(to, head, token + i, row);
    }
    s.src.decode(src, n);
    s.dst.encode(dst, n, n);
  }
}

}  // namespace

void pack_pages_cpu(const PackPagesParams& p, const CpuExec& exec) {
  const SidePair k = side_pair(p, Side::K), v = side_pair(p, Side::V);
#if defined(KK_DEBUG_ASSERT)
  for (int64_t i = 0; i < p.N; ++i) {
    if (p.pairs[2 * i] < 0 || p.pairs[2 * i + 1] < 0) continue;
    if (p.pairs[2 * i] >= p.src.num_pages) fail("pack_pages: pairs holds a source page past the end of the pool");
    if (p.pairs[2 * i + 1] >= p.dst.num_pages)
      fail("pack_pages: pairs holds a destination page past the end of the pool");
  }
#endif
  const int64_t rows_per_thread = 256;  // about 20 us
  split(exec, p.N * p.Hkv, (rows_per_thread + 2 * p.page_size - 1) / (2 * p.page_size),
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int32_t from = p.pairs[i / p.Hkv * 2], to = p.pairs[i / p.Hkv * 2 + 1];
            if (from < 0 || to < 0) continue;
            pack_side(k, from, to, i % p.Hkv);
            pack_side(v, from, to, i % p.Hkv);
          }
        });
}

KK_END

KK_CPU_ENTRY(pack_pages, PackPagesParams)
