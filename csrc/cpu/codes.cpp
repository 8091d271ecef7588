// Scores and sums of pages of codes (codes.h). One object for all that read them: the inner loops below take as long to
// compile as the rest of attention.
#include "cpu/codes.h"

#include "cpu/arena.h"
#include "cpu/planes.h"
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"

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
  static F join(const int32_t* sums, int64_t ld, const float* offset) {
    if constexpr (N == 2) {
      return (I::load(sums).template sll<7>() + I::load(sums + ld)).to_float() - F::fill(offset[0]);
    } else {
      F v = I::load(sums).to_float() - F::fill(offset[0]);
      for (int i = 1; i < N; ++i) v = fma(v, F::fill(128.0f), I::load(sums + i * ld).to_float() - F::fill(offset[i]));
      return v;
    }
  }
};

// f(planes...) of a part: one, or the low and the high one.
template <typename Fn>
void with_planes(const CodePart& part, Fn&& f) {
  switch (part.bits) {
    case 0:
      return f(Trits{});
    case 1:
      return f(Plane<1, 0>{});
    case 2:
      return f(Plane<2, 0>{});
    case 3:
      return f(Plane<2, 0>{}, Plane<1, 2>{});
    case 4:
      return f(Plane<4, 0>{});
  }
}
// f(plane, its rows) one by one.
template <typename Fn>
void each_plane(const CodePart& part, Fn&& f) {
  with_planes(part, [&](auto plane, auto... high) {
    f(plane, part.low);
    (f(high, part.high), ...);
  });
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
        int32_t* w = out.words + ((g * rows + r) * DIGITS + d) * kQuads;
        each_plane(part, [&](auto plane, const CodeRows&) {
          decltype(plane)::order_q(digit[d], part.group, reinterpret_cast<uint8_t*>(w));
          w += part.group / 4;
        });
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
[[gnu::always_inline]] inline void dot_fields(I (&w)[T], const int32_t* words, I (&acc)[M][T]) {
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

// acc[m][t] += W words of the tokens from rows[t] on . words[m].
template <typename P, int W, int M, int T>
[[gnu::always_inline]] inline void dot_words(const uint8_t* const (&rows)[T], int64_t stride, const int32_t* words,
                                             I (&acc)[M][T]) {
  I w[T][4];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) load_words<W>(rows[t], stride, w[t]);
#if defined(__AVX512VNNI__)
  I(&part)[M][T] = acc;
#else
  // Pairs of products are summed in 16 bits; 16 bytes of a row are 4 * per_byte quads of at most 2 * 127 * code each:
  // 8128 (1 bit), 10160 (trits), 12192 (2 bits), 30480 (4 bits), 32512 (the 1-bit plane of 3 bits, whose code is 4).
  I part[M][T];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (I& x : part[m]) x = I::zero();
#endif
#pragma GCC unroll 1
  for (int i = 0; i < W; ++i) {
    I x[T];
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

// The same for all words of a group in a plane, `bytes` of each row.
template <typename P, int M, int T>
[[gnu::always_inline]] inline void dot_plane(const uint8_t* (&rows)[T], int64_t stride, int64_t bytes,
                                             const int32_t* words, I (&acc)[M][T]) {
  if constexpr (P::shortest < 8)
    if (bytes == 4) return dot_words<P, 1>(rows, stride, words, acc);
  if constexpr (P::shortest < 16)
    if (bytes == 8) return dot_words<P, 2>(rows, stride, words, acc);
  for (; bytes > 12; bytes -= 16, words += 4 * P::per_byte) {
    dot_words<P, 4>(rows, stride, words, acc);
    for (const uint8_t*& r : rows) r += 16;
  }
  if constexpr (P::has_rest)
    if (bytes > 0) dot_words<P, 3>(rows, stride, words, acc);
}

struct Tile {  // of tokens, I::W of them
  const uint8_t* side;
  int64_t token;
};

// sums[m][t] = codes of the tokens of tile t . words[m], in one group. The codes go from memory to the dot product without
// being stored: M * T sums and the words of 16 bytes a row stay in registers.
template <int M, int T, typename... Planes>
[[gnu::noinline]] void dot_codes(const CodePart& part, int64_t g, const Tile* tile, const int32_t* words,
                                 int32_t (&sums)[M][T * I::W]) {
  I acc[M][T];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) acc[m][t] = I::zero();
  const CodeRows* codes = &part.low;
  const auto add = [&](auto plane) __attribute__((always_inline)) {
    const int64_t bytes = decltype(plane)::bytes(part.group);
    const uint8_t* rows[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) rows[t] = tile[t].side + codes->at + tile[t].token * codes->bytes + g * bytes;
    dot_plane<decltype(plane)>(rows, codes->bytes, bytes, words, acc);
    words += part.group / 4;
    codes = &part.high;
  };
  (add(Planes{}), ...);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) acc[m][t].store(sums[m] + t * I::W);
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
  for (int64_t g = 0; g < groups; ++g) {
    const auto block = [&](auto n, int r) {
      constexpr int R = n.value, M = R * DIGITS;
      for (int v = 0; v < tiles; v += T) {
        alignas(64) int32_t sums[M][T * I::W];
        ahead.take(lines);
        const int32_t* words = q.words + (g * rows + r) * DIGITS * kQuads;
        with_planes(part,
                    [&](auto... planes) { dot_codes<M, T, decltype(planes)...>(part, g, tile + v, words, sums); });
        for (int i = 0; i < R; ++i) {
          const F step = F::fill(q.step[r + i]);
          for (int t = 0; t < T && v + t < tiles; ++t) {
            float* o = s + (r + i) * kChunk + (v + t) * I::W;
            const F x =
                Digits<DIGITS>::join(&sums[i * DIGITS][t * I::W], T * I::W, q.offset + ((r + i) * groups + g) * DIGITS);
            const F sum = base && g == 0 ? F::fill(base[r + i]) : F::load(o);
            fma(x * step, F::load(scale + g * kChunk + (v + t) * I::W), sum).store(o);
          }
        }
      }
    };
    int r = 0;
    for (; r + kRows <= rows; r += kRows) block(Int<kRows>{}, r);
    for (; r < rows; ++r) block(Int<1>{}, r);
  }
}

// ---- sums

// out[m][lane] = sum over k of the 4-way dot of codes[k][lane] and words[m][k]. The instructions take one unsigned and one
// signed factor; codes fit either, so words may be signed digits or (UNSIGNED) bytes up to 255.
// Without VNNI, products are summed in 16 bits first: pairs of at most 2 * max_code * 255, widened before they can overflow.
template <int M, int NV, bool UNSIGNED>
inline void dot4_block(const uint8_t* codes, int64_t ldc, int64_t nk, [[maybe_unused]] int max_code,
                       const int32_t* words, int64_t ldw, int32_t* out, int64_t ldo) {
  I acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j] = I::zero();
#if defined(__AVX512VNNI__)
  for (int64_t k = 0; k < nk; ++k, codes += ldc) {
    I c[NV];
    for (int j = 0; j < NV; ++j) c[j] = I::load(codes + j * I::W * 4);
    for (int m = 0; m < M; ++m) {
      const I w = I::fill(words[m * ldw + k]);
      for (int j = 0; j < NV; ++j) acc[m][j] = UNSIGNED ? I::dot(acc[m][j], w, c[j]) : I::dot(acc[m][j], c[j], w);
    }
  }
#else
  const int64_t safe = 32767 / (2 * max_code * (UNSIGNED ? 255 : 127));
  for (int64_t k0 = 0; k0 < nk; k0 += safe) {
    I part[M][NV];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) part[m][j] = I::zero();
    const int64_t k1 = k0 + safe < nk ? k0 + safe : nk;
    for (int64_t k = k0; k < k1; ++k, codes += ldc) {
      I c[NV];
      for (int j = 0; j < NV; ++j) c[j] = I::load(codes + j * I::W * 4);
      for (int m = 0; m < M; ++m) {
        const I w = I::fill(words[m * ldw + k]);
        for (int j = 0; j < NV; ++j)
          part[m][j] = UNSIGNED ? I::dot16(part[m][j], w, c[j]) : I::dot16(part[m][j], c[j], w);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) acc[m][j] = I::widen(acc[m][j], part[m][j]);
  }
#endif
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j].store(out + m * ldo + j * I::W);
}

// lanes: a multiple of 16.
template <int M, bool UNSIGNED>
inline void dot4(const uint8_t* codes, int64_t ldc, int64_t lanes, int64_t nk, int max_code, const int32_t* words,
                 int64_t ldw, int32_t* out, int64_t ldo) {
  // M * NV sums of the inner loop fill half of the 32 (AVX-512) or 16 (AVX2) registers; the rest holds codes and words.
  constexpr int NV = I::W / 4;
  int64_t l = 0;
  for (; l + NV * I::W <= lanes; l += NV * I::W)
    dot4_block<M, NV, UNSIGNED>(codes + l * 4, ldc, nk, max_code, words, ldw, out + l, ldo);
  for (; l < lanes; l += I::W) dot4_block<M, 1, UNSIGNED>(codes + l * 4, ldc, nk, max_code, words, ldw, out + l, ldo);
}

// N digits of w = p * scale, four tokens to a word, and what they add up to; returns the value of the last digit.
template <int N>
float weigh(const float* prob, const float* scale, int64_t cols, uint8_t* words, float* mass) {
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

// Codes of the chunk's tokens in one plane -> out [token / 4][ld lanes][4].
template <typename P, int64_t n>
void unpack_rows(const CodePart& part, const CodeRows& codes, const Chunk& c, int64_t ld, uint8_t* out, Ahead& ahead,
                 int lines) {
  const int64_t groups = part.groups, stride = codes.bytes;  // bytes written below might be anybody's
  for (int i = 0; i < c.pieces; ++i) {
    const Piece& pc = c.piece[i];
    const uint8_t* row = pc.v + codes.at + pc.token * stride;
    uint8_t* to = out + pc.col * ld;
    for (int64_t t = round_up(pc.n, kTile); t > 0; t -= 4, row += 4 * stride, to += 4 * ld) {
      ahead.take(lines);
      for (int64_t g = 0; g < groups; ++g) P::template unpack_v<n>(row + g * P::bytes(n), stride, to + g * n * 4);
    }
  }
}

template <int DIGITS>
void sums_of(const CodePart& part, const Chunk& c, const float* p, const bool* light, int rows, uint8_t* codes,
             float* acc, int64_t lda, Ahead& ahead, int sixteenths) {
  const int64_t groups = part.groups, lanes = part.planes() * part.channels, quads = kChunk / 4;
  alignas(64) float scale[2 * kChunk];
  load_scales(part, Side::V, c, scale);
  const int64_t cols = round_up(c.n, kTile);
  const int lines = ahead.share(sixteenths, part.planes() * cols / 4);
  uint8_t* out = codes;
  each_plane(part, [&](auto plane, const CodeRows& rows_of) {
    using P = decltype(plane);
    if (part.group == 64)
      unpack_rows<P, 64>(part, rows_of, c, lanes, out, ahead, lines);
    else
      unpack_rows<P, 128>(part, rows_of, c, lanes, out, ahead, lines);
    out += part.channels * 4;
  });
  for (int64_t g = 0; g < groups; ++g) {
    const auto block = [&](auto n_rows, auto n_digits, int r) {
      constexpr int R = n_rows.value, N = n_digits.value;
      alignas(64) uint8_t words[R * N][kChunk];
      alignas(64) int32_t ints[R * N][kScaleGroup];
      float step[R], mass[R][N];
      for (int i = 0; i < R; ++i)
        step[i] = weigh<N>(p + (r + i) * kChunk, scale + g * kChunk, cols, words[i * N], mass[i]);
      int64_t lane = g * part.group;
      each_plane(part, [&](auto plane, const CodeRows&) {
        using P = decltype(plane);
        dot4<R * N, N == 1>(codes + lane * 4, lanes * 4, part.group, cols / 4, P::max_code,
                            reinterpret_cast<const int32_t*>(words[0]), quads, ints[0], kScaleGroup);
        // Sums of what differs from the plane's mean code stay small, so fp32 holds them well.
        for (int i = 0; i < R; ++i) {
          float offset[N];
          for (int d = 0; d < N; ++d) offset[d] = P::mean * mass[i][d];
          for (int64_t j = 0; j < part.group; j += F::W) {
            float* o = acc + (r + i) * lda + lane + j;
            fma(Digits<N>::join(ints[i * N] + j, kScaleGroup, offset), F::fill(step[i]), F::load(o)).store(o);
          }
        }
        lane += part.channels;
      });
    };
    constexpr int kStep = DIGITS == 2 ? 2 : 1;  // 4 digit rows share every load of codes
    int r = 0;
    while (r < rows) {
      if (rows - r >= 4 && light[r] && light[r + 1] && light[r + 2] && light[r + 3]) {
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

template <typename P, int64_t n>
struct LaneOf {  // the lane that holds a channel
  uint8_t lane[n];
  constexpr LaneOf() : lane() {
    for (int64_t i = 0; i < n; ++i) lane[P::template v_channel<n>(i)] = static_cast<uint8_t>(i);
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
  each_plane(part, [&](auto plane, const CodeRows&) {
    static constexpr LaneOf<decltype(plane), 64> half;
    static constexpr LaneOf<decltype(plane), 128> whole;
    const uint8_t* lane = part.group == 64 ? half.lane : whole.lane;
    for (int64_t g = 0; g < part.channels; g += part.group)
      for (int64_t i = 0; i < part.group; ++i) out[g + i] += acc[g + lane[i]];
    acc += part.channels;
  });
}

#endif

KK_END
