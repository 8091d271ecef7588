// u8: rotated, 8-bit mid-rise codes, one least-squares fp16 scale per token and 128 channels. 8.125 bits per element at D = 128.
//   byte i of a token: code of channel i
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct u8 : TokenCodes<MidRise<8>> {
  static constexpr const char* name = "u8";
};
static_assert(u8::side_bytes(Side::K, 64, 128) == 64 * (8 * 128 / 8 + 2));
static_assert(u8::side_bytes(Side::V, 64, 256) == 64 * (8 * 256 / 8 + 4));

KK_END
