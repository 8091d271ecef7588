// bf16 K and V against many bf16 query rows, as matrix products: each side of a chunk is brought once into an order that
// needs no shuffle in the inner loop, and every row block profits.
//   K  words [channel pair][token]: tokens stand in lanes, a query's pair is broadcast to them, and no sum is folded
//   V  words [token pair][channel]: channels stand in lanes, the two weights of a pair of tokens are broadcast
#pragma once
#include "cpu/ahead.h"
#include "cpu/chunk.h"
#include "kvkernels/core/one_of.h"

#if defined(__AVX512F__)
#include <immintrin.h>

KK_BEGIN

inline void dot_bf16(__m512& sum, __m512i x, __m512i y) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

constexpr int kManyRows = 12;       // fewer are faster token by token
constexpr int kManyChannels = 128;  // brought at a time: 16 KB, beside the K and V that are read and asked for

// words[j][c] = word j of row c, for j < `count` (8 or 16) and 16 rows.
inline void transpose_words(const uint8_t* const* row, int64_t byte, int count, uint32_t (*words)[kRowChunk]) {
  const __mmask16 some = count == 16 ? 0xffff : 0xff;
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(some, row[i] + byte);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)  // a[i + k]: words k, 4 + k, 8 + k, 12 + k of rows i to i + 3
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0xdd);
    _mm512_storeu_si512(words[k], _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(words[k + 4], _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    if (count == 16) {
      _mm512_storeu_si512(words[k + 8], _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
      _mm512_storeu_si512(words[k + 12], _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
  }
}

// f(Int<R>{}, r) for blocks of R = 4 to 6 rows from row r on: as few as possible, and none so small that it waits for itself.
template <typename Fn>
inline void row_blocks_of_6(int rows, Fn&& f) {
  for (int r = 0, blocks = (rows + 5) / 6; r < rows; --blocks) {
    const int n = (rows - r + blocks - 1) / blocks;
    if (n == 6) f(Int<6>{}, r);
    if (n == 5) f(Int<5>{}, r);
    if (n == 4) f(Int<4>{}, r);
    r += n;
  }
}

// s[r][c] (+)= products of R rows and `pairs` words of 64 tokens; times `scale` if `last`.
template <int R>
[[gnu::noinline]] void many_scores_block(const uint32_t (*words)[kRowChunk], int pairs, const uint16_t* q, int64_t ldq,
                                         float* s, bool first, bool last, float scale) {
  __m512 acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) acc[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(s + r * kChunk + 16 * t);
  for (int j = 0; j < pairs; ++j) {
    __m512i k[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) k[t] = _mm512_loadu_si512(words[j] + 16 * t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      memcpy(&pair, q + r * ldq + 2 * j, sizeof(pair));
      const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) dot_bf16(acc[r][t], k[t], x);
    }
  }
  const __m512 f = _mm512_set1_ps(last ? scale : 1.0f);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) _mm512_storeu_ps(s + r * kChunk + 16 * t, _mm512_mul_ps(acc[r][t], f));
}

// As bf16_scores of rows.h. Scores beyond token n are those of repeated tokens.
inline void many_scores(const uint8_t* const* row, int64_t N, const uint16_t* q, float scale, int rows, float* s,
                        Ahead& ahead, int sixteenths) {
  const int64_t parts = (N + kManyChannels - 1) / kManyChannels;
  alignas(64) uint32_t words[kManyChannels / 2][kRowChunk];
  const int lines = ahead.share(sixteenths, (N + 31) / 32 * 4 + parts * ((rows + 5) / 6));
  for (int64_t from = 0; from < N; from += kManyChannels) {
    const int64_t channels = N - from < kManyChannels ? N - from : kManyChannels;
    for (int c = 0; c < kRowChunk; c += 16)
      for (int64_t i = 0; i < channels; i += 32) {
        ahead.take(lines);
        if (channels - i >= 32)
          transpose_words(row + c, (from + i) * 2, 16, reinterpret_cast<uint32_t (*)[kRowChunk]>(words[i / 2] + c));
        else
          transpose_words(row + c, (from + i) * 2, 8, reinterpret_cast<uint32_t (*)[kRowChunk]>(words[i / 2] + c));
      }
    row_blocks_of_6(rows, [&](auto R, int r) {
      ahead.take(lines);
      many_scores_block<decltype(R)::value>(words, static_cast<int>(channels / 2), q + r * N + from, N, s + r * kChunk,
                                            from == 0, from + channels == N, scale);
    });
  }
}

// Weights to bf16, as an attention in that dtype rounds them; a word holds those of two tokens.
inline void bf16_weights(const float* p, int n, uint32_t* words) {
  for (int c = 0; c < n; c += 32) {
    const __m512 low = _mm512_loadu_ps(p + c), high = _mm512_loadu_ps(p + c + 16);
    __m512i w;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(w) : "v"(high), "v"(low));
    _mm512_storeu_si512(words + c / 2, w);
  }
}

// Two vectors in which the channels of an even and an odd token alternate, 128 bits apart -> the channels in order.
inline void add_channels(float* o, __m512 low, __m512 high, bool half) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(o, _mm512_add_ps(_mm512_loadu_ps(o), _mm512_permutex2var_ps(low, first, high)));
  if (!half)
    _mm512_storeu_ps(o + 16, _mm512_add_ps(_mm512_loadu_ps(o + 16), _mm512_permutex2var_ps(low, second, high)));
}

// acc[r][0 .. 16 * V) += the products of R rows' weights and V vectors of words.
template <int R, int V>
[[gnu::noinline]] void many_sums_block(const __m512i (*v)[kManyChannels / 16], int pairs,
                                       const uint32_t (*weights)[kRowChunk / 2], float* acc, int64_t lda, bool half) {
  __m512 a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) a[r][j] = _mm512_setzero_ps();
  for (int c = 0; c < pairs; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(weights[r][c]));
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) dot_bf16(a[r][j], v[c][j], w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < V; j += 2) add_channels(acc + r * lda + 16 * j, a[r][j], a[r][j + 1], half);
}

// As bf16_accumulate of rows.h.
inline void many_sums(const uint8_t* const* row, int64_t N, int n, const float* p, int rows, float* acc, int64_t lda,
                      Ahead& ahead, int sixteenths) {
  const int64_t parts = (N + kManyChannels - 1) / kManyChannels;
  alignas(64) __m512i v[kRowChunk / 2][kManyChannels / 16];
  const int pairs = (n + 1) / 2, lines = ahead.share(sixteenths, parts * (pairs + (rows + 5) / 6));
  for (int64_t from = 0; from < N; from += kManyChannels) {
    const int64_t channels = N - from < kManyChannels ? N - from : kManyChannels;
    for (int c = 0; c < pairs; ++c) {
      ahead.take(lines);
      for (int64_t i = 0; i < channels; i += 32) {
        const __mmask32 some = channels - i >= 32 ? 0xffffffffu : 0xffffu;
        const __m512i x = _mm512_maskz_loadu_epi16(some, row[2 * c] + (from + i) * 2);
        const __m512i y = _mm512_maskz_loadu_epi16(some, row[2 * c + 1] + (from + i) * 2);
        v[c][i / 16] = _mm512_unpacklo_epi16(x, y);
        v[c][i / 16 + 1] = _mm512_unpackhi_epi16(x, y);
      }
    }
    row_blocks_of_6(rows, [&](auto R, int r) {
      constexpr int kR = decltype(R)::value;
      alignas(64) uint32_t weights[kR][kRowChunk / 2];
      for (int j = 0; j < kR; ++j) bf16_weights(p + (r + j) * kChunk, n, weights[j]);
      ahead.take(lines);
      float* o = acc + r * lda + from;
      int64_t i = 0;
      const auto at = [&] { return reinterpret_cast<const __m512i(*)[kManyChannels / 16]>(&v[0][i / 16]); };
      for (; i + 64 <= channels; i += 64) many_sums_block<kR, 4>(at(), pairs, weights, o + i, lda, false);
      for (; i < channels; i += 32) many_sums_block<kR, 2>(at(), pairs, weights, o + i, lda, channels - i < 32);
    });
  }
}

KK_END
#endif
