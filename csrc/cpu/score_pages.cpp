// Bound by reading the records once, in the order of memory: page after page, the KV heads of a page one behind the other.
// While a record is multiplied, the same lines some pages further on are asked for. One task: an interval of blocks of pages.
#include "kvkernels/ops/score_pages.h"

#include "cpu/entry.h"
#include "cpu/many_rows.h"
#include "cpu/row_vectors.h"
#include "cpu/score_reduce.h"

KK_BEGIN

namespace {

constexpr int64_t kPages = 16;               // of a block, whose scores are reduced together
constexpr int64_t kFar = 8192;               // bytes between a record and what is asked for meanwhile
constexpr int kRowGroup = 4;                 // query rows that share a record's loads; with fewer, zeros fill up
constexpr int kTogether = F::W / kRowGroup;  // records whose sums are folded into one vector
constexpr int kParts = kRowGroup / kFold;    // vectors that one of them leaves

// A page as the dot products want it. q: [Hkv * row groups][kRowGroup][numbers], in bf16 where the processor can multiply
// that. part: [Hkv * row groups][kTogether * kParts] vectors, of which those of this page begin at `slot`.
struct PageWork {
  const uint8_t *record, *far;
  int64_t record_bytes, heads, groups, numbers;
  const void* q;
  float* part;
  int slot;
};

inline void write_part(const F* sum, float* part) {
  for (int i = 0; i < kParts; ++i) fold(sum + i * kFold).store(part + i * F::W);
}

template <typename Dot>
inline void for_records(const PageWork& w, const Dot& dot) {
  for (int64_t g = 0; g < w.heads; ++g)
    for (int64_t j = 0; j < w.groups; ++j) {
      F sum[kRowGroup];
      const int64_t at = g * w.groups + j;
      dot(w.record + g * w.record_bytes, w.far + g * w.record_bytes, at * kRowGroup * w.numbers, sum);
      write_part(sum, w.part + (at * kTogether + w.slot) * kParts * F::W);
    }
}

// sum[r] = q[r] . n numbers of BITS bits
template <int BITS>
[[gnu::always_inline]] inline void dot_rows(const uint8_t* x, const uint8_t* far, int64_t n, const float* q,
                                            int64_t ldq, F* sum) {
  for (int r = 0; r < kRowGroup; ++r) sum[r] = F::zero();
  const auto step = [&](int64_t i) {
    const F k = BITS == 16 ? F::load_bf16(reinterpret_cast<const uint16_t*>(x) + i) : F::load_i8(x + i);
    for (int r = 0; r < kRowGroup; ++r) sum[r] = fma(k, F::load(q + r * ldq + i), sum[r]);
  };
  int64_t i = 0;
  for (; i + 2 * F::W <= n; i += 2 * F::W) {
    __builtin_prefetch(far + i * (BITS / 8));
    step(i);
    step(i + F::W);
  }
  if (i < n) step(i);
}

#if defined(__AVX512F__)
// The same with bf16 queries; signed bytes are bf16 without loss.
template <int BITS>
[[gnu::always_inline]] inline void dot_rows(const uint8_t* x, const uint8_t* far, int64_t n, const uint16_t* q,
                                            int64_t ldq, F* sum) {
  __m512 acc[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) acc[r] = _mm512_setzero_ps();
  const auto step = [&](int64_t i, __mmask32 some) __attribute__((always_inline)) {
    __m512i k;
    if constexpr (BITS == 16) {
      k = _mm512_maskz_loadu_epi16(some, x + 2 * i);
    } else {
      const F low = F::load_i8(x + i), high = some >> 16 ? F::load_i8(x + i + 16) : F::zero();
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(k) : "v"(high.v), "v"(low.v));
    }
    for (int r = 0; r < kRowGroup; ++r) dot_bf16(acc[r], k, _mm512_maskz_loadu_epi16(some, q + r * ldq + i));
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __builtin_prefetch(far + i * (BITS / 8));
    step(i, 0xffffffffu);
  }
  if (i < n) step(i, 0xffffu);  // head dims are multiples of 16
  for (int r = 0; r < kRowGroup; ++r) sum[r] = acc[r];
}
#endif

// HALVES: of a record of bytes, each with its scale.
template <int BITS, int HALVES, typename Q>
void score_page(const PageWork& w) {
  const Q* q = static_cast<const Q*>(w.q);
  const int64_t n = w.numbers / HALVES;
  for_records(w, [&](const uint8_t* x, const uint8_t* far, int64_t at, F* sum) {
    dot_rows<BITS>(x, far, n, q + at, w.numbers, sum);
    if (BITS == 16) return;
    const uint8_t* scales = x + w.numbers;
    F scale = F::fill(bf16_to_float(load_u16(scales)));
    for (int r = 0; r < kRowGroup; ++r) sum[r] = sum[r] * scale;
    if (HALVES == 1) return;
    F more[kRowGroup];
    dot_rows<BITS>(x + n, far + n, n, q + at + n, w.numbers, more);
    scale = F::fill(bf16_to_float(load_u16(scales + 2)));
    for (int r = 0; r < kRowGroup; ++r) sum[r] = fma(more[r], scale, sum[r]);
  });
}

using ScorePage = void (*)(const PageWork&);
template <typename Q>
ScorePage score_page_of(const SummaryLayout& at) {
  if (at.bits == 16) return score_page<16, 1, Q>;
  return at.kind == SummaryKind::minmax ? score_page<8, 2, Q> : score_page<8, 1, Q>;
}

struct Scorer {
  const ScorePagesParams& p;
  RowReduction reduction;
  int64_t numbers, groups, record_bytes, page_bytes;
  bool bf16_queries;  // the processor multiplies bf16 by bf16
  ScorePage score_page;

  Scorer(const ScorePagesParams& params, Arena& arena)
      : p(params),
        reduction(p, arena),
        numbers(p.layout.kind == SummaryKind::minmax ? 2 * p.D : p.D),
        groups((reduction.rows() + kRowGroup - 1) / kRowGroup),
        record_bytes(summary_bytes(p.layout)),
        page_bytes(p.Hkv * record_bytes),
        bf16_queries(false),
        score_page(score_page_of<float>(p.layout)) {
#if defined(__AVX512F__)
    if (p.dtype == DType::bf16 && cpu::has_avx512bf16()) {
      bf16_queries = true;
      score_page = score_page_of<uint16_t>(p.layout);
    }
#endif
  }

  int64_t items(int64_t b) const {
    if (p.offsets) return p.n;
    const int64_t pages = p.seq_lens[b] > 0 ? (p.seq_lens[b] + p.page_size - 1) / p.page_size : 0;
    return pages < p.n ? pages : p.n;
  }
  int64_t blocks(int64_t b) const { return (items(b) + kPages - 1) / kPages; }
  int64_t blocks() const {
    int64_t n = 0;
    for (int64_t b = 0; b < p.B; ++b) n += blocks(b);
    return n;
  }
  bool absent(int64_t b, int64_t i) const {
    if (!p.offsets) return false;
    const int32_t* at = p.offsets + b * p.offsets_stride + i;
    return at[0] >= at[1] || at[1] > p.seq_lens[b];
  }
  // Those of all KV heads.
  const uint8_t* records(int64_t b, int64_t i) const {
    if (p.offsets) return p.records[0] + (b * p.n + i) * page_bytes;
    const int32_t entry = p.page_table[b * p.table_stride + i];
#if defined(KK_DEBUG_ASSERT)
    if (entry < 0 || entry >> 28 >= p.num_pools || (entry & kPageMask) >= p.num_pages[entry >> 28])
      fail("score_pages: page_table holds a page past the end of its pool");
#endif
    return p.records[entry >> 28] + (entry & kPageMask) * page_bytes;
  }
};

// What one thread has.
struct Worker {
  const Scorer& shared;
  const ScorePagesParams& p;
  int64_t rows, head_rows;  // of a KV head, and with those that fill up
  float *q, *part, *s;      // s [Hkv * head_rows][kPages]
  uint16_t* q_bf16;
  Arena arena;

  Worker(const Scorer& scorer, Arena a)
      : shared(scorer), p(scorer.p), rows(scorer.reduction.rows()), head_rows(scorer.groups * kRowGroup), arena(a) {
    const int64_t all = p.Hkv * head_rows;
    q = shared.bf16_queries ? nullptr : arena.take<float>(all * shared.numbers);
    q_bf16 = shared.bf16_queries ? arena.take<uint16_t>(all * shared.numbers) : nullptr;
    part = arena.take<float>(all / kRowGroup * kTogether * kParts * F::W);
    s = arena.take<float>(all * kPages);
  }
  static int64_t bytes(const Scorer& scorer) { return Worker(scorer, {nullptr}).arena.used; }

  // The query rows: q, or max(q, 0) and min(q, 0) one behind the other.
  void begin(int64_t b) {
    const int64_t heads = p.Hq / p.Hkv;
    for (int64_t row = 0; row < p.Hkv * head_rows; ++row) {
      const int64_t g = row / head_rows, r = row % head_rows, t = r / heads, head = g * heads + r % heads;
      const int64_t at = b * p.q_batch + t * p.q_token + head * p.q_head;
      for (int64_t i = 0; i < p.D; i += F::W) {
        const F x = r < rows ? load_floats(p.q, p.dtype, at + i) : F::zero();
        if (shared.numbers == p.D) {
          put(row, i, x);
        } else {  // NaN stays in both
          put(row, i, max(F::zero(), x));
          put(row, p.D + i, min(F::zero(), x));
        }
      }
    }
  }
  void put(int64_t row, int64_t i, F x) {
    if (q_bf16)
      x.store_bf16(q_bf16 + row * shared.numbers + i);
    else
      x.store(q + row * shared.numbers + i);
  }

  void run(int64_t from, int64_t to) {
    int64_t b = 0, block = from;
    for (; block >= shared.blocks(b); ++b) block -= shared.blocks(b);
    begin(b);
    for (int64_t i = from; i < to; ++i, ++block) {
      if (block == shared.blocks(b)) {
        while (shared.blocks(++b) == 0) continue;
        block = 0;
        begin(b);
      }
      score(b, block * kPages);
    }
  }

  void score(int64_t b, int64_t first) {
    const int64_t items = shared.items(b), n = items - first < kPages ? items - first : kPages;
    const int64_t far = kFar / shared.page_bytes + 1;
    for (int64_t c = 0; c < n; ++c) {
      const uint8_t* record = shared.records(b, first + c);
      const int64_t ahead = first + c + far;
      const int slot = static_cast<int>(c % kTogether);
      shared.score_page({record, ahead < items ? shared.records(b, ahead) : record, shared.record_bytes, p.Hkv,
                         shared.groups, shared.numbers, q_bf16 ? static_cast<const void*>(q_bf16) : q, part, slot});
      if (slot + 1 == kTogether || c + 1 == n) write_sums(c - slot);
    }
    for (int64_t g = 0; g < p.Hkv; ++g) {
      float* of_head = s + g * head_rows * kPages;
      for (int64_t c = 0; c < n; ++c)
        if (shared.absent(b, first + c))
          for (int64_t r = 0; r < rows; ++r) of_head[r * kPages + c] = -INFINITY;
      shared.reduction.put(b, g, first, n, of_head, kPages);
    }
  }

  // From `part` to columns c to c + kTogether of s. Behind the last page of a block they mean nothing.
  void write_sums(int64_t c) {
    for (int64_t j = 0; j < p.Hkv * shared.groups; ++j) {
      F of[kTogether * kParts];
      for (int i = 0; i < kTogether * kParts; ++i) of[i] = F::load(part + (j * kTogether * kParts + i) * F::W);
      float x[kTogether][kRowGroup];
      (sum_folded(of) * F::fill(p.scale)).store(x[0]);
      for (int r = 0; r < kRowGroup; ++r)
        for (int i = 0; i < kTogether; ++i) s[(j * kRowGroup + r) * kPages + c + i] = x[i][r];
    }
  }
};

}  // namespace

int64_t score_pages_workspace_cpu(const ScorePagesParams& p, const CpuExec& exec) {
  if (p.B * p.Hkv * p.n == 0) return 0;
  Arena arena{nullptr};
  const Scorer scorer(p, arena);
  return arena.used + exec.threads * Worker::bytes(scorer);
}

void score_pages_cpu(const ScorePagesParams& p, const CpuExec& exec) {
  if (p.B * p.Hkv * p.n == 0) return;
  Arena arena{static_cast<uint8_t*>(p.workspace)};
  const Scorer scorer(p, arena);
  const int64_t bytes_per_thread = 1 << 18;  // about 20 us
  const int64_t block_bytes = kPages * scorer.page_bytes, worker_bytes = Worker::bytes(scorer);
  int64_t threads = 0;
  split(exec, scorer.blocks(), (bytes_per_thread + block_bytes - 1) / block_bytes, [&](int64_t begin, int64_t end) {
    const int64_t thread = __atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED);
    Worker(scorer, {arena.base + arena.used + thread * worker_bytes}).run(begin, end);
  });
  scorer.reduction.finish(exec, [&](int64_t b) { return scorer.items(b); });
  if (!p.offsets || !is_softmax(p.reduce)) return;
  for (int64_t b = 0; b < p.B; ++b)  // to softmax an item of -inf is one that nobody looks at
    for (int64_t i = 0; i < p.n; ++i)
      if (scorer.absent(b, i))
        for (int64_t g = 0; g < p.Hkv; ++g) p.out[(b * p.Hkv + g) * p.n + i] = -INFINITY;
}

KK_END

KK_CPU_ENTRY(score_pages, ScorePagesParams)
KK_CPU_ENTRY_R(int64_t, score_pages_workspace, ScorePagesParams)
