// Symmetric Hadamard matrices of order 12, 20 and 28: Paley's second construction from q = 5, 9, 13.
//   Q[i][j] = chi(i - j) over GF(q)      +1 for squares, -1 for the others, 0 on the diagonal; symmetric since q = 1 mod 4
//   C       = [[0, 1 .. 1], [1, Q]]      order q + 1, C C = q I
//   H       = C (x) [[1, 1], [1, -1]]  +  I (x) [[1, -1], [-1, -1]]      order 2 (q + 1), H H = 2 (q + 1) I
// GF(9): element e = a + 3 b stands for a + b i, i^2 = -1.
// Source: Paley 1933, "On orthogonal matrices", J. Math. Phys. 12.
#pragma once
#include "kvkernels/core/config.h"

KK_BEGIN

// Bit j of row[i] is set where H[i][j] = -1.
template <int M>
struct HadamardRows {
  uint32_t row[M];
};

template <int Q>
KK_HD constexpr int gf_minus(int i, int j) {
  return Q == 9 ? (i + 3 - j % 3) % 3 + 3 * ((i / 3 + 3 - j / 3) % 3) : (i + Q - j) % Q;
}
template <int Q>
KK_HD constexpr int gf_square(int i) {
  const int a = i % 3, b = i / 3;  // (a + b i)^2 = a^2 - b^2 + 2 a b i
  return Q == 9 ? (a * a + 9 - b * b) % 3 + 3 * (2 * a * b % 3) : i * i % Q;
}

template <int M>
KK_HD constexpr HadamardRows<M> hadamard_rows() {
  constexpr int Q = M / 2 - 1;
  static_assert(Q == 5 || Q == 9 || Q == 13);
  bool square[Q] = {};
  for (int i = 0; i < Q; ++i) square[gf_square<Q>(i)] = true;
  HadamardRows<M> h{};
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < M; ++j) {
      const int r = i / 2, c = j / 2;  // block of C; [1, 1; 1, -1] or, on the diagonal, [1, -1; -1, -1] in it
      const bool in_core = r > 0 && c > 0 && r != c;
      const bool minus_c = in_core && !square[gf_minus<Q>(r - 1, c - 1)];
      const bool minus = r == c ? i % 2 + j % 2 > 0 : minus_c != (i % 2 + j % 2 == 2);
      h.row[i] |= static_cast<uint32_t>(minus) << j;
    }
  return h;
}

template <int M>
inline constexpr HadamardRows<M> kHadamard = hadamard_rows<M>();

template <int M>
constexpr bool hadamard_holds() {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < M; ++j) {
      int differ = 0;
      for (uint32_t x = kHadamard<M>.row[i] ^ kHadamard<M>.row[j]; x; x &= x - 1) ++differ;
      const bool symmetric = (kHadamard<M>.row[i] >> j & 1u) == (kHadamard<M>.row[j] >> i & 1u);
      if (!symmetric || differ != (i == j ? 0 : M / 2)) return false;
    }
  return true;
}
static_assert(hadamard_holds<12>() && hadamard_holds<20>() && hadamard_holds<28>());

KK_END
