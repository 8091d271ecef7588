// fp32 matrix products for matrices that lie in L1 and L2: tiles of 6 rows and 4 vectors stay in registers (2 vectors
// where there are 16 registers), the left matrix is broadcast, the right one is loaded along its rows.
//
// Every element of a result is one chain of fused multiply-adds in the order of the inner index, whatever tile it falls
// in: its bits do not depend on how many rows or columns there are. Columns are taken in whole vectors: rows of the
// right matrix and of the result must be readable and writable up to a multiple of F::W.
#pragma once
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

// The left matrix: element (i, p) is at[i * row + p * col]. Its transpose is the same with row and col exchanged.
struct Left {
  const float* at;
  int64_t row, col;
  Left from_row(int64_t i) const { return {at + i * row, row, col}; }
};

// What products are added to: 0, the result as it is, or that times a factor per row.
enum class Start { zero, add, scaled };

// The part of the left matrix that is used, all of it or a triangle. The solves take a right matrix that is the result
// itself, rows in the order in which they become known: C_i += sum_p A_ip C_p over p < i or p > i. With A = -L, L
// strictly lower triangular, that is C <- (I + L)^-1 C, and with A = -L^T, C <- (I + L)^-T C.
enum class Part { all, lower, upper, solve_lower, solve_upper };

#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// Rows of the tile are rows of `a` and `c`; the inner index runs over [begin, end). The triangle of a tile lies at the
// inner indices [diagonal, diagonal + R): after [begin, end) for `lower` and the solves, before it for `upper`.
// With ld > 0 rows of b and c are that long.
template <int R, int N, Part part, int64_t ld>
[[gnu::noinline]] void tile(Left a, int64_t begin, int64_t end, int64_t diagonal, const float* b, int64_t b_row,
                            float* c, int64_t c_row, Start start, const float* factor) {
  const int64_t ldb = ld ? ld : b_row, ldc = ld ? ld : c_row;
  F acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      acc[r][j] = start == Start::zero ? F::zero() : F::load(c + r * ldc + j * F::W);
      if (start == Start::scaled) acc[r][j] = acc[r][j] * F::fill(factor[r]);
    }
  if constexpr (part == Part::upper) {
#pragma GCC unroll 6
    for (int p = 0; p < R; ++p)
#pragma GCC unroll 6
      for (int r = 0; r <= p; ++r) {
        const F x = F::fill(a.at[r * a.row + (diagonal + p) * a.col]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(x, F::load(b + (diagonal + p) * ldb + j * F::W), acc[r][j]);
      }
  }
  const float* x = a.at + begin * a.col;
  const float* y = b + begin * ldb;
  for (int64_t p = begin; p < end; ++p, x += a.col, y += ldb) {
    F v[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) v[j] = F::load(y + j * F::W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const F f = F::fill(x[r * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = fma(f, v[j], acc[r][j]);
    }
  }
  if constexpr (part == Part::lower) {
#pragma GCC unroll 6
    for (int p = 0; p < R; ++p)
#pragma GCC unroll 6
      for (int r = p; r < R; ++r) {
        const F f = F::fill(a.at[r * a.row + (diagonal + p) * a.col]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(f, F::load(b + (diagonal + p) * ldb + j * F::W), acc[r][j]);
      }
  }
  if constexpr (part == Part::solve_lower || part == Part::solve_upper) {
#pragma GCC unroll 6
    for (int n = 0; n < R; ++n) {
      const int p = part == Part::solve_lower ? n : R - 1 - n;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        if (part == Part::solve_lower ? r <= p : r >= p) continue;
        const F f = F::fill(a.at[r * a.row + (diagonal + p) * a.col]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(f, acc[p][j], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j].store(c + r * ldc + j * F::W);
}

// f(Int<R>{}, row) for blocks of R rows that cover m: of 4 to 6 rows where there are as many.
template <typename G>
inline void row_tiles(int64_t m, G&& f) {
  int64_t blocks = (m + 5) / 6;
  for (int64_t i = 0; i < m; --blocks) {
    const int64_t n = (m - i + blocks - 1) / blocks;
    if (n == 6) {
      f(Int<6>{}, i), i += 6;
    } else if (n == 5) {
      f(Int<5>{}, i), i += 5;
    } else if (n == 4) {
      f(Int<4>{}, i), i += 4;
    } else {
      for (int64_t end = i + n; i < end; ++i) f(Int<1>{}, i);
    }
  }
}
// f(Int<N>{}, column) for blocks of N vectors, `most` or fewer, that cover n columns.
template <int most = kTileVectors, typename G>
inline void vector_tiles(int64_t n, G&& f) {
  int64_t j = 0;
  if constexpr (most >= 4)
    for (; n - j > 3 * F::W; j += 4 * F::W) f(Int<4>{}, j);
  if constexpr (most >= 2)
    for (; n - j > F::W; j += 2 * F::W) f(Int<2>{}, j);
  for (; j < n; j += F::W) f(Int<1>{}, j);
}

// f(Int<ld>{}) where rows of B and C have a usual length, f(Int<0>{}) where not. The addresses of a tile are then constants
// apart, and not more than there are registers: worth 4 % where k is 32.
template <typename G>
inline void with_row_length(int64_t ldb, int64_t ldc, G&& f) {
  if (ldb == 64 && ldc == 64) return f(Int<64>{});
  if (ldb == 128 && ldc == 128) return f(Int<128>{});
  f(Int<0>{});
}

// C [m, n] (+)= A [m, k] B [k, n].
inline void matmul(int64_t m, int64_t n, int64_t k, Left a, const float* b, int64_t ldb, float* c, int64_t ldc,
                   Start start = Start::zero, const float* factor = nullptr) {
  with_row_length(ldb, ldc, [&](auto ld) {
    vector_tiles(n, [&](auto N, int64_t j) {
      row_tiles(m, [&](auto R, int64_t i) {
        tile<R.value, N.value, Part::all, ld.value>(a.from_row(i), 0, k, 0, b + j, ldb, c + i * ldc + j, ldc, start,
                                                    factor ? factor + i : nullptr);
      });
    });
  });
}

// Rows of the tile of C = A B, the products of every 16 inner indices summed apart.
template <int R, int N>
[[gnu::noinline]] void careful_tile(Left a, int64_t k, const float* b, int64_t ldb, float* c, int64_t ldc) {
  F sum[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[r][j] = F::zero();
  const float* x = a.at;
  for (int64_t from = 0; from < k; from += 16) {
    F acc[R][N];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = F::zero();
    for (int64_t p = from; p < k && p < from + 16; ++p, x += a.col, b += ldb) {
      F v[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) v[j] = F::load(b + j * F::W);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F f = F::fill(x[r * a.row]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(f, v[j], acc[r][j]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[r][j] = sum[r][j] + acc[r][j];
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[r][j].store(c + r * ldc + j * F::W);
}

// C [m, n] = A [m, k] B [k, n], the products of every 16 inner indices summed apart: long sums of one sign round less.
// For products among keys, whose errors (I + L)^-1 multiplies where keys are alike: with positive keys, K = 128, beta
// in [1, 2] and no decay it takes the error of a state after 130 tokens from 1.7e-6 to 0.7e-6.
inline void careful_matmul(int64_t m, int64_t n, int64_t k, Left a, const float* b, int64_t ldb, float* c,
                           int64_t ldc) {
  vector_tiles<kTileVectors / 2>(n, [&](auto N, int64_t j) {
    row_tiles(m, [&](auto R, int64_t i) {
      careful_tile<R.value, N.value>(a.from_row(i), k, b + j, ldb, c + i * ldc + j, ldc);
    });
  });
}

// The same with a triangle of a square A [m, m], its diagonal included: only p <= i (lower) or p >= i (upper) is read.
template <Part part>
inline void triangle_matmul(int64_t m, int64_t n, Left a, const float* b, int64_t ldb, float* c, int64_t ldc,
                            Start start = Start::zero, const float* factor = nullptr) {
  static_assert(part == Part::lower || part == Part::upper);
  with_row_length(ldb, ldc, [&](auto ld) {
    vector_tiles(n, [&](auto N, int64_t j) {
      row_tiles(m, [&](auto R, int64_t i) {
        constexpr bool lower = part == Part::lower;
        tile<R.value, N.value, part, ld.value>(a.from_row(i), lower ? 0 : i + R.value, lower ? i : m, i, b + j, ldb,
                                               c + i * ldc + j, ldc, start, factor ? factor + i : nullptr);
      });
    });
  });
}

// C [m, n] <- (I - A)^-1 C for a strictly triangular A [m, m]: p < i (solve_lower) or p > i (solve_upper) is read.
template <Part part>
inline void triangle_solve(int64_t m, int64_t n, Left a, float* c, int64_t ldc) {
  static_assert(part == Part::solve_lower || part == Part::solve_upper);
  with_row_length(ldc, ldc, [&](auto ld) {
    vector_tiles(n, [&](auto N, int64_t j) {
      row_tiles(m, [&](auto R, int64_t at) {
        constexpr bool lower = part == Part::solve_lower;
        const int64_t i = lower ? at : m - at - R.value;
        tile<R.value, N.value, part, ld.value>(a.from_row(i), lower ? 0 : i + R.value, lower ? i : m, i, c + j, ldc,
                                               c + i * ldc + j, ldc, Start::add, nullptr);
      });
    });
  });
}

// The blocks of C [m, n] = A [m, k] B [k, n] that touch its lower triangle, with careful_matmul: rows i get the columns
// below the next multiple of `block` (of F::W) above i; the others are left as they are.
inline void lower_blocks_matmul(int64_t m, int64_t k, int64_t block, Left a, const float* b, int64_t ldb, float* c,
                                int64_t ldc) {
  for (int64_t i = 0; i < m; i += block)
    careful_matmul(m - i < block ? m - i : block, i + block, k, a.from_row(i), b, ldb, c + i * ldc, ldc);
}

// y [cols, rows] = x [rows, cols] transposed; rows and cols are multiples of 16.
inline void transpose(int64_t rows, int64_t cols, const float* x, int64_t ldx, float* y, int64_t ldy) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < cols; j += 16) {
      __m512 a[16], b[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(x + (i + r) * ldx + j);
#pragma GCC unroll 8
      for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < 16; r += 4)  // a[r + k]: columns k, 4 + k, 8 + k, 12 + k of rows r to r + 3
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512d lo = _mm512_castps_pd(b[r + h]), hi = _mm512_castps_pd(b[r + h + 2]);
          a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
          a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[k], a[k + 4], 0x88);
        const __m512 even_high = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[k], a[k + 4], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0xdd);
        float* out = y + (j + k) * ldy + i;
        _mm512_storeu_ps(out, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        _mm512_storeu_ps(out + 4 * ldy, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_ps(out + 8 * ldy, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
        _mm512_storeu_ps(out + 12 * ldy, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
      }
    }
#else
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t r = i; r < i + 16; ++r) y[j * ldy + r] = x[r * ldx + j];
#endif
}

KK_END
