// One task: an interval of rows. A row is read once: a sample of it tells a score that a few more than k items reach, those
// are taken aside, and a radix select runs over them only. A sample that tells too high a score costs time, not items.
#include "kvkernels/ops/select_pages.h"

#include "cpu/arena.h"
#include "cpu/entry.h"
#include "cpu/simd.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

constexpr int64_t kSample = 1024;
constexpr int kMaxDigit = 11;  // bits: 8 KB of counters

// Unsigned integers in the order of the scores: -0 is 0, and NaN is above everything.
constexpr uint32_t kNanKey = 0xffffffffu;
inline uint32_t key_of(uint32_t score) {
  if ((score & 0x7fffffffu) > 0x7f800000u) return kNanKey;
  if (score == 0x80000000u) score = 0;
  return score ^ (score & 0x80000000u ? 0xffffffffu : 0x80000000u);
}
inline float score_of(uint32_t key) { return bits_float(key ^ (key & 0x80000000u ? 0x80000000u : 0xffffffffu)); }

// Items with a key above `key`, and the first `equal` of those that have it.
struct Threshold {
  uint32_t key;
  int64_t equal;
};

// Bit i: score i of F::W is NaN or not below `least`. All bits, if `least` is NaN.
inline unsigned lanes_from(const float* x, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(
      _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(least), _CMP_NLT_UQ)));
#else
  unsigned lanes = 0;
  for (int i = 0; i < F::W; ++i) lanes |= static_cast<unsigned>(!(x[i] < least)) << i;
  return lanes;
#endif
}

struct Selector {
  uint32_t* key;   // of the candidates
  int32_t* item;   // ascending
  uint32_t* rest;  // keys that are still in question
  int32_t count[1 << kMaxDigit];

  Arena arena;

  Selector(Arena a, int64_t n) : arena(a) {
    key = arena.take<uint32_t>(n + F::W);
    item = arena.take<int32_t>(n + F::W);
    rest = arena.take<uint32_t>(n);
  }
  static int64_t bytes(int64_t n) { return Selector({nullptr}, n).arena.used; }

  // The `need` highest of n keys, need <= n. Digits divide the range that the keys have, not that of all floats: scores lie
  // close together.
  Threshold threshold(const uint32_t* keys, int64_t n, int64_t need) {
    for (;;) {
      uint32_t lo = kNanKey, hi = 0;
      for (int64_t i = 0; i < n; ++i) {
        lo = keys[i] < lo ? keys[i] : lo;
        hi = keys[i] > hi ? keys[i] : hi;
      }
      if (lo == hi) return {lo, need};
      int digit = 4, shift = 0;
      while (digit < kMaxDigit && n >> digit != 0) ++digit;
      while ((hi - lo) >> shift >> digit != 0) ++shift;
      uint32_t d = (hi - lo) >> shift;
      memset(count, 0, sizeof(int32_t) * (d + 1));
      for (int64_t i = 0; i < n; ++i) ++count[(keys[i] - lo) >> shift];
      for (; count[d] < need; --d) need -= count[d];
      if (count[d] == need) return {lo + (d << shift) - 1, 0};
      int64_t left = 0;
      for (int64_t i = 0; i < n; ++i) {
        rest[left] = keys[i];  // keys may be rest
        left += (keys[i] - lo) >> shift == d;
      }
      keys = rest;
      n = left;
    }
  }

  // Puts items [from, to) that are not below `least` aside; how many.
  int64_t collect(const float* scores, int64_t from, int64_t to, float least) {
    int64_t n = 0, i = from;
    for (; i + F::W <= to; i += F::W) {
      unsigned lanes = lanes_from(scores + i, least);
#if defined(__AVX512F__)
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __mmask16 some = static_cast<__mmask16>(lanes);
      const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(i)));
      _mm512_storeu_si512(key + n, _mm512_maskz_compress_epi32(some, _mm512_loadu_si512(scores + i)));
      _mm512_storeu_si512(item + n, _mm512_maskz_compress_epi32(some, at));
      n += __builtin_popcount(lanes);
#else
      for (; lanes != 0; lanes &= lanes - 1, ++n) {
        item[n] = static_cast<int32_t>(i) + __builtin_ctz(lanes);
        key[n] = float_bits(scores[item[n]]);
      }
#endif
    }
    for (; i < to; ++i) {
      key[n] = float_bits(scores[i]);
      item[n] = static_cast<int32_t>(i);
      n += !(scores[i] < least);
    }
    for (int64_t j = 0; j < n; ++j) key[j] = key_of(key[j]);
    return n;
  }

  // A score that at least the highest `rank` of the sample reach.
  float sampled_score(const float* scores, int64_t n, int64_t rank) {
    const int64_t step = n / kSample;
    for (int64_t i = 0; i < kSample; ++i) key[i] = key_of(float_bits(scores[i * step]));
    return score_of(threshold(key, kSample, rank).key);
  }

  // The `need` highest items of [from, to), need < to - from, ascending.
  void select(const float* scores, int64_t from, int64_t to, int64_t need, int32_t* out) {
    if (need == 0) return;
    const int64_t items = to - from;
    // The sample has need * kSample / items of them, give or take the root of that.
    const float share = static_cast<float>(need) * kSample / static_cast<float>(items);
    int64_t n = 0;
    if (items >= 2 * kSample)
      for (int64_t rank = static_cast<int64_t>(share + 3.0f * sqrtf(share)) + 2; n < need && rank < kSample / 2;
           rank *= 4)
        n = collect(scores, from, to, sampled_score(scores + from, items, rank));
    if (n < need) n = collect(scores, from, to, NAN);
    Threshold t = threshold(key, n, need);
    for (int64_t i = 0, taken = 0; taken < need; ++i) {  // without branches: no guess at them would be good
      const int64_t equal = (key[i] == t.key) & (t.equal > 0);
      out[taken] = item[i];
      t.equal -= equal;
      taken += (key[i] > t.key) | equal;
    }
  }
};

void select_row(const SelectPagesParams& p, int64_t b, int64_t h, Selector& selector) {
  int64_t k = p.k;
  if (p.row_k) {
    const int64_t forced = p.sink + p.recent, row_k = p.row_k[b * p.row_k_batch + h * p.row_k_head];
    k = row_k < forced ? forced : row_k;
    if (k > p.k) k = p.k;
  }
  const int64_t len = p.seq_lens[b] > 0 ? p.seq_lens[b] : 0;
  int64_t m = (len + p.item_tokens - 1) / p.item_tokens;
  if (m > p.n) m = p.n;
  int32_t* out = p.out + (b * p.H + h) * p.k;
  if (m <= k) {
    for (int64_t i = 0; i < p.k; ++i) out[i] = i < m ? static_cast<int32_t>(i) : -1;
    return;
  }
  for (int64_t i = 0; i < p.sink; ++i) out[i] = static_cast<int32_t>(i);
  selector.select(p.scores + b * p.score_batch + h * p.score_head, p.sink, m - p.recent, k - p.sink - p.recent,
                  out + p.sink);
  for (int64_t i = 1; i <= p.recent; ++i) out[k - i] = static_cast<int32_t>(m - i);
  for (int64_t i = k; i < p.k; ++i) out[i] = -1;
}

}  // namespace

int64_t select_pages_workspace_cpu(const SelectPagesParams& p, const CpuExec& exec) {
  return exec.threads * Selector::bytes(p.n);
}

void select_pages_cpu(const SelectPagesParams& p, const CpuExec& exec) {
  if (p.k == 0) return;
  const int64_t scores_per_thread = 1 << 13;  // about 20 us
  int64_t threads = 0;
  split(exec, p.B * p.H, scores_per_thread / (p.n + 1) + 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = __atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED);
    Selector selector({static_cast<uint8_t*>(p.workspace) + thread * Selector::bytes(p.n)}, p.n);
    for (int64_t row = begin; row < end; ++row) select_row(p, row / p.H, row % p.H, selector);
  });
}

KK_END

KK_CPU_ENTRY(select_pages, SelectPagesParams)
KK_CPU_ENTRY_R(int64_t, select_pages_workspace, SelectPagesParams)
