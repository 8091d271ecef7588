// One task: an interval of (pair, KV head). A row goes through fp32 in the user's basis and stays in L1 on the way.
#include "kvkernels/ops/pack_pages.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

struct SidePair {
  const uint8_t* src;
  uint8_t* dst;
  int64_t src_page, dst_page;
  Rows src_rows, dst_rows;  // of one head; the transform is that of head 0
  DecodeRows decode;
  EncodeRows encode;  // null: kivi2 keys
};

SidePair side_pair(const PackPagesParams& p, Side side) {
  const bool keys = side == Side::K;
  SidePair s{};
  s.src = keys ? p.src.k : p.src.v;
  s.dst = keys ? p.dst.k : p.dst.v;
  s.src_page = keys ? p.src.k_page : p.src.v_page;
  s.dst_page = keys ? p.dst.k_page : p.dst.v_page;
  s.src_rows = side_rows(p.src, side, p.transform, 1, 0, p.D, p.page_size);
  s.dst_rows = side_rows(p.dst, side, p.transform, 1, 0, p.D, p.page_size);
  const Format from = keys ? p.src.k_format : p.src.v_format, to = keys ? p.dst.k_format : p.dst.v_format;
  s.decode = decode_rows<DType::f32>(from, side, p.D);
  if (!(keys && to == Format::kivi2)) s.encode = encode_rows<DType::f32>(to, side, p.D);
  return s;
}

Rows of_head(Rows r, int64_t head) {
  if (r.transform.centre) r.transform.centre += head * r.head_dim;
  if (r.transform.balance) r.transform.balance += head * r.head_dim;
  return r;
}

void pack_side(const SidePair& s, int64_t from, int64_t to, int64_t head) {
  const Rows src_rows = of_head(s.src_rows, head), dst_rows = of_head(s.dst_rows, head);
  const uint8_t* src = s.src + from * s.src_page + head * src_rows.side_stride;
  uint8_t* dst = s.dst + to * s.dst_page + head * dst_rows.side_stride;
  const auto row = [&](int64_t token, float* x) { s.decode(src, token, reinterpret_cast<uint8_t*>(x), src_rows); };
  if (!s.encode) {
    one_of<64, 128, 256>("head_dim", src_rows.head_dim,
                         [&](auto D) { Kivi2Keys<DType::f32, D.value>::encode_page(row, dst, src_rows.page_size); });
    return;
  }
  for (int64_t token = 0; token < src_rows.page_size; ++token) {
    alignas(64) float x[256];
    row(token, x);
    s.encode(reinterpret_cast<const uint8_t*>(x), dst, token, dst_rows);
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
  const int64_t rows_per_thread = 128;  // about 20 us
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
