// Rows of numbers against query rows in fp32: scores and weighted sums of a chunk of tokens, for formats whose elements
// turn into floats in one or two instructions. K and V are read once for a block of query rows.
#pragma once
#include "cpu/ahead.h"
#include "cpu/chunk.h"
#include "cpu/many_rows.h"
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

// load(c, i): the F::W channels from i of token c.
struct LoadBf16 {
  const uint8_t* const* rows;
  F operator()(int c, int64_t i) const { return F::load_bf16(reinterpret_cast<const uint16_t*>(rows[c]) + i); }
};
struct LoadF16 {
  const uint8_t* const* rows;
  F operator()(int c, int64_t i) const { return F::load_f16(reinterpret_cast<const uint16_t*>(rows[c]) + i); }
};
struct LoadU8 {  // levels in units of the scale
  const uint8_t* const* rows;
  F operator()(int c, int64_t i) const { return F::load_u8(rows[c] + i) - F::fill(127.5f); }
};
struct LoadCode2 {  // codes of kivi2 keys, whose scale and zero point are of the channel: they go to the query
  const uint8_t* rows;
  int64_t stride;
  F operator()(int c, int64_t i) const { return F::load_u2(rows + c * stride + i / 4); }
};
struct LoadAffine2 {  // kivi2 values: zero + scale * code, both of the token and 32 channels
  const uint8_t* const* rows;
  const float *scale, *zero;  // [token][groups]
  int64_t groups;
  F operator()(int c, int64_t i) const {
    const int64_t g = c * groups + i / 32;
    return fma(F::load_u2(rows[c] + i / 4), F::fill(scale[g]), F::fill(zero[g]));
  }
};
struct LoadF32 {  // a buffer in L1
  const float* rows;
  int64_t ld;
  F operator()(int c, int64_t i) const { return F::load(rows + c * ld + i); }
};

// Row blocks are of 4 rows, then of 1.
constexpr int row_blocks(int rows) { return rows / 4 + rows % 4; }

// s[r][c0 + c] = q[r] . row c0 + c for c < F::W; what stands at tokens >= n means nothing.
template <int R, typename Load>
inline void row_scores_block(const Load& load, int64_t N, int c0, int n, const float* q, int64_t ldq, float* s) {
  constexpr int TG = kFold;  // R * TG accumulators
  F part[R][F::W / kFold];
  for (int r = 0; r < R; ++r)
    for (F& x : part[r]) x = F::zero();
  for (int c = 0; c < F::W && c0 + c < n; c += TG) {
    int token[TG];
    for (int t = 0; t < TG; ++t) token[t] = c0 + c + t < n ? c0 + c + t : n - 1;
    F acc[R][TG];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < TG; ++t) acc[r][t] = F::zero();
    for (int64_t i = 0; i < N; i += F::W) {
      F k[TG];
      for (int t = 0; t < TG; ++t) k[t] = load(token[t], i);
      for (int r = 0; r < R; ++r) {
        const F x = F::load(q + r * ldq + i);
        for (int t = 0; t < TG; ++t) acc[r][t] = fma(k[t], x, acc[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) part[r][c / TG] = fold(acc[r]);
  }
  for (int r = 0; r < R; ++r) sum_folded(part[r]).store(s + r * kChunk + c0);
}

// s [rows][kChunk]; asks for `sixteenths` of the lines ahead.
template <typename Load>
inline void row_scores(const Load& load, int64_t N, int n, const float* q, int64_t ldq, int rows, float* s,
                       Ahead& ahead, int sixteenths) {
  const int lines = ahead.share(sixteenths, row_blocks(rows) * ((n + F::W - 1) / F::W));
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int c = 0; c < n; c += F::W) {
      ahead.take(lines);
      row_scores_block<4>(load, N, c, n, q + r * ldq, ldq, s + r * kChunk);
    }
  for (; r < rows; ++r)
    for (int c = 0; c < n; c += F::W) {
      ahead.take(lines);
      row_scores_block<1>(load, N, c, n, q + r * ldq, ldq, s + r * kChunk);
    }
}

#if defined(__AVX512F__)
// The same for bf16 keys and bf16 queries with the instruction made for it: products in pairs, summed in fp32. No object is
// compiled for processors that have it; being one instruction, it stands here by name, and callers ask has_avx512bf16().
// Sixteen sums a step: R rows times 16 / R tokens. Loops over registers are unrolled and the function is kept apart: inside
// a larger one the compiler makes arrays in memory of them, which costs half the speed.
template <int R>
[[gnu::noinline]] void bf16_scores_block(const LoadBf16& load, int64_t N, int n, const uint16_t* q, float scale,
                                         float* s, Ahead& ahead, int lines) {
  constexpr int kGroups = 4 / R;  // of 4 tokens
  for (int c = 0; c < n; c += 4 * kGroups) {
    F part[4];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      ahead.take(lines);
      const uint8_t* const* row = load.rows + c + 4 * g;
      __m512 acc[R][4];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) acc[r][t] = _mm512_setzero_ps();
      const auto products = [&](int64_t i, __mmask32 some) __attribute__((always_inline)) {
        __m512i k[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) k[t] = _mm512_maskz_loadu_epi16(some, row[t] + i * 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i x = _mm512_maskz_loadu_epi16(some, q + r * N + i);
#pragma GCC unroll 4
          for (int t = 0; t < 4; ++t) dot_bf16(acc[r][t], k[t], x);
        }
      };
#pragma GCC unroll 4
      for (int64_t i = 0; i < N / 32 * 32; i += 32) products(i, 0xffffffffu);
      if (N % 32) products(N / 32 * 32, 0xffffu);  // head dims are multiples of 16
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F sums[4] = {acc[r][0], acc[r][1], acc[r][2], acc[r][3]};
        part[r * kGroups + g] = fold(sums);
      }
    }
    const __m512 x = _mm512_mul_ps(sum_folded(part).v, _mm512_set1_ps(scale));
    if constexpr (R == 1) _mm512_storeu_ps(s + c, x);
    if constexpr (R == 2) {
      _mm256_storeu_ps(s + c, _mm512_castps512_ps256(x));
      _mm256_storeu_ps(s + kChunk + c, _mm512_extractf32x8_ps(x, 1));
    }
    if constexpr (R == 4) {
      _mm_storeu_ps(s + c, _mm512_castps512_ps128(x));
      _mm_storeu_ps(s + kChunk + c, _mm512_extractf32x4_ps(x, 1));
      _mm_storeu_ps(s + 2 * kChunk + c, _mm512_extractf32x4_ps(x, 2));
      _mm_storeu_ps(s + 3 * kChunk + c, _mm512_extractf32x4_ps(x, 3));
    }
  }
}

// s[r][c] = scale * q[r] . row c, q bf16 [rows][N]. All kRowChunk row pointers can be read.
inline void bf16_scores(const LoadBf16& load, int64_t N, int n, const uint16_t* q, float scale, int rows, float* s,
                        Ahead& ahead, int sixteenths) {
  if (rows >= kManyRows && n > kRowChunk / 2) return many_scores(load.rows, N, q, scale, rows, s, ahead, sixteenths);
  const int lines = ahead.share(sixteenths, (rows / 4 + rows / 2 % 2 + rows % 2) * ((n + 3) / 4));
  int r = 0;
  for (; r + 4 <= rows; r += 4) bf16_scores_block<4>(load, N, n, q + r * N, scale, s + r * kChunk, ahead, lines);
  if (r + 2 <= rows) bf16_scores_block<2>(load, N, n, q + r * N, scale, s + r * kChunk, ahead, lines), r += 2;
  if (r < rows) bf16_scores_block<1>(load, N, n, q + r * N, scale, s + r * kChunk, ahead, lines);
}
#endif

template <int R, int NV, typename Load>
inline void row_accumulate_block(const Load& load, int n, int64_t i, const float* p, float* acc, int64_t lda) {
  F a[R][NV];  // a chunk's sum is made apart and added once: the rounding error grows with chunks, not with tokens
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) a[r][j] = F::zero();
  for (int c = 0; c < n; ++c) {
    F v[NV];
    for (int j = 0; j < NV; ++j) v[j] = load(c, i + j * F::W);
    for (int r = 0; r < R; ++r) {
      const F w = F::fill(p[r * kChunk + c]);
      for (int j = 0; j < NV; ++j) a[r][j] = fma(w, v[j], a[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) {
      float* o = acc + r * lda + i + j * F::W;
      (F::load(o) + a[r][j]).store(o);
    }
}

// acc[r][i] += sum over c < n of p[r][c] * row c [i], i < N
template <typename Load>
inline void row_accumulate(const Load& load, int64_t N, int n, const float* p, int rows, float* acc, int64_t lda,
                           Ahead& ahead, int sixteenths) {
  constexpr int NV = F::W == 16 ? 4 : 2;
  const int64_t wide = N / (NV * F::W) * (NV * F::W), passes = wide / (NV * F::W) + (N - wide) / F::W;
  const int lines = ahead.share(sixteenths, row_blocks(rows) * passes);
  const auto block = [&](auto R, int r) {
    constexpr int kR = decltype(R)::value;
    for (int64_t i = 0; i < wide; i += NV * F::W) {
      ahead.take(lines);
      row_accumulate_block<kR, NV>(load, n, i, p + r * kChunk, acc + r * lda, lda);
    }
    for (int64_t i = wide; i < N; i += F::W) {
      ahead.take(lines);
      row_accumulate_block<kR, 1>(load, n, i, p + r * kChunk, acc + r * lda, lda);
    }
  };
  int r = 0;
  for (; r + 4 <= rows; r += 4) block(Int<4>{}, r);
  for (; r < rows; ++r) block(Int<1>{}, r);
}

#if defined(__AVX512F__)
// Channels i to i + 32 * G (16 if HALF). Two tokens' channels are interleaved, in each 128 bits apart, and multiplied with
// their two weights. Every loop over registers is unrolled and the function kept apart, or they would be an array in memory.
template <int R, int G, bool HALF>
[[gnu::noinline]] void bf16_accumulate_block(const LoadBf16& load, int n, int64_t i, const uint32_t* words, float* acc,
                                             int64_t lda, Ahead& ahead, int lines) {
  __m512 a[R][2 * G];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * G; ++j) a[r][j] = _mm512_setzero_ps();
  for (int c = 0; c < n; c += 2) {
    if (c % 4 == 0) ahead.take(lines);
    __m512i v[2 * G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      const uint8_t *even = load.rows[c] + (i + 32 * g) * 2, *odd = load.rows[c + 1] + (i + 32 * g) * 2;
      const __mmask32 some = HALF ? 0xffffu : 0xffffffffu;
      const __m512i x = _mm512_maskz_loadu_epi16(some, even), y = _mm512_maskz_loadu_epi16(some, odd);
      v[2 * g] = _mm512_unpacklo_epi16(x, y);
      v[2 * g + 1] = _mm512_unpackhi_epi16(x, y);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(words[r * kRowChunk / 2 + c / 2]));
#pragma GCC unroll 4
      for (int j = 0; j < 2 * G; ++j) asm("vdpbf16ps %2, %1, %0" : "+v"(a[r][j]) : "v"(v[j]), "v"(w));
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      float* o = acc + r * lda + i + 32 * g;
      const __m512 x = _mm512_permutex2var_ps(a[r][2 * g], first, a[r][2 * g + 1]);
      _mm512_storeu_ps(o, _mm512_add_ps(_mm512_loadu_ps(o), x));
      const __m512 y = _mm512_permutex2var_ps(a[r][2 * g], second, a[r][2 * g + 1]);
      if (!HALF) _mm512_storeu_ps(o + 16, _mm512_add_ps(_mm512_loadu_ps(o + 16), y));
    }
}

// acc[r][i] += sum over c < n of bf16(p[r][c]) * row c [i]. p is 0 from n to the next multiple of 16, and row n can be read.
inline void bf16_accumulate(const LoadBf16& load, int64_t N, int n, const float* p, int rows, float* acc, int64_t lda,
                            Ahead& ahead, int sixteenths) {
  if (rows >= kManyRows) return many_sums(load.rows, N, n, p, rows, acc, lda, ahead, sixteenths);
  const int64_t wide = N / 64 * 64, half = N / 32 * 32, passes = (N + 63) / 64;
  const int lines = ahead.share(sixteenths, row_blocks(rows) * passes * ((n + 3) / 4));
  const auto block = [&](auto R, int r) {
    constexpr int kR = decltype(R)::value;
    uint32_t words[kR * kRowChunk / 2];
    for (int j = 0; j < kR; ++j) bf16_weights(p + (r + j) * kChunk, n, words + j * kRowChunk / 2);
    float* o = acc + r * lda;
    for (int64_t i = 0; i < wide; i += 64) bf16_accumulate_block<kR, 2, false>(load, n, i, words, o, lda, ahead, lines);
    if (half > wide) bf16_accumulate_block<kR, 1, false>(load, n, wide, words, o, lda, ahead, lines);
    if (N > half) bf16_accumulate_block<kR, 1, true>(load, n, half, words, o, lda, ahead, lines);
  };
  int r = 0;
  for (; r + 4 <= rows; r += 4) block(Int<4>{}, r);
  for (; r < rows; ++r) block(Int<1>{}, r);
}
#endif

KK_END
