// Products of bf16 rows with each other, by the instruction that multiplies pairs and sums in fp32: twice as fast as fp32
// products, and exact but for the sums. For callers that ask has_avx512bf16().
#pragma once
#include "cpu/many_rows.h"
#include "cpu/matmul.h"

#if defined(__AVX512F__)

KK_BEGIN

// Rows of the tile of c = a b, b in words, the products of every 16 inner indices summed apart as in careful_tile.
template <int R, int N>
[[gnu::noinline]] void bf16_careful_tile(int64_t pairs, const uint16_t* a, int64_t lda, const uint32_t* words,
                                         int64_t ldw, float* c, int64_t ldc) {
  __m512 sum[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t from = 0; from < pairs; from += 8) {
    __m512 acc[R][N];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[r][j] = _mm512_setzero_ps();
    for (int64_t p = from; p < from + 8; ++p, a += 2, words += ldw) {
      __m512i v[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) v[j] = _mm512_loadu_si512(words + 16 * j);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * lda, sizeof(pair));
        const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) dot_bf16(acc[r][j], v[j], x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[r][j] = _mm512_add_ps(sum[r][j], acc[r][j]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sum[r][j]);
}

// As lower_blocks_matmul with blocks of 16: c [m, m] = a [m, k] b [k, m], k a multiple of 16, b [k / 2][ldw] in words.
inline void bf16_lower_blocks_matmul(int64_t m, int64_t k, const uint16_t* a, int64_t lda, const uint32_t* words,
                                     int64_t ldw, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += 16)
    vector_tiles<2>(i + 16, [&](auto N, int64_t j) {
      row_tiles(m - i < 16 ? m - i : 16, [&](auto R, int64_t r) {
        bf16_careful_tile<R.value, N.value>(k / 2, a + (i + r) * lda, lda, words + j, ldw, c + (i + r) * ldc + j, ldc);
      });
    });
}

KK_END
#endif
