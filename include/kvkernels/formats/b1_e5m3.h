// b1.e5m3: b1 with scales of 8 bits (core/scale.h). 1.0625 bits per element at D = 128.
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct b1_e5m3 : TokenCodes<MidRise<1>, ScaleE5M3> {
  static constexpr const char* name = "b1.e5m3";
};
static_assert(b1_e5m3::side_bytes(Side::K, 64, 128) == 64 * (16 + 1));

KK_END
