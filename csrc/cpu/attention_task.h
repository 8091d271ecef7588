// One task: the rows of a block, all of one KV head, against an interval of tokens; K and V are read once for all rows.
//
// Per chunk of 64 or 128 tokens: scores S [rows][chunk] -> online softmax P -> sums over V. How the two sides of a format
// are read:
//   bf16 f16 u8            as fp32 rows (rows.h)
//   u4 u3 u2               as byte codes against integer digits of q and of p * scale (codes.h), 4 products an instruction
//   kivi2                  as fp32 rows, the channels' scales and zero points multiplied into q once per page
//   u4 u3 u2 without AVX2  decoded to fp32 rows first
// Rotated formats see q' = H diag(1/t) q and give their sums in the rotated basis; every pool has its own sums, and they
// are brought to the plain basis once, at the end of the task.
#pragma once
#include "cpu/ahead.h"
#include "cpu/arena.h"
#include "cpu/codec.h"
#include "cpu/codes.h"
#include "cpu/entry.h"
#include "cpu/rows.h"
#include "cpu/selected.h"

KK_BEGIN

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

constexpr int kMaxRows = 64;  // query rows of a task; where there are more, the pages are read again

template <int64_t D>
void rotate_row(float* x) {
  constexpr int N = D / F::W;
  F v[N];
  each<N / 2>([&](auto i) {
    load_split<DType::f32>(reinterpret_cast<const uint8_t*>(x + 2 * F::W * i), v[2 * i], v[2 * i + 1]);
  });
  fwht_split<N>(v);
  each<N>([&](auto i) { (v[i] * F::fill(fwht_scale(D))).store(x + F::W * i); });
}

// One token of u4, u3 or u2 in fp32, still rotated.
template <typename Fmt, int64_t D>
void decode_rotated(const uint8_t* side, int64_t token, int64_t page_size, float* x) {
  constexpr int N = D / F::W;
  F c[N];
  const uint8_t* low = side + token * (D * Fmt::Grid::low_bits / 8);
  const uint8_t* high = side + Fmt::plane1_offset(page_size, D) + token * (D / 8);
  const uint8_t* scale = side + Fmt::scales_offset(page_size, D) + token * Fmt::groups(D) * 2;
  for (int i = 0; i < N; i += 4)
    unpack_codes<Fmt::bits>(low + i / 4 * (F::W / 2) * Fmt::Grid::low_bits, high + i / 4 * (F::W / 2), c + i);
  for (int i = 0; i < N; ++i) {
    const F s = F::fill(half_value(load_u16(scale + i * F::W / kScaleGroup * 2)));
    (s * (c[i] - F::fill(Fmt::Grid::offset))).store(x + i * F::W);
  }
}

// Rotated formats whose codes this file reads.
template <typename Fmt>
constexpr bool reads_codes() {
  if constexpr (Fmt::rotated)
    if constexpr (Fmt::parts == 1) return Fmt::bits >= 2 && sizeof(typename Fmt::Scale::Bits) == 2;
  return false;
}
// 16-bit rows, kivi2 and those.
template <typename Fmt>
constexpr bool readable() {
  if constexpr (!Fmt::packed)
    return true;
  else
    return !Fmt::rotated || reads_codes<Fmt>();
}

inline bool is_packed(Format f) {
  bool r = false;
  with_format(f, [&](auto fmt) { r = decltype(fmt)::packed; });
  return r;
}
inline bool packed(const Pool& pool) { return is_packed(pool.k_format) || is_packed(pool.v_format); }  // on either side

// Tokens that lie together in one page.
struct Piece {
  const uint8_t* k;  // K side of the page and head (packed) or its first row (16-bit caches: rows k_token apart)
  const uint8_t* v;
  int64_t token;  // first token within the page
  int64_t start;  // its position in the sequence
  int n, col;     // tokens, and the first one's column in the chunk
};
struct Chunk {
  const Pool* pool;
  int pool_index;
  int64_t start, end;  // positions of the first token and behind the last one; only of a selection more than n apart
  int skip;            // columns that do not count: a window may begin inside a tile
  int n, pieces;
  Piece piece[kChunk];

  bool one_run() const { return end - start == n; }
  // Columns of tokens before a position.
  int64_t column(int64_t position) const {
    if (position <= start) return 0;
    if (position >= end) return n;
    if (one_run()) return position - start;
    int lo = 0, hi = pieces - 1;  // the first piece that ends behind the position
    while (lo < hi) {
      const int mid = (lo + hi) / 2;
      if (piece[mid].start + piece[mid].n <= position)
        lo = mid + 1;
      else
        hi = mid;
    }
    return piece[lo].col + (position > piece[lo].start ? position - piece[lo].start : 0);
  }
};

// The rows of a task: some of those of group g that read the pages of sequence b.
struct Block {
  int64_t b, g;
  const int32_t* sequences;  // whose rows they are; null: b alone
  Visible visible;
  int64_t first;  // number of the first row: rows are ordered by sequence, token, query head
  int rows;
};

template <int64_t D, int64_t DV, int DIGITS>
struct Task {
  static constexpr int64_t kGroup = D < kScaleGroup ? D : kScaleGroup;  // channels per scale
  static constexpr int64_t kGroups = D / kGroup;
  static constexpr bool kPackedDim = D == DV && (D == 64 || D == 128 || D == 256);

  const AttentionParams& p;
  int rows;
  int64_t k_head, v_head;
  const int32_t* table;  // pages
  Runs runs;             // of a selection
  Visible visible;
  Unmasked unmasked;
  QueryRow* query;
  float *q, *q_rot, *q_mu, *s, *p_top, *m, *l, *out_rows, *decoded;
  uint16_t* q_bf16;  // the queries as they came, where the processor can multiply them so; else null
  uint8_t* codes;
  uint8_t* gathered;  // one side of a page of kChunk tokens, where a selection is of single tokens and pages are packed
  struct PoolState {
    float* acc;      // [rows][lanes] sums over V, in the order and basis the pool's format leaves them in
    int32_t* words;  // digits of q_rot in the order of the pool's K codes
    float* step;     // [rows] value of the last digit
    float* offset;   // [rows][kGroups][DIGITS] offset * sum of digits
    int64_t lanes;
    bool acc_used, words_ready;
  } state[kMaxPools];
  Ahead ahead;
  bool rot_ready = false;
  int score_share = kAheadScores;  // sixteenths of the lines ahead that are asked for while scores are made

  // What `heads` tasks need that take turns.
  static int64_t scratch_bytes(const AttentionParams& p, int64_t rows, int64_t heads) {
    Arena a{nullptr};
    a.take<Task>(heads);
    const Task t(p, a, rows, nullptr);
    for (int64_t j = 1; j < heads; ++j) Task(p, a, rows, &t);
    return a.used;
  }

  // Buffers that hold nothing between two chunks are those of `other`, if there is one.
  Task(const AttentionParams& params, Arena& a, int64_t rows, const Task* other) : p(params) {
    query = a.take<QueryRow>(rows);
    q = a.take<float>(rows * D);
    out_rows = a.take<float>(rows * DV);
    q_bf16 = p.dtype == DType::bf16 && cpu::has_avx512bf16() ? a.take<uint16_t>(rows * D) : nullptr;
    s = other ? other->s : a.take<float>(rows * kChunk);
    q_mu = a.take<float>(rows);
    p_top = a.take<float>(rows);
    m = a.take<float>(rows);
    l = a.take<float>(rows);
    bool any_packed = false;
    for (int i = 0; i < p.num_pools; ++i) any_packed |= packed(p.pools[i]);
    q_rot = any_packed ? a.take<float>(rows * D) : nullptr;
    decoded = other ? other->decoded : any_packed ? a.take<float>(kChunk * D) : nullptr;
    codes = other ? other->codes : any_packed ? a.take<uint8_t>(kChunk * 2 * D) : nullptr;
    const bool gathers = any_packed && p.selection.index && p.selection.tokens == 1;
    gathered = other ? other->gathered : gathers ? a.take<uint8_t>(kChunk * (D + 2 * kGroups)) : nullptr;
    for (int i = 0; i < p.num_pools; ++i) {
      PoolState& st = state[i];
      const bool pk = packed(p.pools[i]);
      st.lanes = pk ? 2 * D : DV;  // u3 sums its two planes apart
      st.acc = a.take<float>(rows * st.lanes);
      st.words = pk ? a.take<int32_t>(rows * DIGITS * D / 2) : nullptr;
      st.step = pk ? a.take<float>(rows) : nullptr;
      st.offset = pk ? a.take<float>(rows * kGroups * DIGITS) : nullptr;
    }
  }

#if defined(__AVX2__)
  template <typename Fmt>
  static constexpr bool uses_codes = [] {
    if constexpr (reads_codes<Fmt>()) return Fmt::bits <= 4;
    return false;
  }();
#else
  template <typename Fmt>
  static constexpr bool uses_codes = false;
#endif

  static bool read_as_codes(const Pool& pool) {
    bool k = false, v = false;
    with_format(pool.k_format, [&](auto fmt) { k = uses_codes<decltype(fmt)>; });
    with_format(pool.v_format, [&](auto fmt) { v = uses_codes<decltype(fmt)>; });
    return k && v;
  }

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
    rot_ready = false;
    for (int i = 0; i < p.num_pools; ++i) state[i].acc_used = state[i].words_ready = false;
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

  // q' = H diag(1/t) q, and q.mu, which centring took from every score.
  void rotate_q() {
    if (rot_ready) return;
    rot_ready = true;
    if constexpr (kPackedDim) {
      const float* mu = p.transform.centre ? p.transform.centre + k_head * D : nullptr;
      const float* t = p.transform.balance ? p.transform.balance + k_head * D : nullptr;
      for (int r = 0; r < rows; ++r) {
        F dot = F::zero();
        for (int64_t i = 0; i < D; i += F::W) {
          const F x = F::load(q + r * D + i);
          if (mu) dot = fma(x, F::load(mu + i), dot);
          (t ? x / F::load(t + i) : x).store(q_rot + r * D + i);
        }
        q_mu[r] = dot.fold_sum();
        rotate_row<D>(q_rot + r * D);
      }
    }
  }

  // ---- scores

  void scores(const Chunk& c) {
    with_format(c.pool->k_format, [&](auto fmt) {
      using Fmt = decltype(fmt);
      if constexpr (!Fmt::packed) {
        const uint8_t* row[kRowChunk];
        row_pointers(c, c.pool->k_token, true, row);
#if defined(__AVX512F__)
        if (same<Fmt, bf16> && q_bf16)
          return bf16_scores<D>(LoadBf16{row}, c.n, q_bf16, p.scale, rows, s, ahead, score_share);
#endif
        if constexpr (same<Fmt, bf16>)
          row_scores<D>(LoadBf16{row}, c.n, q, D, rows, s, ahead, score_share);
        else
          row_scores<D>(LoadF16{row}, c.n, q, D, rows, s, ahead, score_share);
      } else if constexpr (!readable<Fmt>()) {
        fail("attention: this format is not read on the CPU yet");
      } else if constexpr (kPackedDim) {
        gathered ? gathered_side<Fmt, Side::K>(c) : packed_scores<Fmt>(c);
      }
    });
  }

  template <typename Fmt>
  void packed_scores(const Chunk& c) {
    if constexpr (Fmt::rotated) rotate_q();
#if defined(__AVX2__)
    if constexpr (uses_codes<Fmt>) return code_scores<Fmt>(c);
#endif
    if constexpr (same<Fmt, u8>) {
      u8_scores(c);
    } else if constexpr (same<Fmt, kivi2>) {
      kivi2_scores(c);
    } else {
      decode_chunk<Fmt>(Side::K, c);
      row_scores<D>(LoadF32{decoded, D}, c.n, q_rot, D, rows, s, ahead, score_share);
      add_q_mu(c.n);
    }
  }

  // row [kRowChunk]: the chunk's tokens; the last one repeated.
  static void row_pointers(const Chunk& c, int64_t stride, bool k_side, const uint8_t** row) {
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* x = (k_side ? pc.k : pc.v) + pc.token * stride;
      for (int j = pc.col; j < pc.col + pc.n; ++j, x += stride) row[j] = x;
    }
    for (int j = c.n; j < kRowChunk; ++j) row[j] = row[c.n - 1];
  }

  // Tokens of packed pages, one behind the other as a page of kChunk tokens would hold them: reading the tiles they stand
  // in would cost up to 16 times the bytes. Of kivi2 the scales of K belong to the page, so its tokens stay where they are.
  // Apart from dense attention, which 6 KB of `page` on the stack would make 4 % slower.
  template <typename Fmt, Side side>
  [[gnu::noinline]] void gathered_side(const Chunk& c) {
    const auto work = [&](const Chunk& x) { side == Side::K ? packed_scores<Fmt>(x) : packed_sums<Fmt>(x); };
    if constexpr (Fmt::rotated) {
      Chunk page;
      page.pool = c.pool;
      page.pool_index = c.pool_index;
      page.n = c.n;
      page.pieces = 1;
      page.piece[0] = {gathered, gathered, 0, 0, c.n, 0};
      const auto copy = [&](int64_t from, int64_t to, auto bytes) {
        constexpr int64_t row = bytes.value;
        for (int i = 0; i < c.pieces; ++i) {
          const Piece& pc = c.piece[i];
          const uint8_t* x = (side == Side::K ? pc.k : pc.v) + from + pc.token * row;
          uint8_t* y = gathered + to + pc.col * row;
          for (int j = 0; j < pc.n; ++j) memcpy(y + j * row, x + j * row, row);
        }
      };
      copy(0, 0, Int<D * Fmt::Grid::low_bits / 8>{});
      if constexpr (Fmt::bits == 3)
        copy(Fmt::plane1_offset(p.page_size, D), Fmt::plane1_offset(kChunk, D), Int<D / 8>{});
      copy(Fmt::scales_offset(p.page_size, D), Fmt::scales_offset(kChunk, D), Int<kGroups * 2>{});
      work(page);
    } else {
      work(c);
    }
  }
  // Tokens of the pages that rotated formats are read from.
  int64_t page_tokens() const { return gathered ? kChunk : p.page_size; }

  template <typename Fmt>
  void decode_chunk(Side side, const Chunk& c) {
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      for (int j = 0; j < pc.n; ++j)
        decode_rotated<Fmt, D>(side == Side::K ? pc.k : pc.v, pc.token + j, page_tokens(), decoded + (pc.col + j) * D);
    }
  }

  void add_q_mu(int n) {
    if (!p.transform.centre) return;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < n; c += F::W) (F::load(s + r * kChunk + c) + F::fill(q_mu[r])).store(s + r * kChunk + c);
  }

  // fp32 scales of the chunk's tokens, [kGroups][kChunk]. Tiles are read whole: the page goes on to the next multiple of 16.
  template <typename Fmt>
  void load_scales(const Chunk& c, bool k_side, float* scale) {
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint16_t* h =
          reinterpret_cast<const uint16_t*>((k_side ? pc.k : pc.v) + Fmt::scales_offset(page_tokens(), D)) +
          pc.token * kGroups;
      const int64_t n = round_up(pc.n, kTile);
      if constexpr (kGroups == 1) {
        for (int64_t j = 0; j < n; j += F::W) F::load_f16(h + j).store(scale + pc.col + j);
      } else {
        float both[kChunk * kGroups];
        for (int64_t j = 0; j < n * kGroups; j += F::W) F::load_f16(h + j).store(both + j);
        for (int64_t j = 0; j < n * kGroups; ++j) scale[j % kGroups * kChunk + pc.col + j / kGroups] = both[j];
      }
    }
  }

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
      row_scores<D>(codes, pc.n, q_page, D, rows, part, ahead, score_share * pc.n / c.n);
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < pc.n; ++j) s[r * kChunk + pc.col + j] = part[r * kChunk + j] + q_zero[r];
    }
  }

  void kivi2_accumulate(const Chunk& c, PoolState& st) {
    constexpr int64_t groups = D / kivi2::v_group;
    float scale[kRowChunk * groups], zero[kRowChunk * groups];
    const uint8_t* row[kRowChunk];
    row_pointers(c, D / 4, false, row);
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      const uint8_t* from = pc.v + kivi2::scale_offset(p.page_size, D) + pc.token * groups * 2;
      const int64_t to_zero = p.page_size * groups * 2;
      for (int64_t j = 0; j < pc.n * groups; ++j) {
        scale[pc.col * groups + j] = half_value(load_u16(from + j * 2));
        zero[pc.col * groups + j] = half_value(load_u16(from + to_zero + j * 2));
      }
    }
    row_accumulate<D>(LoadAffine2{row, scale, zero, groups}, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
  }

  void u8_scores(const Chunk& c) {
    float scale[kGroups * kChunk], part[kMaxRows * kChunk];
    load_scales<u8>(c, true, scale);
    const uint8_t* row[kRowChunk];
    row_pointers(c, D, true, row);
    for (int64_t g = 0; g < kGroups; ++g) {
      row_scores<kGroup>(LoadU8{row}, c.n, q_rot + g * kGroup, D, rows, part, ahead, score_share / kGroups);
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < c.n; j += F::W) {
          float* o = s + r * kChunk + j;
          const F base = g ? F::load(o) : F::fill(q_mu[r]);
          fma(F::load(part + r * kChunk + j), F::load(scale + g * kChunk + j), base).store(o);
        }
      for (int j = 0; j < kRowChunk; ++j) row[j] += kGroup;
    }
  }

#if defined(__AVX2__)
  // Query rows a dot4 call takes: 4 digit rows share every load of codes.
  static constexpr int kStep = DIGITS == 2 ? 2 : 1;
  template <typename Fmt>
  static constexpr int kPlanes = Fmt::bits == 3 ? 2 : 1;
  template <typename Fmt>
  static constexpr int kMaxCode = Fmt::bits == 4 ? 15 : 4;

  // words [row][digit][scale group][plane][quad]
  template <typename Fmt>
  void make_words(PoolState& st) {
    constexpr int planes = kPlanes<Fmt>;
    constexpr int64_t quads = kGroup / 4;
    for (int r = 0; r < rows; ++r) {
      const float* x = q_rot + r * D;
      F top = F::zero();
      bool finite = true;
      for (int64_t i = 0; i < D; i += F::W) {
        top = max(top, abs(F::load(x + i)));
        finite &= all_finite(F::load(x + i));
      }
      const float biggest = top.fold_max(), inv = biggest > 0.0f ? Digits<DIGITS>::top / biggest : 0.0f;
      st.step[r] = finite ? biggest / Digits<DIGITS>::top : NAN;
      uint8_t digit[DIGITS][D];
      for (int64_t g = 0; g < kGroups; ++g) {
        I sum[DIGITS];
        for (int d = 0; d < DIGITS; ++d) sum[d] = I::zero();
        for (int64_t i = g * kGroup; i < (g + 1) * kGroup; i += F::W) {
          I dig[DIGITS];
          Digits<DIGITS>::split(F::load(x + i) * F::fill(inv), dig);
          for (int d = 0; d < DIGITS; ++d) {
            sum[d] = sum[d] + dig[d];
            dig[d].store_bytes(digit[d] + i);
          }
        }
        float* offset = st.offset + (r * kGroups + g) * DIGITS;
        Digits<DIGITS>::add_up(sum, offset);
        for (int d = 0; d < DIGITS; ++d) offset[d] *= Fmt::Grid::offset;
      }
      for (int d = 0; d < DIGITS; ++d)
        for (int64_t g = 0; g < kGroups; ++g) {
          int32_t* w = st.words + (((r * DIGITS + d) * kGroups) + g) * planes * quads;
          Plane<Fmt::Grid::low_bits, 0>::order_q(digit[d] + g * kGroup, kGroup, reinterpret_cast<uint8_t*>(w));
          if constexpr (planes == 2)
            Plane<1, 2>::order_q(digit[d] + g * kGroup, kGroup, reinterpret_cast<uint8_t*>(w + quads));
        }
    }
  }

  template <typename Fmt>
  void code_scores(const Chunk& c) {
    constexpr int planes = kPlanes<Fmt>;
    constexpr int64_t quads = kGroup / 4, ldw = kGroups * planes * quads;
    constexpr int64_t low_row = D * Fmt::Grid::low_bits / 8, low_group = kGroup * Fmt::Grid::low_bits / 8;
    PoolState& st = state[c.pool_index];
    if (!st.words_ready) make_words<Fmt>(st);
    st.words_ready = true;
    alignas(64) float scale[kGroups * kChunk];
    load_scales<Fmt>(c, true, scale);
    // the pages' rows, I::W tokens at a time
    constexpr int kVectors = kChunk / I::W;
    const uint8_t *low[kVectors + 1], *high[kVectors + 1];
    int vectors = 0;
    for (int i = 0; i < c.pieces; ++i)
      for (int64_t t = c.piece[i].token; t < c.piece[i].token + c.piece[i].n; t += I::W) {
        low[vectors] = c.piece[i].k + t * low_row;
        high[vectors++] = c.piece[i].k + Fmt::plane1_offset(page_tokens(), D) + t * (D / 8);
      }
    constexpr int T = I::W == 16 ? 2 : 1;
    low[vectors] = low[vectors - 1], high[vectors] = high[vectors - 1];  // an odd last one is paired with itself
    constexpr int kRows = DIGITS == 2 ? 4 : 2;                           // at most 8 digit rows: they share every code
    const int blocks = rows / kRows + rows % kRows;
    const int lines = ahead.share(score_share, kGroups * blocks * ((vectors + T - 1) / T));
    for (int64_t g = 0; g < kGroups; ++g) {
      const auto block = [&](auto n, int r) {
        constexpr int R = n.value, M = R * DIGITS;
        const int32_t* words = st.words + r * DIGITS * ldw + g * planes * quads;
        for (int v = 0; v < vectors; v += T) {
          alignas(64) int32_t sums[M][T * I::W];
          ahead.take(lines);
          const uint8_t *rows_low[T], *rows_high[T];
          for (int t = 0; t < T; ++t)
            rows_low[t] = low[v + t] + g * low_group, rows_high[t] = high[v + t] + g * (kGroup / 8);
          Plane<Fmt::Grid::low_bits, 0>::template dot_k<M, T>(rows_low, low_row, low_group, words, ldw, sums[0],
                                                              T * I::W, false);
          if constexpr (planes == 2)
            Plane<1, 2>::template dot_k<M, T>(rows_high, D / 8, kGroup / 8, words + quads, ldw, sums[0], T * I::W,
                                              true);
          for (int i = 0; i < R; ++i) {
            const F step = F::fill(st.step[r + i]);
            for (int t = 0; t < T && v + t < vectors; ++t) {
              float* o = s + (r + i) * kChunk + (v + t) * I::W;
              const F base = g ? F::load(o) : F::fill(q_mu[r + i]);
              const F x = Digits<DIGITS>::join(&sums[i * DIGITS][t * I::W], T * I::W,
                                               st.offset + ((r + i) * kGroups + g) * DIGITS);
              fma(x * step, F::load(scale + g * kChunk + (v + t) * I::W), base).store(o);
            }
          }
        }
      };
      int r = 0;
      for (; r + kRows <= rows; r += kRows) block(Int<kRows>{}, r);
      for (; r < rows; ++r) block(Int<1>{}, r);
    }
  }

  // acc[row][lane] += sum over tokens of p * scale * level
  template <typename Fmt>
  void code_accumulate(const Chunk& c, PoolState& st) {
    constexpr int planes = kPlanes<Fmt>;
    constexpr int64_t lanes = planes * D, low_row = D * Fmt::Grid::low_bits / 8, quads = kChunk / 4;
    alignas(64) float scale[kGroups * kChunk];
    load_scales<Fmt>(c, false, scale);
    const int64_t cols = round_up(c.n, kTile);
    const int lines = ahead.share(kAheadSums, cols / 4);
    for (int i = 0; i < c.pieces; ++i) {
      const Piece& pc = c.piece[i];
      for (int64_t t = 0; t < round_up(pc.n, kTile); t += 4) {
        uint8_t* out = codes + (pc.col + t) / 4 * lanes * 4;
        ahead.take(lines);
        Plane<Fmt::Grid::low_bits, 0>::template unpack_v<D>(pc.v + (pc.token + t) * low_row, low_row, out);
        if constexpr (planes == 2)
          Plane<1, 2>::template unpack_v<D>(pc.v + Fmt::plane1_offset(page_tokens(), D) + (pc.token + t) * (D / 8),
                                            D / 8, out + D * 4);
      }
    }
    for (int64_t g = 0; g < kGroups; ++g) {
      const auto block = [&](auto n_rows, auto n_digits, int r) {
        constexpr int R = n_rows.value, N = n_digits.value;
        alignas(64) uint8_t words[R * N][kChunk];
        alignas(64) int32_t ints[R * N][kGroup];
        float step[R], mass[R][N];
        for (int i = 0; i < R; ++i)
          step[i] = weigh<N>(s + (r + i) * kChunk, scale + g * kChunk, cols, words[i * N], mass[i]);
        for (int plane = 0; plane < planes; ++plane) {
          const int64_t lane0 = plane * D + g * kGroup;
          // The mean code of the plane; 3.5 is 1.5 + 2. Sums of what differs from it stay small, so fp32 holds them well.
          const float level = planes == 1 ? Fmt::Grid::offset : plane == 0 ? 1.5f : 2.0f;
          dot4<kMaxCode<Fmt>, R * N, N == 1>(codes + lane0 * 4, lanes * 4, kGroup, cols / 4,
                                             reinterpret_cast<const int32_t*>(words[0]), quads, ints[0], kGroup);
          for (int i = 0; i < R; ++i) {
            float offset[N];
            for (int d = 0; d < N; ++d) offset[d] = level * mass[i][d];
            for (int64_t j = 0; j < kGroup; j += F::W) {
              float* o = st.acc + (r + i) * st.lanes + lane0 + j;
              fma(Digits<N>::join(ints[i * N] + j, kGroup, offset), F::fill(step[i]), F::load(o)).store(o);
            }
          }
        }
      };
      int r = 0;
      while (r < rows) {
        if (rows - r >= 4 && light(r) && light(r + 1) && light(r + 2) && light(r + 3)) {
          block(Int<4>{}, Int<1>{}, r);
          r += 4;
        } else if (rows - r >= kStep) {
          block(Int<kStep>{}, Int<DIGITS>{}, r);
          r += kStep;
        } else {
          block(Int<1>{}, Int<DIGITS>{}, r);
          r += 1;
        }
      }
    }
  }

  // bf16 has 8 bits for p, and so do other kernels that round p to it. Where no token of the chunk holds more than 1/64 of
  // the softmax mass, 8 bits of the chunk's largest weight are as good: 0.1 % of what the chunk adds, rms. Otherwise small
  // weights beside a large one would lose theirs, so they get 15.
  bool light(int r) const { return p.dtype == DType::bf16 && p_top[r] * 64.0f < l[r]; }

  // N digits of w = p * scale, four tokens to a word, and what they add up to; returns the value of the last digit.
  template <int N>
  static float weigh(const float* prob, const float* scale, int64_t cols, uint8_t* words, float* mass) {
    F w[kChunk / F::W], top = F::zero(), total = F::zero();
    for (int64_t j = 0; j < cols; j += F::W) {
      const F x = F::load(prob + j);
      w[j / F::W] = where_positive(x, x * F::load(scale + j));  // rows nobody sees may hold NaN
      top = max(top, w[j / F::W]);
      total = total + w[j / F::W];
    }
    const float biggest = top.fold_max();
    const F inv = F::fill(biggest > 0.0f ? Digits<N>::top / biggest : 0.0f);
    I sums[N];
    for (int d = 0; d < N; ++d) sums[d] = I::zero();
    for (int64_t j = 0; j < cols; j += F::W) {
      I dig[N];
      Digits<N>::split(w[j / F::W] * inv, dig);
      for (int d = 0; d < N; ++d) {
        sums[d] = sums[d] + dig[d];
        dig[d].store_bytes(words + d * kChunk + j);
      }
    }
    Digits<N>::add_up(sums, mass);
    return all_finite(total) ? biggest / Digits<N>::top : NAN;  // a NaN scale must not get lost among the digits
  }
#endif

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

  void cap_scores(float* x, int64_t cols) {
    for (int64_t j = 0; j < cols; j += F::W) {
      // bounded, so that v - v below is 0 for an infinite score and NaN for a NaN alone
      const F v = min(F::fill(1e30f), max(F::fill(-1e30f), F::load(x + j) * F::fill(1.0f / p.softcap)));
      const F e = exp_neg(abs(v) * F::fill(-2.0f));
      const F tanh_abs = (F::fill(1.0f) - e) / (F::fill(1.0f) + e) * F::fill(p.softcap);
      (where_positive(v, tanh_abs) - where_positive(F::zero() - v, tanh_abs) + (v - v)).store(x + j);
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
    with_format(c.pool->v_format, [&](auto fmt) {
      using Fmt = decltype(fmt);
      if constexpr (!Fmt::packed) {
        const uint8_t* row[kRowChunk];
        row_pointers(c, c.pool->v_token, false, row);
#if defined(__AVX512F__)
        if (same<Fmt, bf16> && q_bf16)
          return bf16_accumulate<DV>(LoadBf16{row}, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
#endif
        if constexpr (same<Fmt, bf16>)
          row_accumulate<DV>(LoadBf16{row}, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
        else
          row_accumulate<DV>(LoadF16{row}, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
      } else if constexpr (!readable<Fmt>()) {
        fail("attention: this format is not read on the CPU yet");
      } else if constexpr (kPackedDim) {
        gathered ? gathered_side<Fmt, Side::V>(c) : packed_sums<Fmt>(c);
      }
    });
  }

  template <typename Fmt>
  void packed_sums(const Chunk& c) {
    PoolState& st = state[c.pool_index];
#if defined(__AVX2__)
    if constexpr (uses_codes<Fmt>) return code_accumulate<Fmt>(c, st);
#endif
    if constexpr (same<Fmt, u8>) {
      u8_accumulate(c, st);
    } else if constexpr (same<Fmt, kivi2>) {
      kivi2_accumulate(c, st);
    } else {
      decode_chunk<Fmt>(Side::V, c);
      row_accumulate<D>(LoadF32{decoded, D}, c.n, s, rows, st.acc, st.lanes, ahead, kAheadSums);
    }
  }

  void u8_accumulate(const Chunk& c, PoolState& st) {
    float scale[kGroups * kChunk], w[kMaxRows * kChunk];
    load_scales<u8>(c, false, scale);
    const uint8_t* row[kRowChunk];
    row_pointers(c, D, false, row);
    for (int64_t g = 0; g < kGroups; ++g) {
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < c.n; j += F::W) {
          const F x = F::load(s + r * kChunk + j);
          where_positive(x, x * F::load(scale + g * kChunk + j)).store(w + r * kChunk + j);
        }
      row_accumulate<kGroup>(LoadU8{row}, c.n, w, rows, st.acc + g * kGroup, st.lanes, ahead, kAheadSums / kGroups);
      for (int j = 0; j < kRowChunk; ++j) row[j] += kGroup;
    }
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
    constexpr int64_t row = D * 2;
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
  static bool v_inside_k(const Pool& pool) {
    const int64_t at = (pool.v - pool.k) / 2;
    return at >= 0 && at + DV <= D && pool.k_page == pool.v_page && pool.k_head == pool.v_head &&
           pool.k_token == pool.v_token;
  }

  // Of a KV head so many further.
  void list_lines(const Chunk& c, int64_t k_heads, int64_t v_heads) {
    list_side<Side::K>(c, k_heads * c.pool->k_head);
    if (D == DV || !v_inside_k(*c.pool)) list_side<Side::V>(c, v_heads * c.pool->v_head);
  }

  template <Side side>
  void list_side(const Chunk& c, int64_t offset) {
    constexpr bool k = side == Side::K;
    with_format(k ? c.pool->k_format : c.pool->v_format, [&](auto fmt) {
      using Fmt = decltype(fmt);
      for (int i = 0; i < c.pieces; ++i) {
        const Piece& pc = c.piece[i];
        const uint8_t* x = (k ? pc.k : pc.v) + offset;
        if constexpr (!Fmt::packed) {
          constexpr int64_t row_bytes = (k ? D : DV) * 2;
          const int64_t stride = k ? c.pool->k_token : c.pool->v_token;
          if (stride == row_bytes)
            ahead.add(x + pc.token * stride, pc.n * stride);
          else
            for (int j = 0; j < pc.n; ++j) ahead.add(x + (pc.token + j) * stride, row_bytes);
        } else if constexpr (reads_codes<Fmt>()) {
          constexpr int64_t low_row = D * Fmt::Grid::low_bits / 8;
          ahead.add(x + pc.token * low_row, pc.n * low_row);
          if (Fmt::bits == 3) ahead.add(x + Fmt::plane1_offset(p.page_size, D) + pc.token * (D / 8), pc.n * (D / 8));
          ahead.add(x + Fmt::scales_offset(p.page_size, D) + pc.token * kGroups * 2, pc.n * kGroups * 2);
        } else if constexpr (!Fmt::rotated) {
          ahead.add(x + pc.token * (D / 4), pc.n * (D / 4));
          ahead.add(x + kivi2::scale_offset(p.page_size, D),
                    kivi2::side_bytes(side, p.page_size, D) - p.page_size * (D / 4));
        }
      }
    });
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
    const int64_t most = read_as_codes(*c.pool) ? kChunk : kRowChunk;
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
        most = read_as_codes(*c.pool) ? kChunk : kRowChunk;
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
    if constexpr (kPackedDim) {
      bool rotated = false;
      for (int i = 0; i < p.num_pools; ++i)
        if (state[i].acc_used)
          with_format(p.pools[i].v_format, [&](auto fmt) {
            using Fmt = decltype(fmt);
            if constexpr (reads_codes<Fmt>()) {
              rotated = true;
              for (int r = 0; r < rows; ++r) add_lanes<Fmt>(state[i].acc + r * state[i].lanes, out_rows + r * D);
            }
          });
      if (rotated)
        for (int r = 0; r < rows; ++r) rotate_row<D>(out_rows + r * D);
    }
    for (int i = 0; i < p.num_pools; ++i)
      if (state[i].acc_used)
        with_format(p.pools[i].v_format, [&](auto fmt) {
          if constexpr (!decltype(fmt)::rotated)
            for (int r = 0; r < rows; ++r)
              for (int64_t j = 0; j < DV; j += F::W) {
                float* o = out_rows + r * DV + j;
                (F::load(o) + F::load(state[i].acc + r * state[i].lanes + j)).store(o);
              }
        });
  }

  template <typename Fmt>
  static void add_lanes(const float* acc, float* out) {
#if defined(__AVX2__)
    if constexpr (uses_codes<Fmt>) {
      static constexpr LaneOf<Plane<Fmt::Grid::low_bits, 0>> low;
      for (int64_t i = 0; i < D; ++i) out[i] += acc[low.lane[i]];
      if constexpr (kPlanes<Fmt> == 2) {
        static constexpr LaneOf<Plane<1, 2>> high;
        for (int64_t i = 0; i < D; ++i) out[i] += acc[D + high.lane[i]];
      }
      return;
    }
#endif
    for (int64_t i = 0; i < D; ++i) out[i] += acc[i];
  }
#if defined(__AVX2__)
  template <typename P>
  struct LaneOf {  // the lane that holds a channel
    int32_t lane[D];
    constexpr LaneOf() : lane() {
      for (int64_t i = 0; i < D; ++i) lane[P::v_channel(i, D)] = static_cast<int32_t>(i);
    }
  };
#endif
};

template <typename T>
struct Type {
  using type = T;
};

// f(Type<Task of the call>{}). Where nothing is packed, the digits do not matter.
template <typename Fn>
inline void with_task(const AttentionParams& p, Fn&& f) {
  one_of<64, 80, 96, 112, 128, 192, 256, 576>("attention: head_dim", p.D, [&](auto d) {
    constexpr int64_t D = decltype(d)::value, DV = D == 576 ? 512 : D;
    if constexpr (Task<D, DV, 2>::kPackedDim)
      if (p.dtype == DType::f32) return f(Type<Task<D, DV, 3>>{});
    f(Type<Task<D, DV, 2>>{});
  });
}

KK_END
