// Scores of the tokens of a page from its label cache (kvkernels/summary.h). Lanes are tokens: nothing is summed across.
#pragma once
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"
#include "kvkernels/summary.h"

KK_BEGIN

template <int BITS>
struct Labels {
  // W labels from element i on of all channels one behind another; i is even at 4 bits.
  static F load(const uint8_t* codes, int64_t i) {
    if constexpr (BITS == 16) return F::load_bf16(reinterpret_cast<const uint16_t*>(codes) + i);
    if constexpr (BITS == 8) return F::load_i8(codes + i);
    return F::load_u4(codes + i / 2) - F::fill(7.5f);
  }
};

// s[r][t] = q[r] . labels of token t, for R rows and the W tokens from t on.
template <int BITS, int R>
inline void label_scores_block(const uint8_t* record, const SummaryLayout& at, int64_t t, const float* q, int64_t ldq,
                               F* s) {
  for (int r = 0; r < R; ++r) s[r] = F::zero();
  for (int64_t j = 0; j < at.channels; ++j) {
    const F x = Labels<BITS>::load(record, j * at.page_size + t);
    for (int r = 0; r < R; ++r) s[r] = fma(x, F::fill(q[r * ldq + j]), s[r]);
  }
  if constexpr (BITS != 16) {
    const F scale = F::load_bf16(reinterpret_cast<const uint16_t*>(record + summary_codes_bytes(at)) + t);
    for (int r = 0; r < R; ++r) s[r] = s[r] * scale;
  }
}

template <int BITS>
inline void label_scores_of(const uint8_t* record, const SummaryLayout& at, int64_t n, const float* q, int64_t ldq,
                            int rows, float* s, int64_t lds) {
  for (int64_t t = 0; t < n; t += F::W) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      F x[4];
      label_scores_block<BITS, 4>(record, at, t, q + r * ldq, ldq, x);
      for (int i = 0; i < 4; ++i) x[i].store(s + (r + i) * lds + t);
    }
    for (; r < rows; ++r) {
      F x;
      label_scores_block<BITS, 1>(record, at, t, q + r * ldq, ldq, &x);
      x.store(s + r * lds + t);
    }
  }
}

// The labels of a page whose number of tokens is no multiple of F::W, which a vector would read past the end of.
inline void label_scores_any(const uint8_t* record, const SummaryLayout& at, int64_t n, const float* q, int64_t ldq,
                             int rows, float* s, int64_t lds) {
  const uint16_t* labels = reinterpret_cast<const uint16_t*>(record);
  for (int r = 0; r < rows; ++r)
    for (int64_t t = 0; t < n; ++t) {
      float sum = 0.0f;
      for (int64_t j = 0; j < at.channels; ++j) sum += q[r * ldq + j] * bf16_to_float(labels[j * at.page_size + t]);
      s[r * lds + t] = sum;
    }
}

// s[r * lds + t] = q[r] . labels of token t of the page, t < n; what stands up to the next multiple of F::W means nothing.
// q [rows][ldq] holds the label channels only, times the scale of the scores.
inline void label_scores(const uint8_t* record, const SummaryLayout& at, int64_t n, const float* q, int64_t ldq,
                         int rows, float* s, int64_t lds) {
  if (at.page_size % F::W != 0) return label_scores_any(record, at, n, q, ldq, rows, s, lds);
  if (at.bits == 16) return label_scores_of<16>(record, at, n, q, ldq, rows, s, lds);
  if (at.bits == 8) return label_scores_of<8>(record, at, n, q, ldq, rows, s, lds);
  label_scores_of<4>(record, at, n, q, ldq, rows, s, lds);
}

KK_END
