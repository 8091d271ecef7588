// Products of matrices rounded to whole numbers of 16 bits, by the instruction that multiplies pairs of them and sums in
// 32 bits: twice as fast as fp32 products, and the sums are exact. Rows of the left matrix and columns of the right one
// have a unit each, such that no sum can overflow. For bf16 rows it is a power of two, so that elements are exact but for
// those below 1/10 of the mean; elements of columns are off by 2^-13 of the column's largest at most.
#pragma once
#include <cmath>

#include "cpu/matmul.h"

#if defined(__AVX512VNNI__)

KK_BEGIN

// Magnitudes of a row's whole numbers sum up to less than 2^this. One bit less is one more for columns, but then alike
// keys, whose roundings do not cancel, take the error of a state from 5e-4 to 12e-4; one more doubles it for others.
constexpr int kRowBits = 19;
// Most magnitude of elements of columns that such rows are multiplied by: times 2^kRowBits + 256 / 2, the roundings of 256
// numbers, that is less than 2^31. It must not be found from the rows: what is given for one would change others' bits.
constexpr float kColumnMost = 4094.0f;
constexpr int64_t kWordColumns = 64;

// fma(x, scale, this) has x * scale, rounded to a whole number, in its low bits.
constexpr float kWholeBits = 12582912.0f;  // 1.5 * 2^23

// The same where magnitudes of the left matrix's rows, rounded, sum up to no more than `sum`.
inline float column_most(float sum) {
  const float most = ::floorf(2.1474e9f / sum);
  return most < 32700.0f ? most : 32700.0f;
}

struct RoundedRow {
  float unit;    // NaN if any number is NaN or infinite
  float square;  // sum of x^2
};
// Whole numbers y_i = x_i / unit of n bf16 numbers, n a multiple of 16; their magnitudes are added to `sums`.
inline RoundedRow round_row(const uint16_t* x, int64_t n, int16_t* y, float* sums) {
  F square = F::zero(), sum = F::zero(), most = F::zero();
  for (int64_t i = 0; i < n; i += F::W) {
    const F v = F::load_bf16(x + i), size = abs(v);
    square = fma(v, v, square);
    sum = sum + size;
    most = max(size, most);
  }
  const auto exponent = [](float v) { return static_cast<int>(float_bits(v) >> 23) - 127; };
  const float total = sum.fold_sum();
  int shift = kRowBits - 1 - exponent(total);
  const int by_most = 14 - exponent(most.fold_max());
  if (shift > by_most) shift = by_most;
  if (shift > 100) shift = 100;
  const bool finite = total < INFINITY;
  const float scale = finite ? bits_float(static_cast<uint32_t>(127 + shift) << 23) : 0.0f;
  const F by = F::fill(scale), magic = F::fill(kWholeBits);
  for (int64_t i = 0; i < n; i += F::W) {
    const F whole = fma(F::load_bf16(x + i), by, magic);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm512_cvtepi32_epi16(_mm512_castps_si512(whole.v)));
    (F::load(sums + i) + abs(whole - magic)).store(sums + i);
  }
  return {finite ? bits_float(static_cast<uint32_t>(127 - shift) << 23) : NAN, square.fold_sum()};
}

// words[p][j] = elements (2p, j) and (2p + 1, j) of b [k, 64] in units of the columns, of which none is more than `most`;
// k is even. NaN and infinity make a column's unit NaN or infinite. With `factor` rows of b are multiplied by it first.
inline void round_columns(float* b, int64_t k, float most, uint32_t* words, float* unit,
                          const float* factor = nullptr) {
  // Twice the bits of magnitudes, which are in the order of what they stand for, NaN being the last.
  __m512i largest[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) largest[j] = _mm512_setzero_si512();
  const auto look = [&](float* row, const auto& element) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i x = _mm512_castps_si512(element(row + 16 * j).v);
      largest[j] = _mm512_max_epu32(largest[j], _mm512_add_epi32(x, x));
    }
  };
  for (int64_t i = 0; i < k; ++i) {
    float* row = b + i * kWordColumns;
    if (factor)
      look(row, [by = F::fill(factor[i])](float* x) {
        const F y = F::load(x) * by;
        y.store(x);
        return y;
      });
    else
      look(row, [](float* x) { return F::load(x); });
  }
  F scale[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const F size = max(F::fill(1e-30f), _mm512_castsi512_ps(_mm512_srli_epi32(largest[j], 1)));
    scale[j] = F::fill(most) / size;
    (size * F::fill(1.0f / most)).store(unit + 16 * j);
  }
  const F magic = F::fill(kWholeBits);
  for (int64_t p = 0; p < k; p += 2, b += 2 * kWordColumns, words += kWordColumns)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i even = _mm512_castps_si512(fma(F::load(b + 16 * j), scale[j], magic).v);
      const __m512i odd = _mm512_castps_si512(fma(F::load(b + kWordColumns + 16 * j), scale[j], magic).v);
      _mm512_storeu_si512(words + 16 * j, _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16)));
    }
}

// In the compiler's own form GCC 12 copies and spills every sum.
inline void dot_i16(__m512i& sum, __m512i x, __m512i y) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

template <int R, int N, bool scaled>
[[gnu::noinline]] void i16_tile(int64_t pairs, const int16_t* a, int64_t lda, const uint32_t* words, const float* unit,
                                float* c, const float* factor) {
  __m512i acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j] = _mm512_setzero_si512();
  for (int64_t p = 0; p < pairs; ++p, a += 2, words += kWordColumns) {
    __m512i v[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) v[j] = _mm512_loadu_si512(words + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * lda, sizeof(pair));
      const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) dot_i16(acc[r][j], v[j], x);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const F u = F::load(unit + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* to = c + r * kWordColumns + 16 * j;
      const F product = F(_mm512_cvtepi32_ps(acc[r][j]));
      (scaled ? fma(product, u, F::load(to) * F::fill(factor[r])) : product * u).store(to);
    }
  }
}

// c [m, n] = a b, b [2 pairs][64] in words, rows of a in their units; with `factor`, added to c times a factor per row.
inline void i16_matmul(int64_t m, int64_t n, int64_t pairs, const int16_t* a, int64_t lda, const uint32_t* words,
                       const float* unit, float* c, const float* factor = nullptr) {
  vector_tiles(n, [&](auto N, int64_t j) {
    row_tiles(m, [&](auto R, int64_t i) {
      const auto of = factor ? i16_tile<R.value, N.value, true> : i16_tile<R.value, N.value, false>;
      of(pairs, a + i * lda, lda, words + j, unit + j, c + i * kWordColumns + j, factor ? factor + i : nullptr);
    });
  });
}

KK_END
#endif
