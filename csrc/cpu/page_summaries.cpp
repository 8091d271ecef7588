// Bound by reading the keys once. One task: an interval of (sequence, run, KV head). 16-bit keys are read where they are,
// others pass through fp32 rows in L1.
#include "kvkernels/ops/page_summaries.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/rows.h"
#include "cpu/score_reduce.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

constexpr int64_t kBatch = 16;    // tokens at a time: 8 KB of fp32 at D 128
constexpr int64_t kMaxDim = 256;  // of any codec

inline F min_or_nan(F a, F b) {
  const auto smaller = min(a, b).v;  // b where either is NaN
  return a.v != a.v ? a.v : smaller;
}

inline F clamp(F x, float low, float high) { return min(max(x, F::fill(low)), F::fill(high)); }

// summary_code8 of x [n] and their scale.
void write_codes8(const float* x, int64_t n, Rounding rounding, uint8_t* codes, uint8_t* scale) {
  F most = F::zero();
  for (int64_t i = 0; i < n; i += F::W) most = max_or_nan(most, abs(F::load(x + i)));
  float lanes[F::W], top = 0.0f;
  most.store(lanes);
  for (const float lane : lanes) top = lane > top || lane != lane ? lane : top;
  const uint16_t step = summary_scale(top, 127.0f);
  store_u16(step, scale);
  const float s = bf16_to_float(step);
  if (!(s > 0.0f)) {
    memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; i += F::W) {
    const F c = F::load(x + i) / F::fill(s);
    const F whole = rounding == Rounding::up     ? F::zero() - floor(F::zero() - c)
                    : rounding == Rounding::down ? floor(c)
                                                 : rint(c);
    (clamp(whole, -127.0f, 127.0f) + F::fill(128.0f)).store_u8(codes + i);
  }
  for (int64_t i = 0; i < n; ++i) codes[i] ^= 0x80;  // from code + 128 to a signed byte
}

// Channel i of token c, as the vectors of rows.h.
inline float channel(const LoadBf16& keys, int64_t c, int64_t i) {
  return bf16_to_float(load_u16(keys.rows[c] + 2 * i));
}
inline float channel(const LoadF16& keys, int64_t c, int64_t i) { return f16_to_float(load_u16(keys.rows[c] + 2 * i)); }
inline float channel(const LoadF32& keys, int64_t c, int64_t i) { return keys.rows[c * keys.ld + i]; }

// The labels of a page. Lanes are tokens, as in the record.
struct LabelWriter {
  const SummaryLayout at;
  const int32_t* channels;
  uint8_t* record;

  void clear() const { memset(record, 0, static_cast<size_t>(summary_codes_bytes(at) + 2 * summary_scales(at))); }

  // Tokens [token, token + n), n <= kBatch; those behind them get what clear() wrote again.
  template <typename Keys>
  void write(int64_t token, int64_t n, const Keys& keys) const {
    alignas(64) float label[kBatch] = {}, scale[kBatch] = {};
    const auto load_labels = [&](int64_t j) {
      for (int64_t t = 0; t < n; ++t) label[t] = channel(keys, t, channels[j]);
    };
    for (int64_t j = 0; at.bits != 16 && j < at.channels; ++j) {
      load_labels(j);
      for (int64_t i = 0; i < kBatch; i += F::W)
        max_or_nan(F::load(scale + i), abs(F::load(label + i))).store(scale + i);
    }
    const int64_t left = at.page_size - token, m = left < kBatch ? left : kBatch;
    if (at.bits != 16)
      for (int64_t t = 0; t < m; ++t) {
        const uint16_t step = summary_scale(scale[t], at.bits == 8 ? 127.0f : 7.5f);
        store_u16(step, record + summary_codes_bytes(at) + 2 * (token + t));
        scale[t] = bf16_to_float(step);
      }
    for (int64_t j = 0; j < at.channels; ++j) {
      const int64_t first = j * at.page_size + token;
      load_labels(j);
      alignas(64) uint16_t half[kBatch];
      alignas(64) uint8_t code[kBatch];
      for (int64_t i = 0; i < kBatch; i += F::W) {
        const F x = F::load(label + i), s = F::load(scale + i);
        if (at.bits == 16) x.store_bf16(half + i);
        if (at.bits == 8) (where_positive(s, clamp(rint(x / s), -127.0f, 127.0f)) + F::fill(128.0f)).store_u8(code + i);
        if (at.bits == 4) where_positive(s, clamp(rint(x / s + F::fill(7.5f)), 0.0f, 15.0f)).store_u8(code + i);
      }
      if (at.bits == 16) memcpy(record + 2 * first, half, static_cast<size_t>(2 * m));
      if (at.bits == 8)
        for (int64_t t = 0; t < kBatch; ++t) record[first + t] = code[t] ^ 0x80;
      if (at.bits == 4)
        for (int64_t t = 0; t < kBatch; t += 2)
          record[(first + t) / 2] = static_cast<uint8_t>(code[t] | code[t + 1] << 4);
    }
  }
};

struct Summarizer {
  const PageSummariesParams& p;
  const int64_t record_bytes;
  PoolSide keys[kMaxPools];

  explicit Summarizer(const PageSummariesParams& params) : p(params), record_bytes(summary_bytes(p.layout)) {
    for (int i = 0; i < p.num_pools; ++i)
      keys[i] = PoolSide(p.pools[i], Side::K, p.transform, DType::f32, p.page_size, p.D);
  }

  int64_t len(int64_t b) const { return p.seq_lens[b] > 0 ? p.seq_lens[b] : 0; }
  int64_t start(int64_t b) const { return p.start && p.start[b] > 0 ? p.start[b] : 0; }
  // Runs [first_run, end_run) of a sequence; of segments, some may have to be left alone.
  int64_t first_run(int64_t b) const { return p.offsets ? 0 : start(b) < len(b) ? start(b) / p.page_size : end_run(b); }
  int64_t end_run(int64_t b) const {
    if (p.offsets) return p.num_segments;
    const int64_t pages = (len(b) + p.page_size - 1) / p.page_size;
    return pages < p.max_pages ? pages : p.max_pages;
  }
  int64_t runs() const {
    int64_t n = 0;
    for (int64_t b = 0; b < p.B; ++b) n += end_run(b) - first_run(b);
    return n;
  }

  int32_t entry(int64_t b, int64_t page) const {
    const int32_t e = p.page_table[b * p.table_stride + page];
#if defined(KK_DEBUG_ASSERT)
    if (e < 0 || e >> 28 >= p.num_pools || (e & kPageMask) >= p.pools[e >> 28].num_pages)
      fail("page_summaries: page_table holds a page past the end of its pool");
#endif
    return e;
  }

  void summarize(int64_t b, int64_t run, int64_t g) const {
    int64_t from = run * p.page_size, to = from + p.page_size < len(b) ? from + p.page_size : len(b);
    uint8_t* record;
    if (p.offsets) {
      from = p.offsets[b * p.offsets_stride + run];
      to = p.offsets[b * p.offsets_stride + run + 1];
      if (from >= to || to > len(b) || to <= start(b)) return;
      record = p.records[0] + ((b * p.num_segments + run) * p.Hkv + g) * record_bytes;
    } else {
      const int32_t e = entry(b, run);
      record = p.records[e >> 28] + ((e & kPageMask) * p.Hkv + g) * record_bytes;
    }
    if (p.layout.kind == SummaryKind::channels)
      labels(b, g, from, to, {p.layout, p.channels + g * p.layout.channels, record});
    else if (p.layout.kind == SummaryKind::minmax)
      minmax(b, g, from, to, record);
    else
      mean(b, g, from, to, record);
  }

  // f(keys, n) for the keys of tokens [from, to) in their order, n at a time: keys(c, i) as in rows.h.
  template <typename Fn>
  void for_keys(int64_t b, int64_t g, int64_t from, int64_t to, const Fn& f) const {
    while (from < to) {
      const int64_t page = from / p.page_size, end = (page + 1) * p.page_size < to ? (page + 1) * p.page_size : to;
      const int32_t e = entry(b, page);
      const PoolSide& side = keys[e >> 28];
      for (int64_t n = 0; from < end; from += n) {
        n = end - from < kBatch ? end - from : kBatch;
        alignas(64) float x[kBatch * kMaxDim];
        Row rows[kBatch];
        const uint8_t* plain[kBatch];
        for (int64_t i = 0; i < n; ++i) {
          uint8_t* row = reinterpret_cast<uint8_t*>(x + i * p.D);
          rows[i] = side.row(e & kPageMask, g, from + i - page * p.page_size, row);
          plain[i] = rows[i].side + rows[i].token * side.codec.token_stride;
        }
        const Format format = p.pools[e >> 28].k_format;
        if (format == Format::bf16) {
          f(LoadBf16{plain}, n);
        } else if (format == Format::f16) {
          f(LoadF16{plain}, n);
        } else {
          side.decode(rows, n);
          f(LoadF32{x, p.D}, n);
        }
      }
    }
  }

  // Asks for the 16-bit keys of a page. Decoding the others takes longer than their bytes do.
  void look_ahead(int64_t b, int64_t page, int64_t g) const {
    const int32_t e = entry(b, page);
    const Pool& pool = p.pools[e >> 28];
    if (pool.k_format != Format::bf16 && pool.k_format != Format::f16) return;
    const uint8_t* x = pool.k + (e & kPageMask) * pool.k_page + g * pool.k_head;
    const int64_t n = len(b) - page * p.page_size, most = 32;  // the rest of a page the processor fetches by itself
    for (int64_t t = 0; t < n && t < p.page_size && t < most; ++t, x += pool.k_token)
      for (int64_t i = 0; i < 2 * p.D; i += 64) __builtin_prefetch(x + i);
  }

  void minmax(int64_t b, int64_t g, int64_t from, int64_t to, uint8_t* record) const {
    const int64_t D = p.D;
    alignas(64) float top[kMaxDim], low[kMaxDim];
    for (int64_t i = 0; i < D; ++i) top[i] = -INFINITY, low[i] = INFINITY;
    for_keys(b, g, from, to, [&](const auto& keys, int64_t n) {
      for (int64_t i = 0; i < D; i += F::W) {
        F hi = F::load(top + i), lo = F::load(low + i);
        for (int64_t t = 0; t < n; ++t) {
          const F v = keys(static_cast<int>(t), i);
          hi = max_or_nan(hi, v);
          lo = min_or_nan(lo, v);
        }
        hi.store(top + i);
        lo.store(low + i);
      }
    });
    for (int64_t i = 0; i < D; ++i) top[i] += 0.0f, low[i] += 0.0f;  // of -0 and 0 either may be the larger one: 0
    if (p.layout.bits == 8) {
      write_codes8(top, D, Rounding::up, record, record + 2 * D);
      write_codes8(low, D, Rounding::down, record + D, record + 2 * D + 2);
      return;
    }
    uint16_t* out = reinterpret_cast<uint16_t*>(record);
    for (int64_t i = 0; i < D; ++i) out[i] = bf16_up(top[i]);
    for (int64_t i = 0; i < D; ++i) out[D + i] = bf16_down(low[i]);
  }

  void mean(int64_t b, int64_t g, int64_t from, int64_t to, uint8_t* record) const {
    const int64_t D = p.D;
    alignas(64) float sum[kMaxDim] = {};
    for_keys(b, g, from, to, [&](const auto& keys, int64_t n) {
      for (int64_t i = 0; i < D; i += F::W) {
        F s = F::load(sum + i);
        for (int64_t t = 0; t < n; ++t) s = s + keys(static_cast<int>(t), i);
        s.store(sum + i);
      }
    });
    const F n = F::fill(static_cast<float>(to - from));
    for (int64_t i = 0; i < D; i += F::W) (F::load(sum + i) / n).store(sum + i);
    if (p.layout.bits == 8) return write_codes8(sum, D, Rounding::nearest, record, record + D);
    for (int64_t i = 0; i < D; i += F::W) F::load(sum + i).store_bf16(reinterpret_cast<uint16_t*>(record) + i);
  }

  void labels(int64_t b, int64_t g, int64_t from, int64_t to, const LabelWriter& writer) const {
    writer.clear();
    int64_t token = 0;
    for_keys(b, g, from, to, [&](const auto& keys, int64_t n) {
      writer.write(token, n, keys);
      token += n;
    });
  }
};

}  // namespace

void page_summaries_cpu(const PageSummariesParams& p, const CpuExec& exec) {
  const Summarizer s(p);
  const int64_t rows_per_thread = 1024;  // about 20 us
  split(exec, s.runs() * p.Hkv, (rows_per_thread + p.page_size - 1) / p.page_size, [&](int64_t begin, int64_t end) {
    int64_t b = 0, run = begin / p.Hkv, g = begin % p.Hkv;
    for (; run >= s.end_run(b) - s.first_run(b); ++b) run -= s.end_run(b) - s.first_run(b);
    run += s.first_run(b);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t now_b = b, now_run = run, now_g = g;
      if (++g == p.Hkv) g = 0, ++run;
      while (b + 1 < p.B && run == s.end_run(b)) run = s.first_run(++b);
      if (i + 1 < end && !p.offsets) s.look_ahead(b, run, g);
      s.summarize(now_b, now_run, now_g);
    }
  });
}

KK_END

KK_CPU_ENTRY(page_summaries, PageSummariesParams)
