// b1: rotated, the sign and one fp16 scale per token and 128 channels. 1.125 bits per element at D = 128.
//   byte i of a token: | channel 8i (bit 0) | 8i+1 | ... | 8i+7 (bit 7) |        1: positive
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct b1 : TokenCodes<MidRise<1>> {
  static constexpr const char* name = "b1";
};
static_assert(b1::side_bytes(Side::K, 64, 128) == 64 * (128 / 8 + 2));
static_assert(b1::side_bytes(Side::V, 64, 256) == 64 * (256 / 8 + 4));

KK_END
