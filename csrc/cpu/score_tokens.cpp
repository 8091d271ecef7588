// Scores of tokens, or of the best token of each page. From keys: what the tasks of attention do as far as their scores, K read
// once for all rows of a KV head. From label caches: the records of all KV heads of a chunk of pages side by side.
#include "kvkernels/ops/score_tokens.h"

#include <new>

#include "cpu/attention_task.h"
#include "cpu/entry.h"
#include "cpu/label_scores.h"
#include "cpu/score_reduce.h"

KK_BEGIN

namespace {

int64_t tokens_of(const ScoreTokensParams& p, int64_t b) {
  const int64_t len = p.seq_lens[b] > 0 ? p.seq_lens[b] : 0;
  return len < p.max_pages * p.page_size ? len : p.max_pages * p.page_size;
}
int64_t items_of(const ScoreTokensParams& p, int64_t b) {
  return p.best_of_page ? (tokens_of(p, b) + p.page_size - 1) / p.page_size : tokens_of(p, b);
}

// Pieces of work: `heads` KV heads that follow one another and `tokens` tokens, a number of pages, of one sequence.
struct Pieces {
  const ScoreTokensParams& p;
  int64_t heads, tokens;

  int64_t of_heads() const { return (p.Hkv + heads - 1) / heads; }
  int64_t of(int64_t b) const { return (tokens_of(p, b) + tokens - 1) / tokens * of_heads(); }
  int64_t count() const {
    int64_t n = 0;
    for (int64_t b = 0; b < p.B; ++b) n += of(b);
    return n;
  }
  // f(b, first head, heads, from, to) for the pieces [begin, end)
  template <typename Fn>
  void each(int64_t begin, int64_t end, Fn&& f) const {
    int64_t b = 0, i = begin;
    for (; begin < end; ++begin, ++i) {
      while (i >= of(b)) i -= of(b++);
      const int64_t from = i / of_heads() * tokens, g = i % of_heads() * heads, len = tokens_of(p, b);
      f(b, g, g + heads < p.Hkv ? heads : p.Hkv - g, from, from + tokens < len ? from + tokens : len);
    }
  }
};

constexpr int64_t kGrainTokens = 2048;  // of one KV head: about 20 us

// make(arena).run(begin, end) over the pieces, a worker with its part of the workspace for every thread.
template <typename Make>
void over_threads(const CpuExec& exec, const Pieces& pieces, const Arena& arena, const Make& make) {
  const int64_t piece_tokens = pieces.heads * pieces.tokens, worker_bytes = make(Arena{nullptr}).arena.used;
  int64_t threads = 0;
  split(exec, pieces.count(), (kGrainTokens + piece_tokens - 1) / piece_tokens, [&](int64_t begin, int64_t end) {
    const int64_t thread = __atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED);
    make(Arena{arena.base + arena.used + thread * worker_bytes}).run(begin, end);
  });
}

// ---- keys

// A call of attention on the same queries and keys.
AttentionParams as_attention(const ScoreTokensParams& p) {
  AttentionParams a{};
  a.q = p.q;
  a.q_batch = p.q_batch, a.q_token = p.q_token, a.q_head = p.q_head;
  a.dtype = p.dtype;
  a.B = p.B, a.Tq = p.Tq, a.Hq = p.Hq, a.D = p.D, a.Hkv = p.Hkv;
  a.Dv = p.D == 576 ? 512 : p.D;
  a.k_share = a.v_share = 1;
  for (int i = 0; i < p.num_pools; ++i) a.pools[i] = p.pools[i];
  a.num_pools = p.num_pools;
  a.page_table = p.page_table;
  a.max_pages = p.max_pages, a.table_stride = p.table_stride, a.page_size = p.page_size;
  a.seq_lens = p.seq_lens;
  a.transform = p.transform;
  a.scale = p.scale;
  a.window_left = -1;
  return a;
}

// As attention does: heads side by side where memory is the bound, and not more rows than a task takes.
Pieces pieces_of_keys(const ScoreTokensParams& p, const CpuExec& exec) {
  const int64_t rows = p.Tq * (p.Hq / p.Hkv);
  int64_t heads = rows > 0 && rows < kMaxRows ? kMaxRows / rows : 1, all = 0;
  for (int i = 0; i < p.num_pools; ++i)
    if (is_packed(p.pools[i].k_format)) heads = 1;
  if (heads > p.Hkv) heads = p.Hkv;
  for (int64_t b = 0; b < p.B; ++b) all += tokens_of(p, b);
  const int64_t share = all * p.Hkv / heads / (4 * exec.threads);
  const int64_t tokens = share < 512 ? 512 : share > 8192 ? 8192 : share;
  return {p, heads, round_up(tokens, p.page_size)};
}

struct KeyWorker {
  const Pieces& pieces;
  const RowReduction& reduction;
  const ScoreTokensParams& p;
  Arena arena;
  int64_t rows, blocks;  // of a KV head: query rows, and tasks that share them
  Task* tasks;           // [heads][blocks]
  float* s;              // [rows][kChunk] of one KV head
  float *best, *begun;   // [rows][kChunk]: of pages; [heads][rows]: of the page that a chunk leaves unfinished
  Ahead ahead;

  KeyWorker(const KeyWorker&) = delete;  // the tasks refer to `ahead`
  KeyWorker(const Pieces& work, const RowReduction& r, const AttentionParams& a, Arena from)
      : pieces(work), reduction(r), p(work.p), arena(from), rows(r.rows()), blocks((rows + kMaxRows - 1) / kMaxRows) {
    const int64_t n = pieces.heads * blocks;
    tasks = arena.take<Task>(n);
    s = arena.take<float>(rows * kChunk + F::W);
    best = arena.take<float>(p.best_of_page ? rows * kChunk : 0);
    begun = arena.take<float>(p.best_of_page ? pieces.heads * rows : 0);
    const Task first(a, ahead, arena, kMaxRows < rows ? kMaxRows : rows, nullptr);
    if (tasks) new (&tasks[0]) Task(first);
    for (int64_t i = 1; i < n; ++i) {
      const Task task(a, ahead, arena, kMaxRows < rows ? kMaxRows : rows, &first);
      if (tasks) new (&tasks[i]) Task(task);
    }
    for (int64_t i = 0; tasks && i < n; ++i) {
      tasks[i].s = s + i % blocks * kMaxRows * kChunk;
      tasks[i].score_share = 16;
    }
  }

  void run(int64_t begin, int64_t end) {
    pieces.each(begin, end, [&](int64_t b, int64_t g, int64_t heads, int64_t from, int64_t to) {
      for (int64_t i = 0; i < heads * blocks; ++i) {
        const int64_t first = i % blocks * kMaxRows, left = rows - first;
        tasks[i].begin({b,
                        g + i / blocks,
                        nullptr,
                        {0, 0, tokens_of(p, b)},
                        first,
                        static_cast<int>(left < kMaxRows ? left : kMaxRows)});
      }
      score(b, g, heads, from, to);
    });
  }

  void score(int64_t b, int64_t g, int64_t heads, int64_t from, int64_t to) {
    Chunk chunk[2];
    int64_t pos = from;
    bool more = tasks[0].next_chunk(chunk[0], pos, to);
    for (int64_t i = 0; more; ++i) {
      Chunk& c = chunk[i & 1];
      Chunk& next = chunk[(i + 1) & 1];
      more = tasks[0].next_chunk(next, pos, to);
      for (int64_t j = 0; j < heads; ++j) {
        Task* const task = tasks + j * blocks;
        ahead.clear();
        if (j + 1 < heads)
          task->list_side<Side::K>(c, c.pool->k_head);
        else if (more)
          task->list_side<Side::K>(next, 0);
        for (int64_t k = 0; k < blocks; ++k) task[k].scores(c);
        ahead.take_rest();
        if (p.best_of_page)
          put_best(b, g + j, c, begun + j * rows);
        else
          reduction.put(b, g + j, c.start, c.n, s, kChunk);
        for (int k = 0; k < c.pieces; ++k) c.piece[k].k += c.pool->k_head;
      }
    }
  }

  // A page larger than a chunk goes on in `part` [rows].
  void put_best(int64_t b, int64_t g, const Chunk& c, float* part) {
    const int64_t len = tokens_of(p, b);
    int64_t pages = 0;
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const bool ends = pc.token + pc.n == p.page_size || pc.start + pc.n == len;
      for (int64_t r = 0; r < rows; ++r) {
        float x = largest_of(s + r * kChunk + pc.col, pc.n);
        if (pc.token > 0 && (part[r] != part[r] || part[r] > x)) x = part[r];
        (ends ? best[r * kChunk + pages] : part[r]) = x;
      }
      pages += ends;
    }
    if (pages > 0) reduction.put(b, g, c.start / p.page_size, pages, best, kChunk);
  }

  // NaN if there is one.
  static float largest_of(const float* x, int n) {
    const F none = F::fill(-INFINITY);
    F top = none;
    for (int j = 0; j < n; j += F::W)
      top = max_or_nan(top, n - j < F::W ? first(n - j, F::load(x + j), none) : F::load(x + j));
    if (all_finite(max(F::fill(-3e38f), top))) return top.fold_max();
    float lane[F::W], most = -INFINITY;
    top.store(lane);
    for (const float y : lane) most = y > most || y != y ? y : most;
    return most;
  }
};

// ---- label caches

constexpr int64_t kLabelBytes =
    1 << 15;  // of records in a chunk; this one and the next are in L2, on their way through L1

Pieces pieces_of_labels(const ScoreTokensParams& p) {
  const int64_t pages = kLabelBytes / (p.Hkv * summary_bytes(p.layout));
  return {p, p.Hkv, (pages > 1 ? pages : 1) * p.page_size};
}

struct LabelWorker {
  const Pieces& pieces;
  const RowReduction& reduction;
  const ScoreTokensParams& p;
  Arena arena;
  int64_t rows, record_bytes, ld;
  float *q, *s;  // [Hkv][rows][channels], [rows][ld]
  Ahead ahead;
  int64_t sequence = -1;  // whose queries are in q

  LabelWorker(const Pieces& work, const RowReduction& r, Arena from)
      : pieces(work),
        reduction(r),
        p(work.p),
        arena(from),
        rows(r.rows()),
        record_bytes(summary_bytes(p.layout)),
        ld(round_up(work.tokens, 16) + F::W) {
    q = arena.take<float>(p.Hkv * rows * p.layout.channels);
    s = arena.take<float>(rows * ld);
  }

  const uint8_t* records(int64_t b, int64_t page) const {  // of all KV heads
    const int32_t entry = p.page_table[b * p.table_stride + page];
    return p.records[entry >> 28] + (entry & kPageMask) * p.Hkv * record_bytes;
  }

  void run(int64_t begin, int64_t end) {
    ahead.clear();
    for (int64_t i = begin; i < end; ++i) {
      pieces.each(i, i + 1, [&](int64_t b, int64_t, int64_t, int64_t from, int64_t to) {
        if (b != sequence) take_queries(b);
        ahead.clear();
        if (i + 1 < end) pieces.each(i + 1, i + 2, [&](auto... next) { look_ahead(next...); });
        score(b, from, to);
        ahead.take_rest();
      });
    }
  }
  void look_ahead(int64_t b, int64_t, int64_t, int64_t from, int64_t to) {
    for (int64_t page = from / p.page_size; page * p.page_size < to; ++page)
      ahead.add(records(b, page), p.Hkv * record_bytes);
  }

  void take_queries(int64_t b) {
    sequence = b;
    const int64_t heads = p.Hq / p.Hkv, r = p.layout.channels;
    float x[F::W];
    for (int64_t row = 0; row < p.Hkv * rows; ++row) {
      const int64_t g = row / rows, head = g * heads + row % heads, t = row % rows / heads;
      const int64_t at = b * p.q_batch + t * p.q_token + head * p.q_head;
      for (int64_t j = 0; j < r; ++j) {
        const int64_t channel = p.channels[g * r + j];
        (load_floats(p.q, p.dtype, at + channel / F::W * F::W) * F::fill(p.scale)).store(x);
        q[row * r + j] = x[channel % F::W];
      }
    }
  }

  void score(int64_t b, int64_t from, int64_t to) {
    const int64_t first = from / p.page_size, pages = (to - from + p.page_size - 1) / p.page_size;
    const int64_t r = p.layout.channels, lines = ahead.share(16, p.Hkv * pages);
    for (int64_t g = 0; g < p.Hkv; ++g) {
      for (int64_t i = 0; i < pages; ++i) {
        const int64_t left = to - (first + i) * p.page_size;
        ahead.take(lines);
        label_scores(records(b, first + i) + g * record_bytes, p.layout, left < p.page_size ? left : p.page_size,
                     q + g * rows * r, r, static_cast<int>(rows), s + i * p.page_size, ld);
      }
      reduction.put(b, g, from, to - from, s, ld);
    }
  }
};

}  // namespace

int64_t score_tokens_workspace_cpu(const ScoreTokensParams& p, const CpuExec& exec) {
  Arena arena{nullptr};
  const RowReduction reduction(p, arena);
  int64_t worker = 0;
  if (p.records[0]) {
    worker = LabelWorker(pieces_of_labels(p), reduction, {nullptr}).arena.used;
  } else {
    const AttentionParams a = as_attention(p);
    const Pieces pieces = pieces_of_keys(p, exec);
    worker = KeyWorker(pieces, reduction, a, {nullptr}).arena.used;
  }
  return arena.used + exec.threads * worker;
}

void score_tokens_cpu(const ScoreTokensParams& p, const CpuExec& exec) {
  if (p.B * p.Hkv * p.n == 0) return;
  Arena arena{static_cast<uint8_t*>(p.workspace)};
  const RowReduction reduction(p, arena);
  if (p.records[0]) {
    const Pieces pieces = pieces_of_labels(p);
    over_threads(exec, pieces, arena, [&](Arena own) { return LabelWorker(pieces, reduction, own); });
  } else {
    const AttentionParams a = as_attention(p);
    const Pieces pieces = pieces_of_keys(p, exec);
    over_threads(exec, pieces, arena, [&](Arena own) { return KeyWorker(pieces, reduction, a, own); });
  }
  reduction.finish(exec, [&](int64_t b) { return items_of(p, b); });
}

KK_END

KK_CPU_ENTRY(score_tokens, ScoreTokensParams)
KK_CPU_ENTRY_R(int64_t, score_tokens_workspace, ScoreTokensParams)
