// u4: rotated, 4-bit mid-rise codes, one least-squares fp16 scale per token and 128 channels. 4.125 bits per element at D = 128.
//   byte i of a token: | channel 2i (bits 0-3) | channel 2i+1 (bits 4-7) |
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct u4 : TokenCodes<MidRise<4>> {
  static constexpr const char* name = "u4";
};
static_assert(u4::side_bytes(Side::K, 64, 128) == 64 * (4 * 128 / 8 + 2));
static_assert(u4::side_bytes(Side::V, 64, 256) == 64 * (4 * 256 / 8 + 4));

KK_END
