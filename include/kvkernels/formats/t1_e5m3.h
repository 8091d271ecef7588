// t1.e5m3: t1 with scales of 8 bits (core/scale.h). 1.6875 bits per element at D = 128.
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct t1_e5m3 : TokenCodes<Ternary, ScaleE5M3> {
  static constexpr const char* name = "t1.e5m3";
};
static_assert(t1_e5m3::side_bytes(Side::K, 64, 128) == 64 * (26 + 1));

KK_END
