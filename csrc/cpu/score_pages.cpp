// Bound by reading the records once. Those of all KV heads of a page lie together, so a task takes the heads of a chunk of
// pages side by side while the next chunk is on its way. One task: an interval of chunks.
#include "kvkernels/ops/score_pages.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/rows.h"
#include "cpu/score_reduce.h"

KK_BEGIN

namespace {

constexpr int64_t kChunkBytes = 1 << 16;  // of records: this chunk and the next one stay in L2

struct LoadI8 {
  const uint8_t* const* rows;
  F operator()(int c, int64_t i) const { return F::load_i8(rows[c] + i); }
};

// The query rows of a KV head as their dot product with a record wants them: q, or max(q, 0) and min(q, 0) one behind the
// other; in fp32 times the scale of the scores, or in bf16 as they came.
struct Query {
  const float* f32;
  const uint16_t* bf16;  // or null
  float scale;
  int rows;
};

// s[r][c] = score of row r and record[c], c < n; all kRowChunk pointers can be read. `more` [rows][kChunk] is scratch.
using ScoreRecords = void (*)(const uint8_t* const* record, int n, const Query& q, const SummaryLayout& at, float* s,
                              float* more, Ahead& ahead, int sixteenths);

template <int64_t N>
void score_bf16(const uint8_t* const* record, int n, const Query& q, const SummaryLayout&, float* s, float*,
                Ahead& ahead, int sixteenths) {
#if defined(__AVX512F__)
  if (q.bf16) return bf16_scores<N>(LoadBf16{record}, n, q.bf16, q.scale, q.rows, s, ahead, sixteenths);
#endif
  row_scores<N>(LoadBf16{record}, n, q.f32, N, q.rows, s, ahead, sixteenths);
}

template <int64_t D, bool MINMAX>
void score_bytes(const uint8_t* const* record, int n, const Query& q, const SummaryLayout& at, float* s, float* more,
                 Ahead& ahead, int sixteenths) {
  constexpr int64_t N = MINMAX ? 2 * D : D;
  const uint8_t* half[kRowChunk];
  float scale[2][kRowChunk] = {};
  for (int c = 0; c < n; ++c) {
    const uint8_t* scales = record[c] + summary_codes_bytes(at);
    for (int i = 0; i < N / D; ++i) scale[i][c] = bf16_to_float(load_u16(scales + 2 * i));
  }
  for (int c = 0; c < kRowChunk; ++c) half[c] = record[c] + D;
  row_scores<D>(LoadI8{record}, n, q.f32, N, q.rows, s, ahead, sixteenths / (N / D));
  if (MINMAX) row_scores<D>(LoadI8{half}, n, q.f32 + D, N, q.rows, more, ahead, sixteenths / 2);
  for (int r = 0; r < q.rows; ++r)
    for (int c = 0; c < n; c += F::W) {
      float* x = s + r * kChunk + c;
      F sum = F::load(x) * F::load(scale[0] + c);
      if (MINMAX) sum = fma(F::load(more + r * kChunk + c), F::load(scale[1] + c), sum);
      sum.store(x);
    }
}

ScoreRecords score_records(const SummaryLayout& at) {
  ScoreRecords f = nullptr;
  const bool minmax = at.kind == SummaryKind::minmax;
  one_of<64, 80, 96, 112, 128, 192, 256>("score_pages: head_dim", at.head_dim, [&](auto d) {
    constexpr int64_t D = decltype(d)::value;
    if (at.bits == 8)
      f = minmax ? score_bytes<D, true> : score_bytes<D, false>;
    else
      f = minmax ? score_bf16<2 * D> : score_bf16<D>;
  });
  return f;
}

struct Scorer {
  const ScorePagesParams& p;
  RowReduction reduction;
  ScoreRecords score;
  int64_t numbers, record_bytes, chunk;  // numbers of a record that are no scales; records of a KV head in a chunk
  bool dot_bf16;                         // the processor multiplies bf16 by bf16

  Scorer(const ScorePagesParams& params, Arena& arena)
      : p(params),
        reduction(p, arena),
        score(score_records(p.layout)),
        numbers(p.layout.kind == SummaryKind::minmax ? 2 * p.D : p.D),
        record_bytes(summary_bytes(p.layout)),
        dot_bf16(p.dtype == DType::bf16 && p.layout.bits == 16 && cpu::has_avx512bf16()) {
    chunk = kChunkBytes / (p.Hkv * record_bytes) / 4 * 4;
    chunk = chunk < 4 ? 4 : chunk > kRowChunk ? kRowChunk : chunk;
  }

  int64_t items(int64_t b) const {
    if (p.offsets) return p.n;
    const int64_t pages = p.seq_lens[b] > 0 ? (p.seq_lens[b] + p.page_size - 1) / p.page_size : 0;
    return pages < p.n ? pages : p.n;
  }
  bool absent(int64_t b, int64_t i) const {
    if (!p.offsets) return false;
    const int32_t* at = p.offsets + b * p.offsets_stride + i;
    return at[0] >= at[1] || at[1] > p.seq_lens[b];
  }
  // The records of all KV heads.
  const uint8_t* records(int64_t b, int64_t i) const {
    if (p.offsets) return p.records[0] + (b * p.n + i) * p.Hkv * record_bytes;
    const int32_t entry = p.page_table[b * p.table_stride + i];
#if defined(KK_DEBUG_ASSERT)
    if (entry < 0 || entry >> 28 >= p.num_pools || (entry & kPageMask) >= p.num_pages[entry >> 28])
      fail("score_pages: page_table holds a page past the end of its pool");
#endif
    return p.records[entry >> 28] + (entry & kPageMask) * p.Hkv * record_bytes;
  }
  int64_t chunks(int64_t b) const { return (items(b) + chunk - 1) / chunk; }
  int64_t chunks() const {
    int64_t n = 0;
    for (int64_t b = 0; b < p.B; ++b) n += chunks(b);
    return n;
  }
};

// What one thread has.
struct Worker {
  const Scorer& shared;
  const ScorePagesParams& p;
  int64_t rows;
  float *q, *s, *more;
  uint16_t* q_bf16;
  Ahead ahead;
  Arena arena;

  Worker(const Scorer& scorer, Arena a) : shared(scorer), p(scorer.p), rows(scorer.reduction.rows()), arena(a) {
    const int64_t n = p.Hkv * rows * shared.numbers;
    q = shared.dot_bf16 ? nullptr : arena.take<float>(n);
    q_bf16 = shared.dot_bf16 ? arena.take<uint16_t>(n) : nullptr;
    s = arena.take<float>(rows * kChunk);
    more = arena.take<float>(p.layout.bits == 8 ? rows * kChunk : 0);
  }
  static int64_t bytes(const Scorer& scorer) { return Worker(scorer, {nullptr}).arena.used; }

  void begin(int64_t b) {
    const int64_t heads = p.Hq / p.Hkv;
    const bool signs = p.layout.kind == SummaryKind::minmax;
    for (int64_t row = 0; row < p.Hkv * rows; ++row) {
      const int64_t head = row / rows * heads + row % heads, t = row % rows / heads;
      const int64_t at = b * p.q_batch + t * p.q_token + head * p.q_head;
      for (int64_t i = 0; i < p.D; i += F::W) {
        const F x = load_floats(p.q, p.dtype, at + i);
        if (!signs) {
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
      (x * F::fill(p.scale)).store(q + row * shared.numbers + i);
  }

  void run(int64_t begin_chunk, int64_t end_chunk) {
    int64_t b = 0, i = begin_chunk;
    for (; i >= shared.chunks(b); ++b) i -= shared.chunks(b);
    begin(b);
    for (int64_t c = begin_chunk; c < end_chunk; ++c) {
      int64_t next_b = b, next = i + 1;
      for (; next_b < p.B && next >= shared.chunks(next_b); ++next_b) next = 0;
      ahead.clear();
      if (c + 1 < end_chunk) look_ahead(next_b, next * shared.chunk);
      score(b, i * shared.chunk);
      ahead.take_rest();
      if (c + 1 < end_chunk && next_b != b) begin(next_b);
      b = next_b;
      i = next;
    }
  }

  int64_t end(int64_t b, int64_t first) const {
    const int64_t items = shared.items(b);
    return first + shared.chunk < items ? first + shared.chunk : items;
  }
  void look_ahead(int64_t b, int64_t first) {
    for (int64_t i = first; i < end(b, first); ++i) ahead.add(shared.records(b, i), p.Hkv * shared.record_bytes);
  }

  void score(int64_t b, int64_t first) {
    const int n = static_cast<int>(end(b, first) - first);
    const uint8_t* record[kRowChunk];
    for (int c = 0; c < n; ++c) record[c] = shared.records(b, first + c);
    for (int c = n; c < kRowChunk; ++c) record[c] = record[n - 1];
    for (int64_t g = 0; g < p.Hkv; ++g) {
      const int64_t at = g * rows * shared.numbers;
      const Query query{q ? q + at : nullptr, q_bf16 ? q_bf16 + at : nullptr, p.scale, static_cast<int>(rows)};
      shared.score(record, n, query, p.layout, s, more, ahead, static_cast<int>((16 + p.Hkv - 1) / p.Hkv));
      for (int c = 0; c < n; ++c)
        if (shared.absent(b, first + c))
          for (int64_t r = 0; r < rows; ++r) s[r * kChunk + c] = -INFINITY;
      shared.reduction.put(b, g, first, n, s, kChunk);
      for (int c = 0; c < kRowChunk; ++c) record[c] += shared.record_bytes;
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
  const int64_t chunk_bytes = scorer.chunk * p.Hkv * scorer.record_bytes, worker_bytes = Worker::bytes(scorer);
  int64_t threads = 0;
  split(exec, scorer.chunks(), (bytes_per_thread + chunk_bytes - 1) / chunk_bytes, [&](int64_t begin, int64_t end) {
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
