// Scores and sums of pages of codes (codes.h). One object for all that read them: the inner loops below take as long to
// compile as the rest of attention.
#include "cpu/codes.h"

#include "cpu/arena.h"
#include "cpu/planes.h"
#include "cpu/row_vectors.h"

KK_BEGIN

void load_scales(const CodePart& part, Side side, const Chunk& c, float* scale) {
  const int64_t groups = part.groups;
  float pairs[kChunk * 2];
  for (int i = 0; i < c.pieces; ++i) {
    const Piece& pc = c.piece[i];
    const uint8_t* from = pc.side(side) + part.scales.at + pc.token * part.scales.bytes;
    const int64_t n = round_up(pc.n, kTile) * groups;
    float* to = groups == 1 ? scale + pc.col : pairs;
    if (part.wide_scales())
      for (int64_t j = 0; j < n; j += F::W) F::load_f16(reinterpret_cast<const uint16_t*>(from) + j).store(to + j);
    else
      for (int64_t j = 0; j < n; j += F::W) F::load_e5m3(from + j).store(to + j);
    if (groups == 2)
      for (int64_t j = 0; j < n; ++j) scale[j % 2 * kChunk + pc.col + j / 2] = pairs[j];
  }
}

#if defined(__AVX2__)

namespace {

// x = step * (128^(n-1) d_0 + ... + d_(n-1)) with signed 7-bit digits: two carry 15 bits (enough for 16-bit queries, whose
// own rounding is larger), three carry 22 (fp32 queries). One digit is an unsigned byte: 8 bits, for x >= 0.
template <int N>
struct Digits {
  static constexpr float top = N == 1 ? 255.0f : N == 2 ? 127.0f * 128 : 127.0f * 128 * 128;
  // Sums of digit * code are joined to one number per lane. Of two digits as integers: below 2^24 for codes of 2 and 3 bits,
  // so exact in fp32, and off by less than a digit's own rounding for 4. Of three apart, each less its share of the offset.

  // x / step, |x / step| <= top
  static void split(F scaled, I* d) {
    I rest = I::from_float(scaled);
    for (int i = N - 1; i > 0; --i) {
      const I up = (rest + I::fill(64)).template sra<7>();
      d[i] = rest - up.template sll<7>();
      rest = up;
    }
    d[0] = rest;
  }
  // Sums of the digits, joined as far as `join` joins them. What it subtracts is the mean code times this.
  static void add_up(const I* d, float* mass) {
    if constexpr (N == 2)
      mass[0] = (d[0].template sll<7>() + d[1]).to_float().fold_sum();
    else
      for (int i = 0; i < N; ++i) mass[i] = d[i].to_float().fold_sum();
  }
  // sums[d * ld]: of digit d.
  [[gnu::always_inline]] static F join(const I* sums, int ld, const float* offset) {
    if constexpr (N == 2) {
      return (sums[0].template sll<7>() + sums[ld]).to_float() - F::fill(offset[0]);
    } else {
      F v = sums[0].to_float() - F::fill(offset[0]);
      for (int i = 1; i < N; ++i) v = fma(v, F::fill(128.0f), sums[i * ld].to_float() - F::fill(offset[i]));
      return v;
    }
  }
};

// f(kind of codes of a part).
template <typename Fn>
void with_plane(const CodePart& part, Fn&& f) {
  switch (part.bits) {
    case 0:
      return f(Trits{});
    case 1:
      return f(Plane<1>{});
    case 2:
      return f(Plane<2>{});
    case 3:
      return f(ThreeBits{});
    case 4:
      return f(Plane<4>{});
  }
}

// ---- queries

template <int DIGITS>
void split_queries(const CodePart& part, const float* q, int64_t ldq, int rows, const CodeQueries& out) {
  const int64_t groups = part.groups;
  float* offset = out.offset;
  for (int r = 0; r < rows; ++r) {
    const float* x = q + r * ldq;
    F top = F::zero();
    bool finite = true;
    for (int64_t i = 0; i < part.channels; i += F::W) {
      top = max(top, abs(F::load(x + i)));
      finite &= all_finite(F::load(x + i));
    }
    const float biggest = top.fold_max(), inv = biggest > 0.0f ? Digits<DIGITS>::top / biggest : 0.0f;
    out.step[r] = finite ? biggest / Digits<DIGITS>::top : NAN;
    for (int64_t g = 0; g < groups; ++g, offset += DIGITS) {
      uint8_t digit[DIGITS][kScaleGroup];
      I sum[DIGITS];
      for (int d = 0; d < DIGITS; ++d) sum[d] = I::zero();
      for (int64_t i = 0; i < part.group; i += F::W) {
        I dig[DIGITS];
        Digits<DIGITS>::split(F::load(x + g * part.group + i) * F::fill(inv), dig);
        for (int d = 0; d < DIGITS; ++d) {
          sum[d] = sum[d] + dig[d];
          dig[d].store_bytes(digit[d] + i);
        }
      }
      Digits<DIGITS>::add_up(sum, offset);
      for (int d = 0; d < DIGITS; ++d) {
        offset[d] *= part.mean;
        uint8_t* words = reinterpret_cast<uint8_t*>(out.words + ((g * rows + r) * DIGITS + d) * kQuads);
        with_plane(part, [&](auto plane) { decltype(plane)::order_q(digit[d], part.group, words); });
      }
    }
  }
}

// ---- scores

// w[i] = word i of I::W rows, `stride` bytes apart; rows of fewer than 4 words stand close together, or begin with them.
template <int W>
[[gnu::always_inline]] inline void load_words(const uint8_t* r, int64_t stride, I (&w)[4]) {
  if constexpr (W == 1) {
    w[0] = I::load(r);
  } else if constexpr (W == 2) {
    w[0] = I::load(r);
    w[1] = I::load(r + I::W * 4);
    deinterleave(w[0], w[1]);
  } else {
    // 4x4 transposes of words: lane group L of z_i is token 4L + i, so the result runs through the tokens in order
    const I z0 = I::load_lanes(r, stride), z1 = I::load_lanes(r + stride, stride);
    const I z2 = I::load_lanes(r + 2 * stride, stride), z3 = I::load_lanes(r + 3 * stride, stride);
    const I lo01 = unpack_lo32(z0, z1), hi01 = unpack_hi32(z0, z1), lo23 = unpack_lo32(z2, z3),
            hi23 = unpack_hi32(z2, z3);
    w[0] = unpack_lo64(lo01, lo23);
    w[1] = unpack_hi64(lo01, lo23);
    w[2] = unpack_lo64(hi01, hi23);
    w[3] = unpack_hi64(hi01, hi23);
  }
}

template <typename P, int M, int T, int p = 0>
[[gnu::always_inline]] inline void dot_fields(typename P::Word (&w)[T], const int32_t* words, I (&acc)[M][T]) {
  I c[T];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) c[t] = P::template field<p>(w[t]);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const I q = I::fill(words[m * kQuads + p]);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
#if defined(__AVX512VNNI__)
      acc[m][t] = I::dot(acc[m][t], c[t], q);
#else
      acc[m][t] = I::dot16(acc[m][t], c[t], q);
#endif
    }
  }
  if constexpr (p + 1 < P::per_byte) dot_fields<P, M, T, p + 1>(w, words, acc);
}

// acc[m][t] += W words of the tokens of tile t . words[m].
template <typename P, int W, int M, int T>
[[gnu::always_inline]] inline void dot_words(const typename P::Word (&w)[T][4], const int32_t* words, I (&acc)[M][T]) {
#if defined(__AVX512VNNI__)
  I(&part)[M][T] = acc;
#else
  // Pairs of products are summed in 16 bits; 16 bytes of a row are 4 * per_byte quads of at most 2 * 127 * code each:
  // 8128 (1 bit), 10160 (trits), 12192 (2 bits), 28448 (3 bits), 30480 (4 bits).
  I part[M][T];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (I& x : part[m]) x = I::zero();
#endif
#pragma GCC unroll 1
  for (int i = 0; i < W; ++i) {
    typename P::Word x[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) x[t] = w[t][i];
    dot_fields<P, M, T>(x, words + i * P::per_byte, part);
  }
#if !defined(__AVX512VNNI__)
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) acc[m][t] = I::widen(acc[m][t], part[m][t]);
#endif
}

template <typename P, int W, int M, int T>
[[gnu::always_inline]] inline void dot_rows(const uint8_t* const (&rows)[T], int64_t stride, const int32_t* words,
                                            I (&acc)[M][T]) {
  I w[T][4];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) load_words<W>(rows[t], stride, w[t]);
  dot_words<P, W>(w, words, acc);
}

// The same for all words of a group, `bytes` of each row.
template <typename P, int M, int T>
[[gnu::always_inline]] inline void dot_group(const uint8_t* (&rows)[T], int64_t stride, int64_t bytes,
                                             const int32_t* words, I (&acc)[M][T]) {
  if constexpr (P::shortest < 8)
    if (bytes == 4) return dot_rows<P, 1>(rows, stride, words, acc);
  if constexpr (P::shortest < 16)
    if (bytes == 8) return dot_rows<P, 2>(rows, stride, words, acc);
  for (; bytes > 12; bytes -= 16, words += 4 * P::per_byte) {
    dot_rows<P, 4>(rows, stride, words, acc);
    for (const uint8_t*& r : rows) r += 16;
  }
  if constexpr (P::has_rest)
    if (bytes > 0) dot_rows<P, 3>(rows, stride, words, acc);
}

// Codes of 3 bits: W words of the low rows with W / 2 of the high ones, `high` those of the rows.
template <int W, int M, int T>
[[gnu::always_inline]] inline void dot_three(const uint8_t* const (&low)[T], int64_t stride, const I (&high)[T][2],
                                             const int32_t* words, I (&acc)[M][T]) {
  ThreeBits::Word w[T][4];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    I x[4];
    load_words<W>(low[t], stride, x);
    w[t][0] = {x[0], ThreeBits::high_bits<0>(high[t][0])};
    w[t][1] = {x[1], ThreeBits::high_bits<1>(high[t][0])};
    if constexpr (W == 4) {
      w[t][2] = {x[2], ThreeBits::high_bits<0>(high[t][1])};
      w[t][3] = {x[3], ThreeBits::high_bits<1>(high[t][1])};
    }
  }
  dot_words<ThreeBits, W>(w, words, acc);
}
// A group: so many words of the high rows.
template <int HIGH, int M, int T>
[[gnu::always_inline]] inline void dot_three_rows(const uint8_t* (&low)[T], int64_t stride,
                                                  const uint8_t* const (&high)[T], int64_t high_stride,
                                                  const int32_t* words, I (&acc)[M][T]) {
  I h[T][4], two[T][2];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    load_words<HIGH>(high[t], high_stride, h[t]);
    two[t][0] = h[t][0];
    if constexpr (HIGH > 1) two[t][1] = h[t][1];
  }
  dot_three<HIGH == 1 ? 2 : 4>(low, stride, two, words, acc);
  if constexpr (HIGH == 4) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) low[t] += 16, two[t][0] = h[t][2], two[t][1] = h[t][3];
    dot_three<4>(low, stride, two, words + 4 * ThreeBits::per_byte, acc);
  }
}

struct Tile {  // of tokens, I::W of them
  const uint8_t* side;
  int64_t token;
};

// Where the scores of a few rows in a group come from and go.
struct ScoreRows {
  const int32_t* words;  // [rows][digits][kQuads]
  const float *step, *offset;
  int64_t ld_offset;
  const float* scale;
  float* s;  // [rows][kChunk]
};

// s += scores of R rows and T tiles of tokens, in one group. The codes go from memory to the dot product without being stored:
// R * DIGITS * T sums and the words of 16 bytes a row stay in registers.
template <int R, int DIGITS, int T, typename P>
[[gnu::noinline]] void add_scores(const CodePart& part, int64_t g, const Tile* tile, const ScoreRows& q) {
  constexpr int M = R * DIGITS;
  I acc[M][T];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) acc[m][t] = I::zero();
  const int64_t bytes = P::bytes(part.group);
  const uint8_t* rows[T];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) rows[t] = tile[t].side + part.low.at + tile[t].token * part.low.bytes + g * bytes;
  if constexpr (P::two_rows) {
    const uint8_t* high[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) high[t] = tile[t].side + part.high.at + tile[t].token * part.high.bytes + g * bytes / 2;
    const int64_t low_stride = part.low.bytes, high_stride = part.high.bytes;
    if (bytes == 8) dot_three_rows<1>(rows, low_stride, high, high_stride, q.words, acc);
    if (bytes == 16) dot_three_rows<2>(rows, low_stride, high, high_stride, q.words, acc);
    if (bytes == 32) dot_three_rows<4>(rows, low_stride, high, high_stride, q.words, acc);
  } else {
    dot_group<P>(rows, part.low.bytes, bytes, q.words, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const F step = F::fill(q.step[r]);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      float* o = q.s + r * kChunk + t * I::W;
      const F x = Digits<DIGITS>::join(&acc[r * DIGITS][t], T, q.offset + r * q.ld_offset) * step;
      fma(x, F::load(q.scale + t * I::W), F::load(o)).store(o);
    }
  }
}

template <int DIGITS>
void scores_of(const CodePart& part, const CodeQueries& q, const Chunk& c, int rows, const float* base, float* s,
               Ahead& ahead, int sixteenths) {
  const int64_t groups = part.groups;
  alignas(64) float scale[2 * kChunk];
  load_scales(part, Side::K, c, scale);
  // I::W tokens at a time
  constexpr int T = I::W == 16 ? 2 : 1;
  Tile tile[kChunk / I::W + 1];
  int tiles = 0;
  for (int i = 0; i < c.pieces; ++i)
    for (int64_t t = c.piece[i].token; t < c.piece[i].token + c.piece[i].n; t += I::W)
      tile[tiles++] = {c.piece[i].k, t};
  tile[tiles] = tile[tiles - 1];              // an odd last one is paired with itself
  constexpr int kRows = DIGITS == 2 ? 4 : 2;  // at most 8 digit rows: they share every code
  const int blocks = rows / kRows + rows % kRows;
  const int lines = ahead.share(sixteenths, groups * blocks * ((tiles + T - 1) / T));
  for (int r = 0; base && r < rows; ++r)
    for (int64_t j = 0; j < tiles * I::W; j += F::W) F::fill(base[r]).store(s + r * kChunk + j);
  decltype(&add_scores<1, DIGITS, T, Trits>) add_rows = nullptr, add_row = nullptr;
  with_plane(part, [&](auto plane) {
    add_rows = add_scores<kRows, DIGITS, T, decltype(plane)>;
    add_row = add_scores<1, DIGITS, T, decltype(plane)>;
  });
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0, n; r < rows; r += n) {
      n = r + kRows <= rows ? kRows : 1;
      for (int v = 0; v < tiles; v += T) {
        ahead.take(lines);
        const int64_t at = v * I::W;
        (n == 1 ? add_row : add_rows)(
            part, g, tile + v,
            {q.words + (g * rows + r) * DIGITS * kQuads, q.step + r, q.offset + (r * groups + g) * DIGITS,
             groups * DIGITS, scale + g * kChunk + at, s + r * kChunk + at});
      }
    }
}

// ---- sums

constexpr int64_t kVector = I::W * 4, kWords = kChunk / 4;

template <typename Fn>
void with_v_rows(const CodePart& part, Fn&& f) {
  with_plane(part, [&](auto plane) {
    using P = decltype(plane);
    if constexpr (I::W == 16 && P::shortest == 4)
      if (P::bytes(part.group) == 8) return f(VHalfRows<P>{});
    f(VRows<P>{});
  });
}

// The rows of the chunk's tokens, interleaved: out [groups][vectors][kWords] vectors.
template <typename Rows, int64_t n, bool nibbles>
void interleave_rows(const CodePart& part, const CodeRows& rows, const Chunk& c, uint8_t* out, Ahead& ahead,
                     int lines) {
  constexpr int64_t bytes = Rows::Fields::bytes(n), halves = kVector / 32;
  const int64_t groups = part.groups, stride = rows.bytes, group_bytes = nibbles ? bytes / 2 : bytes;
  for (int i = 0; i < c.pieces; ++i) {
    const Piece& pc = c.piece[i];
    const uint8_t* row = pc.v + rows.at + pc.token * stride;
    uint8_t* to = out + pc.col / 4 * kVector;
    for (const uint8_t* end = row + pc.n * stride; row < end; row += kTile * stride, to += kTile / 4 * kVector) {
      ahead.take(lines);
      for (int64_t g = 0; g < groups; ++g)
        for (int k = 0; k < kTile / 4; ++k)
          Rows::template interleave<bytes, nibbles>(
              row + 4 * k * stride + g * group_bytes, stride, [&](int64_t h) __attribute__((always_inline)) {
                return to + ((g * Rows::vectors(n) + h / halves) * kWords + k) * kVector + h % halves * 32;
              });
    }
  }
}

inline I load_word(const uint8_t* x, int64_t, I) { return I::load(x); }
inline ThreeBits::Word load_word(const uint8_t* x, int64_t high, ThreeBits::Word) {
  return {I::load(x), I::load(x + high)};
}

// sum[u][p][m] += field first + p of vector u, of one word, . w[m]. The instructions take one unsigned and one signed factor;
// codes fit either, so words may be signed digits or (UNSIGNED) bytes up to 255.
template <typename P, int first, bool UNSIGNED, int p = 0, int FIELDS, int M>
[[gnu::always_inline]] inline void dot_fields(typename P::Word& x, const I (&w)[M], I (&sum)[FIELDS][M]) {
  const I c = P::template field<first + p>(x);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const I u8 = UNSIGNED ? w[m] : c, s8 = UNSIGNED ? c : w[m];
#if defined(__AVX512VNNI__)
    sum[p][m] = I::dot(sum[p][m], u8, s8);
#else
    sum[p][m] = I::dot16(sum[p][m], u8, s8);
#endif
  }
  if constexpr (p + 1 < FIELDS) dot_fields<P, first, UNSIGNED, p + 1>(x, w, sum);
}

// The same for words [0, n) of U vectors, kWords vectors apart.
template <typename P, int first, bool UNSIGNED, int U, int FIELDS, int M>
[[gnu::always_inline]] inline void dot_vectors(const uint8_t* x, int64_t high, int64_t n, const int32_t* words,
                                               I (&sum)[U][FIELDS][M]) {
  for (int64_t k = 0; k < n; ++k) {
    I w[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) w[m] = I::fill(words[m * kWords + k]);
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      typename P::Word v =
          P::template from_field<first>(load_word(x + (u * kWords + k) * kVector, high, typename P::Word{}));
      dot_fields<P, first, UNSIGNED>(v, w, sum[u]);
    }
  }
}

// Sums of the fields first, first + 1, ... of U vectors, for R rows of N digits: joined, less their offset, times step, onto
// acc.
template <typename P, int R, int N, int U, int first = 0>
void add_fields(const uint8_t* x, int64_t high, int64_t n, const int32_t* words, const float (&offset)[R][N],
                const float* step, float* acc, int64_t lda) {
  // Half of the 32 (AVX-512) or 16 (AVX2) registers hold sums, or a few more of trits; the rest codes and words.
  constexpr int M = R * N, room = I::W / M, left = P::per_byte - first;
  constexpr int FIELDS = U > 1 ? left : left <= room || (I::W == 16 && left == 5) ? left : room > 0 ? room : 1;
  I sum[U][FIELDS][M];
  each<U * FIELDS * M>([&](auto i) { sum[i / M / FIELDS][i / M % FIELDS][i % M] = I::zero(); });
#if defined(__AVX512VNNI__)
  dot_vectors<P, first, N == 1>(x, high, n, words, sum);
#else
  // Pairs of products are summed in 16 bits first and widened before they can overflow.
  constexpr int64_t safe = 32767 / (2 * P::max_code * (N == 1 ? 255 : 127));
  for (int64_t k = 0; k < n; k += safe) {
    I part[U][FIELDS][M];
    each<U * FIELDS * M>([&](auto i) { part[i / M / FIELDS][i / M % FIELDS][i % M] = I::zero(); });
    dot_vectors<P, first, N == 1>(x + k * kVector, high, n - k < safe ? n - k : safe, words + k, part);
    each<U * FIELDS * M>([&](auto i) {
      I& s = sum[i / M / FIELDS][i / M % FIELDS][i % M];
      s = I::widen(s, part[i / M / FIELDS][i / M % FIELDS][i % M]);
    });
  }
#endif
  each<R>([&](auto r) {
    const F s = F::fill(step[r]);
    each<U * FIELDS>([&](auto i) {
      float* o = acc + r * lda + (i / FIELDS * P::per_byte + first + i % FIELDS) * I::W;
      fma(Digits<N>::join(&sum[i / FIELDS][i % FIELDS][r * N], 1, offset[r]), s, F::load(o)).store(o);
    });
  });
  if constexpr (first + FIELDS < P::per_byte)
    add_fields<P, R, N, U, first + FIELDS>(x, high, n, words, offset, step, acc, lda);
}

// N digits of w = p * scale, four tokens to a word, and what they add up to; returns the value of the last digit.
template <int N>
[[gnu::noinline]] float weigh(const float* prob, const float* scale, uint8_t* words, float* mass) {
  constexpr int V = kChunk / F::W;
  F w[V], top = F::zero(), total = F::zero();
  each<V>([&](auto j) {
    const F x = F::load(prob + j * F::W);
    w[j] = where_positive(x, x * F::load(scale + j * F::W));  // rows nobody sees may hold NaN
    top = max(top, w[j]);
    total = total + w[j];
  });
  const float biggest = top.fold_max();
  const F inv = F::fill(biggest > 0.0f ? Digits<N>::top / biggest : 0.0f);
  I sums[N];
  for (int d = 0; d < N; ++d) sums[d] = I::zero();
  each<V>([&](auto j) {
    I dig[N];
    Digits<N>::split(w[j] * inv, dig);
    for (int d = 0; d < N; ++d) {
      sums[d] = sums[d] + dig[d];
      dig[d].store_bytes(words + d * kChunk + j * F::W);
    }
  });
  Digits<N>::add_up(sums, mass);
  return all_finite(total) ? biggest / Digits<N>::top : NAN;  // a NaN scale must not get lost among the digits
}

template <int DIGITS>
void sums_of(const CodePart& part, const Chunk& c, const float* p, const bool* light, int rows, uint8_t* codes,
             float* acc, int64_t lda, Ahead& ahead, int sixteenths) {
  const int64_t groups = part.groups;
  alignas(64) float scale[2 * kChunk];
  load_scales(part, Side::V, c, scale);
  const int64_t cols = round_up(c.n, kTile);
  const int lines = ahead.share(sixteenths, (part.high.bytes ? 2 : 1) * cols / kTile);
  int64_t high = 0;  // from the low rows to the high ones
  with_v_rows(part, [&](auto kind) {
    using Rows = decltype(kind);
    const auto interleave = [&](auto n) {
      interleave_rows<Rows, n.value, false>(part, part.low, c, codes, ahead, lines);
      if constexpr (Rows::Fields::two_rows) {
        high = groups * Rows::vectors(n) * kWords * kVector;
        interleave_rows<Rows, n.value, true>(part, part.high, c, codes + high, ahead, lines);
      }
    };
    part.group == 64 ? interleave(Int<64>{}) : interleave(Int<128>{});
  });
  for (int64_t g = 0; g < groups; ++g) {
    const auto block = [&](auto n_rows, auto n_digits, int r) {
      constexpr int R = n_rows.value, N = n_digits.value;
      alignas(64) uint8_t words[R * N][kChunk];
      float step[R], mass[R][N];
      for (int i = 0; i < R; ++i) step[i] = weigh<N>(p + (r + i) * kChunk, scale + g * kChunk, words[i * N], mass[i]);
      with_v_rows(part, [&](auto kind) {
        using Rows = decltype(kind);
        using P = typename Rows::Fields;
        // Sums of what differs from the mean code stay small, so fp32 holds them well.
        float offset[R][N];
        for (int i = 0; i < R; ++i)
          for (int d = 0; d < N; ++d) offset[i][d] = P::mean * mass[i][d];
        constexpr int U = P::per_byte == 2 && I::W == 16 ? 2 : 1;  // vectors at once: for enough sums to be busy with
        const int64_t vectors = Rows::vectors(part.group);
        for (int64_t v = g * vectors; v < (g + 1) * vectors; v += U)
          add_fields<P, R, N, U>(codes + v * kWords * kVector, high, cols / 4,
                                 reinterpret_cast<const int32_t*>(words[0]), offset, step,
                                 acc + r * lda + v * P::per_byte * I::W, lda);
      });
    };
    constexpr int kStep = DIGITS == 2 ? 2 : 1;  // 4 digit rows share every load of codes
    int r = 0;
    while (r < rows) {
      if constexpr (DIGITS == 2) {  // of fp32 queries no weight is light
        if (rows - r >= 4 && light[r] && light[r + 1] && light[r + 2] && light[r + 3]) {
          block(Int<4>{}, Int<1>{}, r);
          r += 4;
          continue;
        }
      }
      if (rows - r >= kStep) {
        block(Int<kStep>{}, Int<DIGITS>{}, r);
        r += kStep;
      } else {
        block(Int<1>{}, Int<DIGITS>{}, r);
        r += 1;
      }
    }
  }
}

// out[i] += acc[lane[i]], i < n
template <int64_t lanes>
void add_in_order(const float* acc, const uint8_t* lane, int64_t n, float* out) {
#if defined(__AVX512F__)
  // An instruction picks from 32 lanes.
  constexpr int64_t pairs = (lanes + 31) / 32;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lane + i)));
    const __m512i pair_of = _mm512_srli_epi32(at, 5);
    __m512 sum = _mm512_loadu_ps(out + i);
    each<pairs>([&](auto pair) {
      const __m512 picked =
          _mm512_permutex2var_ps(_mm512_loadu_ps(acc + 32 * pair), at, _mm512_loadu_ps(acc + 32 * pair + 16));
      sum = _mm512_mask_add_ps(sum, _mm512_cmpeq_epi32_mask(pair_of, _mm512_set1_epi32(pair)), sum, picked);
    });
    _mm512_storeu_ps(out + i, sum);
  }
#else
  for (int64_t i = 0; i < n; ++i) out[i] += acc[lane[i]];
#endif
}

template <typename Rows, int64_t n>
struct LaneOf {  // the lane that holds a channel
  uint8_t lane[n];
  constexpr LaneOf() : lane() {
    for (int64_t i = 0; i < Rows::lanes(n); ++i)
      if (Rows::channel(n, i) < n) lane[Rows::channel(n, i)] = static_cast<uint8_t>(i);
  }
};

}  // namespace

void make_queries(const CodePart& part, int digits, const float* q, int64_t ldq, int rows, const CodeQueries& out) {
  digits == 2 ? split_queries<2>(part, q, ldq, rows, out) : split_queries<3>(part, q, ldq, rows, out);
}

void code_scores(const CodePart& part, int digits, const CodeQueries& q, const Chunk& c, int rows, const float* base,
                 float* s, Ahead& ahead, int sixteenths) {
  digits == 2 ? scores_of<2>(part, q, c, rows, base, s, ahead, sixteenths)
              : scores_of<3>(part, q, c, rows, base, s, ahead, sixteenths);
}

void code_sums(const CodePart& part, int digits, const Chunk& c, const float* p, const bool* light, int rows,
               uint8_t* codes, float* acc, int64_t lda, Ahead& ahead, int sixteenths) {
  digits == 2 ? sums_of<2>(part, c, p, light, rows, codes, acc, lda, ahead, sixteenths)
              : sums_of<3>(part, c, p, light, rows, codes, acc, lda, ahead, sixteenths);
}

void add_lanes(const CodePart& part, const float* acc, float* out) {
  with_v_rows(part, [&](auto kind) {
    using Rows = decltype(kind);
    static constexpr LaneOf<Rows, 64> half;
    static constexpr LaneOf<Rows, 128> whole;
    const auto add = [&](auto n, const uint8_t* lane) {
      constexpr int64_t lanes = Rows::lanes(n.value);
      for (int64_t g = 0; g < part.channels; g += n.value, acc += lanes)
        add_in_order<lanes>(acc, lane, n.value, out + g);
    };
    part.group == 64 ? add(Int<64>{}, half.lane) : add(Int<128>{}, whole.lane);
  });
}

#endif

KK_END
