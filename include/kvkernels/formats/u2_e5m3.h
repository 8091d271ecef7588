// u2.e5m3: u2 with scales of 8 bits (core/scale.h). 2.0625 bits per element at D = 128.
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct u2_e5m3 : TokenCodes<MidRise<2>, ScaleE5M3> {
  static constexpr const char* name = "u2.e5m3";
};
static_assert(u2_e5m3::side_bytes(Side::K, 64, 128) == 64 * (32 + 1));

KK_END
