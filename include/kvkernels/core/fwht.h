// Walsh-Hadamard transform, unnormalised, in place: x <- H_n x with H_n = [[H, H], [H, -H]] recursively (Sylvester order).
// Stages run from stride 1 upwards on every backend: each output is then the same sequence of fp32 additions, hence the
// same bits, whatever the vector width.
#pragma once
#include "kvkernels/core/config.h"

KK_BEGIN

KK_HD void fwht(float* x, int64_t n) {
  for (int64_t h = 1; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
}

// 1/sqrt(n) for n a power of two, as the fp32 that every backend multiplies with.
KK_HD float fwht_scale(int64_t n) {
  float s = 1.0f;
  while (n >= 4) s *= 0.5f, n /= 4;
  return n == 2 ? s * 0.70710678118654752f : s;
}

// Sum in the order x[i] + x[i + n/2], then halves of halves: what a vector register of any width does naturally.
KK_HD float fold_sum(float* x, int64_t n) {
  for (int64_t h = n / 2; h > 0; h /= 2)
    for (int64_t i = 0; i < h; ++i) x[i] += x[i + h];
  return x[0];
}

KK_END
