// One task: the rows of a block, all of one KV head, against an interval of tokens; K and V are read once for all rows.
//
// Per chunk of 64 or 128 tokens: scores S [rows][chunk] -> online softmax P -> sums over V. How the two sides of a format
// are read:
//   bf16 f16 u8                as fp32 rows (rows.h)
//   packed, 4 bits and less    as byte codes against integer digits of q and of p * scale (codes.h), 4 products an instruction
//   kivi2                      as fp32 rows, the channels' scales and zero points multiplied into q once per page
//   4 bits, less without AVX2  decoded to fp32 rows first
// Rotated formats see q' = H diag(1/t) q, those of two parts H_{D/2} (diag(1/t) q)[order], and give their sums in the rotated
// basis; every pool has its own sums, and they are brought to the plain basis once, at the end of the task.
#pragma once
#include "cpu/ahead.h"
#include "cpu/arena.h"
#include "cpu/codec.h"
#include "cpu/codes.h"
#include "cpu/entry.h"
#include "cpu/row_vectors.h"
#include "cpu/rows.h"
#include "cpu/selected.h"

KK_BEGIN

template <int64_t N>
void rotate_row(float* x) {
  constexpr int V = N / F::W;
  F v[V];
  each<V / 2>([&](auto i) {
    load_split<DType::f32>(reinterpret_cast<const uint8_t*>(x + 2 * F::W * i), v[2 * i], v[2 * i + 1]);
  });
  fwht_split<V>(v);
  each<V>([&](auto i) { (v[i] * F::fill(fwht_scale(N))).store(x + F::W * i); });
}
// H x for every row; rows of n.
inline void rotate_rows(float* x, int64_t n, int64_t rows) {
  one_of<32, 64, 128, 256>("attention: channels of a rotation", n, [&](auto N) {
    for (int64_t r = 0; r < rows; ++r) rotate_row<decltype(N)::value>(x + r * n);
  });
}

inline bool is_packed(Format f) {
  bool r = false;
  with_format(f, [&](auto fmt) { r = decltype(fmt)::packed; });
  return r;
}
inline bool packed(const Pool& pool) { return is_packed(pool.k_format) || is_packed(pool.v_format); }  // on either side

// The rows of a task: some of those of group g that read the pages of sequence b.
struct Block {
  int64_t b, g;
  const int32_t* sequences;  // whose rows they are; null: b alone
  Visible visible;
  int64_t first;  // number of the first row: rows are ordered by sequence, token, query head
  int rows;
};

struct Task {
  const AttentionParams& p;
  const int64_t D, DV;
  const int digits;  // of q, and of weights: 15 bits, or 22 for fp32 queries
  int rows;
  int64_t k_head, v_head;
  const int32_t* table;  // pages
  Runs runs;             // of a selection
  Visible visible;
  Unmasked unmasked;
  QueryRow* query;
  float *q, *q_mu, *s, *p_top, *m, *l, *out_rows, *decoded;
  struct Basis {  // of formats of 1 or 2 parts
    float* q;     // [rows][D] q'; null: no pool has such keys
    bool ready;
  } basis[2];
  uint16_t* q_bf16;  // the queries as they came, where the processor can multiply them so; else null
  uint8_t* codes;
  uint8_t* gathered;  // one side of a page of kChunk tokens, where a selection is of single tokens and pages are packed
  struct PoolState {
    PackedSide k, v;
    float* acc;  // [rows][lanes] sums over V, in the order and basis the pool's format leaves them in
    int64_t lanes;
    bool acc_used;
#if defined(__AVX2__)
    CodeQueries queries[2];  // of the parts of K
    bool queries_ready;
#endif
  } state[kMaxPools];
  Ahead& ahead;  // one for all tasks of a thread, as its 18 KB hold nothing between two heads
  bool mu_ready = false;
  int score_share = kAheadScores;  // sixteenths of the lines ahead that are asked for while scores are made

  // What `heads` tasks need that take turns.
  static int64_t scratch_bytes(const AttentionParams& p, int64_t rows, int64_t heads) {
    Arena a{nullptr};
    Ahead ahead;
    a.take<Task>(heads);
    const Task first(p, ahead, a, rows, nullptr);
    const int64_t before = a.used;
    const Task next(p, ahead, a, rows, &first);
    return before + (a.used - before) * (heads - 1);
  }

  // Buffers that hold nothing between two chunks are those of `other`, if there is one.
  Task(const AttentionParams& params, Ahead& lines_ahead, Arena& a, int64_t max_rows, const Task* other)
      : p(params), D(p.D), DV(p.Dv), digits(p.dtype == DType::f32 ? 3 : 2), ahead(lines_ahead) {
    query = a.take<QueryRow>(max_rows);
    q = a.take<float>(max_rows * D);
    out_rows = a.take<float>(max_rows * DV);
    q_bf16 = p.dtype == DType::bf16 && cpu::has_avx512bf16() ? a.take<uint16_t>(max_rows * D) : nullptr;
    s = other ? other->s : a.take<float>(max_rows * kChunk);
    q_mu = a.take<float>(max_rows);
    p_top = a.take<float>(max_rows);
    m = a.take<float>(max_rows);
    l = a.take<float>(max_rows);
    bool any_packed = false, parts[2] = {};
    int64_t side_row = 0;  // of packed tokens
    for (int i = 0; i < p.num_pools; ++i) {
      PoolState& st = state[i];
      any_packed |= packed(p.pools[i]);
      st.k = packed_side(p.pools[i].k_format, p.page_size, D);
      st.v = packed_side(p.pools[i].v_format, p.page_size, D);
      if (st.k.parts) parts[st.k.parts - 1] = true;
      const int64_t k = st.k.token_bytes(), v = st.v.token_bytes();
      side_row = k > side_row ? k : side_row;
      side_row = v > side_row ? v : side_row;
    }
    for (int i = 0; i < 2; ++i) basis[i].q = parts[i] ? a.take<float>(max_rows * D) : nullptr;
    decoded = other ? other->decoded : any_packed ? a.take<float>(kChunk * D) : nullptr;
    codes = other ? other->codes : any_packed ? a.take<uint8_t>(kChunk * D / 2) : nullptr;
    const bool gathers = side_row > 0 && p.selection.index && p.selection.tokens == 1;
    gathered = other ? other->gathered : gathers ? a.take<uint8_t>(kChunk * side_row + kTile) : nullptr;
    for (int i = 0; i < p.num_pools; ++i) {
      PoolState& st = state[i];
      st.lanes = packed(p.pools[i]) ? 2 * D : DV;  // 3 bits sum their two planes apart
      st.acc = a.take<float>(max_rows * st.lanes);
#if defined(__AVX2__)
      for (int j = 0; j < st.k.parts; ++j) {
        const CodePart& part = st.k.part[j];
        const int64_t n = max_rows * digits * part.groups;
        st.queries[j] = {a.take<int32_t>(n * kQuads), a.take<float>(max_rows), a.take<float>(n)};
      }
#endif
    }
  }

  bool read_as_codes(int pool) const { return state[pool].k.as_codes() && state[pool].v.as_codes(); }

  // ---- queries

  void begin(const Block& block) {
    const GroupHeads heads = group_heads(p, block.g);
    const int64_t b = block.b;
    const Window window = window_of(p, block.g);
    rows = block.rows;
    k_head = block.g / p.k_share;
    v_head = block.g / p.v_share;
    table = p.page_table ? p.page_table + b * p.table_stride : nullptr;
    runs = selected_runs(p, b, block.g);
    visible = block.visible;
    unmasked = {};
    mu_ready = basis[0].ready = basis[1].ready = false;
    for (int i = 0; i < p.num_pools; ++i) {
      state[i].acc_used = false;
#if defined(__AVX2__)
      state[i].queries_ready = false;
#endif
    }
    const F scale = F::fill(p.scale);
    const int64_t token = block.first / heads.n;
    int64_t head = block.first % heads.n, t = token % p.Tq, seq = token / p.Tq;
    for (int r = 0; r < rows; ++r) {
      set_row(query[r], p, block.sequences ? block.sequences[seq] : b, t, heads[head], window);
      unmasked.add(query[r]);
      const int64_t at = query[r].b * p.q_batch + t * p.q_token + query[r].head * p.q_head;
      for (int64_t i = 0; i < D; i += F::W) (load_floats(p.q, p.dtype, at + i) * scale).store(q + r * D + i);
      if (q_bf16) memcpy(q_bf16 + r * D, static_cast<const uint16_t*>(p.q) + at, D * sizeof(uint16_t));
      m[r] = -INFINITY;
      l[r] = 0.0f;
      if (++head == heads.n) {
        head = 0;
        if (++t == p.Tq) t = 0, ++seq;
      }
    }
  }

  // q' of formats of so many parts.
  const float* rotated_q(int parts) {
    Basis& b = basis[parts - 1];
    if (b.ready) return b.q;
    b.ready = true;
    const float* t = p.transform.balance ? p.transform.balance + k_head * D : nullptr;
    const int32_t* order = parts == 2 && p.transform.order ? p.transform.order + k_head * D : nullptr;
    for (int r = 0; r < rows; ++r) {
      const float* x = q + r * D;
      float* y = b.q + r * D;
      float balanced[256];
      float* z = order ? balanced : y;
      for (int64_t i = 0; i < D; i += F::W) {
        const F v = F::load(x + i);
        (t ? v / F::load(t + i) : v).store(z + i);
      }
      if (order)
        for (int64_t i = 0; i < D; ++i) y[i] = z[order[i]];
    }
    rotate_rows(b.q, D / parts, rows * parts);
    return b.q;
  }

  // q.mu [rows], which centring took from every score.
  const float* add_back() {
    if (mu_ready) return q_mu;
    mu_ready = true;
    const float* mu = p.transform.centre ? p.transform.centre + k_head * D : nullptr;
    for (int r = 0; r < rows; ++r) {
      F dot = F::zero();
      for (int64_t i = 0; mu && i < D; i += F::W) dot = fma(F::load(q + r * D + i), F::load(mu + i), dot);
      q_mu[r] = dot.fold_sum();
    }
    return q_mu;
  }

  // ---- scores

  void scores(const Chunk& c) {
    const Format format = c.pool->k_format;
    const PackedSide& side = state[c.pool_index].k;
    if (side.parts) return gathered ? gathered_side<Side::K>(c) : packed_scores(c, side);
    if (format == Format::kivi2) return kivi2_scores(c);
    const uint8_t* row[kRowChunk];
    row_pointers(c, Side::K, 0, c.pool->k_token, row);
    if (format == Format::f16) return row_scores(LoadF16{row}, D, c.n, q, D, rows, s, ahead, score_share);
#if defined(__AVX512F__)
    if (q_bf16) return bf16_scores(LoadBf16{row}, D, c.n, q_bf16, p.scale, rows, s, ahead, score_share);
#endif
    row_scores(LoadBf16{row}, D, c.n, q, D, rows, s, ahead, score_share);
  }

  void packed_scores(const Chunk& c, const PackedSide& side) {
    const float* x = rotated_q(side.parts);
    if (side.part[0].bits == 8) return u8_scores(c, side.part[0], x);
#if defined(__AVX2__)
    PoolState& st = state[c.pool_index];
    for (int i = 0; i < side.parts; ++i) {
      const CodePart& part = side.part[i];
      if (!st.queries_ready) make_queries(part, digits, x + i * part.channels, D, rows, st.queries[i]);
      code_scores(part, digits, st.queries[i], c, rows, i ? nullptr : add_back(), s, ahead, score_share / side.parts);
    }
    st.queries_ready = true;
#else
    decode_chunk(c, Side::K);
    row_scores(LoadF32{decoded, D}, D, c.n, x, D, rows, s, ahead, score_share);
    const float* base = add_back();
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < c.n; j += F::W) (F::load(s + r * kChunk + j) + F::fill(base[r])).store(s + r * kChunk + j);
#endif
  }

  // row [kRowChunk]: the chunk's tokens, `at` bytes into the side and `stride` apart; the last one repeated.
  static void row_pointers(const Chunk& c, Side side, int64_t at, int64_t stride, const uint8_t** row) {
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* x = pc.side(side) + at + pc.token * stride;
      for (int j = pc.col; j < pc.col + pc.n; ++j, x += stride) row[j] = x;
    }
    for (int j = c.n; j < kRowChunk; ++j) row[j] = row[c.n - 1];
  }

  // Tokens of packed pages, one behind the other as a page of kChunk tokens would hold them: reading the tiles they stand
  // in would cost up to 16 times the bytes. Of kivi2 the scales of K belong to the page, so its tokens stay where they are.
  // Apart from dense attention, which 6 KB of `page` on the stack would make 4 % slower.
  template <Side which>
  [[gnu::noinline]] void gathered_side(const Chunk& c) {
    const PackedSide& from = which == Side::K ? state[c.pool_index].k : state[c.pool_index].v;
    const PackedSide to = packed_side(which == Side::K ? c.pool->k_format : c.pool->v_format, kChunk, D);
    CodeRows rows_from[6], rows_to[6];
    int n = 0;
    from.each_rows([&](const CodeRows& r) { rows_from[n++] = r; });
    n = 0;
    to.each_rows([&](const CodeRows& r) { rows_to[n++] = r; });
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < c.pieces; ++j) {
        const Piece& pc = c.piece[j];
        const int64_t row = rows_to[i].bytes;
        copy_rows(pc.side(which) + rows_from[i].at + pc.token * row, pc.n * row,
                  gathered + rows_to[i].at + pc.col * row);
      }
    Chunk page;
    page.pool = c.pool;
    page.pool_index = c.pool_index;
    page.n = c.n;
    page.pieces = 1;
    page.piece[0] = {gathered, gathered, 0, 0, c.n, 0};
    which == Side::K ? packed_scores(page, to) : packed_sums(page, to);
  }
  // A few bytes, mostly: a call of memcpy would take longer than the copy.
  static void copy_rows(const uint8_t* from, int64_t bytes, uint8_t* to) {
    const auto both_ends = [&](auto word) {
      decltype(word) first, last;
      memcpy(&first, from, sizeof(word));
      memcpy(&last, from + bytes - sizeof(word), sizeof(word));
      memcpy(to, &first, sizeof(word));
      memcpy(to + bytes - sizeof(word), &last, sizeof(word));
    };
    struct Sixteen {
      uint64_t low, high;
    };
    for (; bytes > 32; bytes -= 16, from += 16, to += 16) memcpy(to, from, 16);
    if (bytes >= 16) return both_ends(Sixteen{});
    if (bytes >= 8) return both_ends(uint64_t{});
    if (bytes >= 4) return both_ends(uint32_t{});
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
  }

#if !defined(__AVX2__)
  // The chunk's tokens in fp32, still rotated.
  void decode_chunk(const Chunk& c, Side which) {
    const Format format = which == Side::K ? c.pool->k_format : c.pool->v_format;
    const RowCodec codec = row_codec(format, which, DType::f32, gathered ? kChunk : p.page_size, D);
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      uint8_t* side = const_cast<uint8_t*>(pc.side(which));
      Row row[kRowChunk];
      for (int j = 0; j < pc.n; ++j) row[j] = {nullptr, side, pc.token + j, KeyTransform{}};
      decode_stored(codec, row, pc.n, decoded + pc.col * D);
    }
  }
#endif

  // q.(zero + scale * code) = (q scale).code + q.zero, scale and zero of the page's channels.
  void kivi2_scores(const Chunk& c) {
    float* q_page = decoded;  // [rows][D]
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* scale = pc.k + kivi2::scale_offset(p.page_size, D);
      const uint8_t* zero = pc.k + kivi2::zero_offset(Side::K, p.page_size, D);
      const LoadCode2 codes{pc.k + pc.token * (D / 4), D / 4};
      float part[kMaxRows * kChunk], q_zero[kMaxRows];
      for (int r = 0; r < rows; ++r) {
        F dot = F::zero();
        for (int64_t j = 0; j < D; j += F::W) {
          const F x = F::load(q + r * D + j);
          (x * load<DType::f16>(scale + j * 2)).store(q_page + r * D + j);
          dot = fma(x, load<DType::f16>(zero + j * 2), dot);
        }
        q_zero[r] = dot.fold_sum();
      }
      row_scores(codes, D, pc.n, q_page, D, rows, part, ahead, score_share * pc.n / c.n);
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < pc.n; ++j) s[r * kChunk + pc.col + j] = part[r * kChunk + j] + q_zero[r];
    }
  }

  void u8_scores(const Chunk& c, const CodePart& part, const float* x) {
    float scale[2 * kChunk], score[kMaxRows * kChunk];
    load_scales(part, Side::K, c, scale);
    const float* base = add_back();
    const uint8_t* row[kRowChunk];
    row_pointers(c, Side::K, part.low.at, part.low.bytes, row);
    for (int64_t g = 0; g < part.groups; ++g) {
      row_scores(LoadU8{row}, part.group, c.n, x + g * part.group, D, rows, score, ahead,
                 score_share / static_cast<int>(part.groups));
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < c.n; j += F::W) {
          float* o = s + r * kChunk + j;
          const F sum = g ? F::load(o) : F::fill(base[r]);
          fma(F::load(score + r * kChunk + j), F::load(scale + g * kChunk + j), sum).store(o);
        }
      for (int j = 0; j < kRowChunk; ++j) row[j] += part.group;
    }
  }

  // ---- softmax: S -> P in place; m, l and the sums over V follow the new maximum

  void softmax(const Chunk& c) {
    const int64_t cols = round_up(c.n, kTile);
    const int lines = ahead.share(kAheadSoftmax, 2 * rows);
    const bool masked = c.skip > 0 || c.n < cols || !unmasked.contains(c.start, c.end);
    for (int r = 0; r < rows; ++r) {
      float* x = s + r * kChunk;
      ahead.take(lines);
      if (p.softcap > 0.0f) cap_scores(x, cols);
      if (p.alibi_slopes) add_alibi(x, c, query[r]);
      const F top = masked ? mask(x, c, cols, query[r]) : largest(x, cols);
      const float m_chunk = top.fold_max(), m_new = m_chunk < m[r] ? m[r] : m_chunk;
      // Nothing visible yet: subtract 0, so that -inf gives weight 0 and a NaN score stays a NaN.
      const float base = m_new == -INFINITY ? 0.0f : m_new;
      p_top[r] = m_chunk == -INFINITY ? 0.0f : expf(m_chunk - base);
      ahead.take(lines);
      F sum = F::zero();
      for (int64_t j = 0; j < cols; j += F::W) {
        const F e = exp_neg(F::load(x + j) - F::fill(base));
        e.store(x + j);
        sum = sum + e;
      }
      if (m_new != m[r]) {
        const float f = m[r] == -INFINITY ? 0.0f : expf(m[r] - base);
        l[r] *= f;
        for (int i = 0; i < p.num_pools; ++i)
          if (state[i].acc_used) {
            float* acc = state[i].acc + r * state[i].lanes;
            for (int64_t j = 0; j < state[i].lanes; j += F::W) (F::load(acc + j) * F::fill(f)).store(acc + j);
          }
        m[r] = m_new;
      }
      l[r] += sum.fold_sum();
    }
  }

  static F largest(const float* x, int64_t cols) {
    F top = F::fill(-INFINITY);
    for (int64_t j = 0; j < cols; j += F::W) top = max(top, F::load(x + j));
    return top;
  }

  // What the row does not see becomes -inf. Blends, because stores of single floats would stall the loads behind them.
  F mask(float* x, const Chunk& c, int64_t cols, const QueryRow& r) const {
    int64_t lo = c.skip, hi = c.n;
    if (sees_one_run(p)) {
      const int64_t begin = c.column(r.begin);
      if (begin > lo) lo = begin;
      hi = c.column(r.base + r.t + 1);
    } else {
      hide_tokens(p, r, [&](int64_t position) { return c.column(position); }, x);
    }
    const F none = F::fill(-INFINITY);
    F top = none;
    for (int64_t j = 0; j < cols; j += F::W) {
      F v = F::load(x + j);
      if (hi < j + F::W) v = first(static_cast<int>(clamp(hi - j, F::W)), v, none);
      if (lo > j) v = first(static_cast<int>(clamp(lo - j, F::W)), none, v);
      v.store(x + j);
      top = max(top, v);
    }
    return top;
  }
  static int64_t clamp(int64_t x, int64_t top) { return x < 0 ? 0 : x > top ? top : x; }

  // tanh of v >= 0, where |v| is small by a polynomial: 1 - exp(-2 v) would have lost the digits that a large cap brings back.
  static F tanh_positive(F v) {
    const F small = where_positive(F::fill(0.35f) - v, v), large = v - small, x = small * small;
    F p = F::fill(-8.8632355e-3f);
    p = fma(p, x, F::fill(2.1869489e-2f));
    p = fma(p, x, F::fill(-5.3968254e-2f));
    p = fma(p, x, F::fill(1.3333333e-1f));
    p = fma(p, x, F::fill(-3.3333334e-1f));
    const F e = exp_neg(large * F::fill(-2.0f));
    return fma(p * x, small, small) + (F::fill(1.0f) - e) / (F::fill(1.0f) + e);
  }

  void cap_scores(float* x, int64_t cols) {
    for (int64_t j = 0; j < cols; j += F::W) {
      // bounded, so that v - v below is 0 for an infinite score and NaN for a NaN alone
      const F v = min(F::fill(1e30f), max(F::fill(-1e30f), F::load(x + j) * F::fill(1.0f / p.softcap)));
      const F capped = tanh_positive(abs(v)) * F::fill(p.softcap);
      (where_positive(v, capped) - where_positive(F::zero() - v, capped) + (v - v)).store(x + j);
    }
  }

  void add_alibi(float* x, const Chunk& c, const QueryRow& r) const {
    const float slope = p.alibi_slopes[r.b * p.alibi_stride + r.head];
    const auto add = [&](int64_t distance, float* y, int n) {
      for (int j = 0; j < n; ++j) y[j] -= slope * static_cast<float>(distance - j);
    };
    if (c.one_run())
      add(r.position - c.start, x, c.n);
    else
      for (int i = 0; i < c.pieces; ++i) add(r.position - c.piece[i].start, x + c.piece[i].col, c.piece[i].n);
    if (p.tree_mask && c.end > r.base)  // a token of the tree stands not at its number, but at its depth
      for (int64_t j = 0; j < p.Tq; ++j) {
        const int64_t column = c.column(r.base + j);
        if (column < c.column(r.base + j + 1)) x[column] -= slope * static_cast<float>(j - depth(p, r.b, j));
      }
  }

  // ---- sums over V

  void accumulate(const Chunk& c) {
    PoolState& st = state[c.pool_index];
    if (!st.acc_used) memset(st.acc, 0, sizeof(float) * rows * st.lanes);
    st.acc_used = true;
    const Format format = c.pool->v_format;
    if (st.v.parts) return gathered ? gathered_side<Side::V>(c) : packed_sums(c, st.v);
    if (format == Format::kivi2) return kivi2_sums(c, st);
    const uint8_t* row[kRowChunk];
    row_pointers(c, Side::V, 0, c.pool->v_token, row);
    if (format == Format::f16)
      return row_accumulate(LoadF16{row}, DV, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
#if defined(__AVX512F__)
    if (q_bf16) return bf16_accumulate(LoadBf16{row}, DV, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
#endif
    row_accumulate(LoadBf16{row}, DV, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
  }

  void packed_sums(const Chunk& c, const PackedSide& side) {
    PoolState& st = state[c.pool_index];
    const CodePart& part = side.part[0];
    if (part.bits == 8) return u8_sums(c, part, st);
#if defined(__AVX2__)
    bool few_bits[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      few_bits[r] = light(r);
      for (int64_t j = round_up(c.n, kTile); j < kChunk; j += F::W) F::zero().store(s + r * kChunk + j);
    }
    code_sums(part, digits, c, s, few_bits, rows, codes, st.acc, st.lanes, ahead, kAheadSums);
#else
    decode_chunk(c, Side::V);
    row_accumulate(LoadF32{decoded, D}, D, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
#endif
  }

  // bf16 has 8 bits for p, and so do other kernels that round p to it. Where no token of the chunk holds more than 1/64 of
  // the softmax mass, 8 bits of the chunk's largest weight are as good: 0.1 % of what the chunk adds, rms. Otherwise small
  // weights beside a large one would lose theirs, so they get 15.
  bool light(int r) const { return p.dtype == DType::bf16 && p_top[r] * 64.0f < l[r]; }

  void u8_sums(const Chunk& c, const CodePart& part, PoolState& st) {
    float scale[2 * kChunk], w[kMaxRows * kChunk];
    load_scales(part, Side::V, c, scale);
    const uint8_t* row[kRowChunk];
    row_pointers(c, Side::V, part.low.at, part.low.bytes, row);
    for (int64_t g = 0; g < part.groups; ++g) {
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < c.n; j += F::W) {
          const F x = F::load(s + r * kChunk + j);
          where_positive(x, x * F::load(scale + g * kChunk + j)).store(w + r * kChunk + j);
        }
      row_accumulate(LoadU8{row}, part.group, c.n, w, rows, st.acc + g * part.group, st.lanes, ahead,
                     kAheadSums / static_cast<int>(part.groups));
      for (int j = 0; j < kRowChunk; ++j) row[j] += part.group;
    }
  }

  void kivi2_sums(const Chunk& c, PoolState& st) {
    constexpr int64_t kMaxGroups = 256 / kivi2::v_group;
    const int64_t groups = D / kivi2::v_group;
    float scale[kRowChunk * kMaxGroups], zero[kRowChunk * kMaxGroups];
    const uint8_t* row[kRowChunk];
    row_pointers(c, Side::V, 0, D / 4, row);
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* from = pc.v + kivi2::scale_offset(p.page_size, D) + pc.token * groups * 2;
      const int64_t to_zero = p.page_size * groups * 2;
      for (int64_t j = 0; j < pc.n * groups; ++j) {
        scale[pc.col * groups + j] = half_value(load_u16(from + j * 2));
        zero[pc.col * groups + j] = half_value(load_u16(from + to_zero + j * 2));
      }
    }
    row_accumulate(LoadAffine2{row, scale, zero, groups}, D, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
  }

  // ---- what is visible of the tokens [from, to), and what it gives: out_rows (unnormalised, plain basis), m, l

  // The tasks of `heads` KV heads side by side, chunk by chunk: a page holds the rows of all its heads near each other, and
  // memory is read faster in long runs.
  static void run(Task* task, int heads, int64_t from, int64_t to) {
    Chunk chunk[2];
    int64_t pos = from;
    bool more = task->next_chunk(chunk[0], pos, to), all_ahead = false;  // of chunk i: asked for with the one before
    for (int64_t i = 0; more; ++i) {
      Chunk& c = chunk[i & 1];
      Chunk& next = chunk[(i + 1) & 1];
      more = task->next_chunk(next, pos, to);
      const bool whole = more && to - from >= kWholeTokens && task->side_by_side(*next.pool, heads);
      for (int j = 0; j < heads; ++j) {
        Task& t = task[j];
        t.ahead.clear();
        if (j + 1 < heads && !all_ahead) t.list_lines(c, task[j + 1].k_head - t.k_head, task[j + 1].v_head - t.v_head);
        if (whole)
          t.list_share(next, j);
        else if (more && j + 1 == heads)
          t.list_lines(next, 0, 0);
        t.scores(c);
        t.softmax(c);
        t.accumulate(c);
        t.ahead.take_rest();
        if (j + 1 < heads)
          for (int k = 0; k < c.pieces; ++k) {
            c.piece[k].k += (task[j + 1].k_head - t.k_head) * c.pool->k_head;
            c.piece[k].v += (task[j + 1].v_head - t.v_head) * c.pool->v_head;
          }
      }
      all_ahead = whole;
    }
    for (int j = 0; j < heads; ++j) task[j].finish();
  }

  // The rows of all heads of a token lie side by side, as in caches [num_pages, page_size, Hkv, D], and the task has all
  // heads. Pages are then asked for in the order of memory, a chunk ahead of the first head: on one core of a Zen 5, pages
  // of 16, that is worth a tenth of the time with 8 KV heads and a quarter with 32. Not in a task of few tokens, whose
  // first chunk nobody asked for, and not with smaller pages, which are no long runs.
  static constexpr int64_t kWholeTokens = 8 * kRowChunk, kWholePage = 8;
  bool side_by_side(const Pool& pool, int heads) const {
    const int64_t row = D * 2;
    return D == DV && heads > 1 && heads == p.Hkv && p.page_size >= kWholePage && p.k_share == 1 && p.v_share == 1 &&
           !packed(pool) && pool.k_head == row && pool.v_head == row && pool.k_token == heads * row &&
           pool.v_token == heads * row;
  }
  // Part j of as many as there are heads, of the rows of all heads.
  [[gnu::noinline]] void list_share(const Chunk& c, int j) {
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const int64_t bytes = pc.n * D * 2;
      ahead.add(pc.k + pc.token * c.pool->k_token + j * bytes, bytes);
      ahead.add(pc.v + pc.token * c.pool->v_token + j * bytes, bytes);
    }
  }

  // V of multi-head latent attention is a part of K's row.
  bool v_inside_k(const Pool& pool) const {
    const int64_t at = (pool.v - pool.k) / 2;
    return at >= 0 && at + DV <= D && pool.k_page == pool.v_page && pool.k_head == pool.v_head &&
           pool.k_token == pool.v_token;
  }

  // Of a KV head so many further.
  void list_lines(const Chunk& c, int64_t k_heads, int64_t v_heads) {
    list_side<Side::K>(c, k_heads * c.pool->k_head);
    if (D == DV || !v_inside_k(*c.pool)) list_side<Side::V>(c, v_heads * c.pool->v_head);
  }

  template <Side which>
  void list_side(const Chunk& c, int64_t offset) {
    constexpr bool k = which == Side::K;
    const PackedSide& side = k ? state[c.pool_index].k : state[c.pool_index].v;
    const bool kivi = (k ? c.pool->k_format : c.pool->v_format) == Format::kivi2;
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* x = pc.side(which) + offset;
      if (side.parts) {
        side.each_rows([&](const CodeRows& r) { ahead.add(x + r.at + pc.token * r.bytes, pc.n * r.bytes); });
      } else if (kivi) {
        ahead.add(x + pc.token * (D / 4), pc.n * (D / 4));
        ahead.add(x + kivi2::scale_offset(p.page_size, D),
                  kivi2::side_bytes(which, p.page_size, D) - p.page_size * (D / 4));
      } else {
        const int64_t row_bytes = (k ? D : DV) * 2, stride = k ? c.pool->k_token : c.pool->v_token;
        if (stride == row_bytes)
          ahead.add(x + pc.token * stride, pc.n * stride);
        else
          for (int j = 0; j < pc.n; ++j) ahead.add(x + (pc.token + j) * stride, row_bytes);
      }
    }
  }

  // The chunk of visible tokens from `pos` on, which moves behind it; false: none is left before `to`.
  bool next_chunk(Chunk& c, int64_t& pos, int64_t to) const {
    if (pos >= visible.sink && pos < visible.begin) pos = visible.begin;
    const int64_t limit = pos < visible.sink ? visible.sink : visible.end, end = to < limit ? to : limit;
    if (pos >= end) return false;
    if (runs.index) {
      selected_chunk(c, pos, end);
      return true;
    }
    int64_t index = pos / p.page_size, token = pos - index * p.page_size;
    c.pool_index = table[index] >> 28;
    c.pool = &p.pools[c.pool_index];
    c.skip = packed(*c.pool) ? static_cast<int>(token % kTile) : 0;
    c.start = pos -= c.skip;
    token -= c.skip;
    c.n = c.pieces = 0;
    const int64_t most = read_as_codes(c.pool_index) ? kChunk : kRowChunk;
    for (; c.n < most && pos < end; ++index, token = 0) {
      const int32_t entry = table[index];
      if (entry >> 28 != c.pool_index) break;
      const int64_t page = entry & kPageMask;
      int64_t n = p.page_size - token;
      if (n > end - pos) n = end - pos;
      if (n > most - c.n) n = most - c.n;
      c.piece[c.pieces++] = {c.pool->k + page * c.pool->k_page + k_head * c.pool->k_head,
                             c.pool->v + page * c.pool->v_page + v_head * c.pool->v_head,
                             token,
                             pos,
                             static_cast<int>(n),
                             c.n};
      c.n += static_cast<int>(n);
      pos += n;
    }
    c.end = pos;
    return true;
  }

  // The same along the selected runs, pos < end. Tokens that follow one another in a page are one piece.
  void selected_chunk(Chunk& c, int64_t& pos, int64_t end) const {
    const uint32_t run_tokens = static_cast<uint32_t>(runs.tokens), page_size = static_cast<uint32_t>(p.page_size);
    int64_t run = pos / runs.tokens, in_run = pos - run * runs.tokens, most = 0;
    c.skip = c.n = c.pieces = 0;
    c.pool = nullptr;
    do {
      const uint32_t position = static_cast<uint32_t>(runs.index[run]) * run_tokens + static_cast<uint32_t>(in_run);
      const uint32_t logical = position / page_size, token = position - logical * page_size;
      const int32_t entry = runs.entries ? runs.entries[run] : table[logical];
      if (!c.pool) {
        c.pool_index = entry >> 28;
        c.pool = &p.pools[c.pool_index];
        c.start = position;
        most = read_as_codes(c.pool_index) ? kChunk : kRowChunk;
      } else if (entry >> 28 != c.pool_index) {
        break;
      }
      int64_t n = runs.tokens - in_run;
      if (n > end - pos) n = end - pos;
      if (n > most - c.n) n = most - c.n;
      if (token > 0 && c.n > 0 && c.end == position) {
        c.piece[c.pieces - 1].n += static_cast<int>(n);
      } else {
        const int64_t page = entry & kPageMask;
        c.piece[c.pieces++] = {c.pool->k + page * c.pool->k_page + k_head * c.pool->k_head,
                               c.pool->v + page * c.pool->v_page + v_head * c.pool->v_head,
                               token,
                               position,
                               static_cast<int>(n),
                               c.n};
      }
      c.n += static_cast<int>(n);
      c.end = position + n;
      pos += n;
      ++run;
      in_run = 0;
    } while (c.n < most && pos < end);
  }

  void finish() {
    memset(out_rows, 0, sizeof(float) * rows * DV);
    bool rotated = false;
    for (int i = 0; i < p.num_pools; ++i)
      if (state[i].acc_used && state[i].v.parts) {
        rotated = true;
        for (int r = 0; r < rows; ++r) add_sums(state[i], r);
      }
    if (rotated) rotate_rows(out_rows, D, rows);
    for (int i = 0; i < p.num_pools; ++i)
      if (state[i].acc_used && !state[i].v.parts)
        for (int r = 0; r < rows; ++r) add_sums(state[i], r);
  }

  void add_sums(const PoolState& st, int r) {
    const float* acc = st.acc + r * st.lanes;
    float* out = out_rows + r * DV;
#if defined(__AVX2__)
    if (st.v.as_codes()) return add_lanes(st.v.part[0], acc, out);
#endif
    for (int64_t j = 0; j < DV; j += F::W) (F::load(out + j) + F::load(acc + j)).store(out + j);
  }
};

KK_END
