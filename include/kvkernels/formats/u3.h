// u3: rotated, 3-bit mid-rise codes, one least-squares fp16 scale per token and 128 channels. 3.125 bits per element at D = 128.
//   plane 0, byte i: | channel 4i | 4i+1 | 4i+2 | 4i+3 |, two low bits each; plane 1, byte i: the high bit of channels 8i .. 8i+7
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct u3 : TokenCodes<MidRise<3>> {
  static constexpr const char* name = "u3";
};
static_assert(u3::side_bytes(Side::K, 64, 128) == 64 * (3 * 128 / 8 + 2));
static_assert(u3::side_bytes(Side::V, 64, 256) == 64 * (3 * 256 / 8 + 4));

KK_END
