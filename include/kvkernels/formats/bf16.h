// bf16: bfloat16 numbers as they are. 16 bits per element. fp32 input is rounded to nearest even; NaN and Inf stay.
//   bytes 2i, 2i+1 of a token: channel i, little-endian
#pragma once
#include "kvkernels/core/rows16.h"

KK_BEGIN

struct bf16 : Rows16 {
  static constexpr const char* name = "bf16";

  KK_HD static void encode(Side, const float* x, int64_t first, int64_t n, uint8_t* side, int64_t, int64_t D) {
    for (int64_t i = 0; i < n * D; ++i) {
      const uint16_t h = float_to_bf16(x[i]);
      memcpy(side + (first * D + i) * 2, &h, 2);
    }
  }
  KK_HD static void decode(Side, const uint8_t* side, int64_t first, int64_t n, float* x, int64_t, int64_t D) {
    for (int64_t i = 0; i < n * D; ++i) {
      uint16_t h;
      memcpy(&h, side + (first * D + i) * 2, 2);
      x[i] = bf16_to_float(h);
    }
  }
};

KK_END
