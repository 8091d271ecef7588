// u2: rotated, 2-bit mid-rise codes, one least-squares fp16 scale per token and 128 channels. 2.125 bits per element at D = 128.
//   byte i of a token: | channel 4i (bits 0-1) | 4i+1 (2-3) | 4i+2 (4-5) | 4i+3 (6-7) |
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct u2 : TokenCodes<MidRise<2>> {
  static constexpr const char* name = "u2";
};
static_assert(u2::side_bytes(Side::K, 64, 128) == 64 * (2 * 128 / 8 + 2));
static_assert(u2::side_bytes(Side::V, 64, 256) == 64 * (2 * 256 / 8 + 4));

KK_END
