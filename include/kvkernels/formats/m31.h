// m31: keys only; channels ordered by variance, halves rotated apart, codes of 3 and 1 bits, an 8-bit scale per token and half.
// 2.125 bits per element at D = 128. Page side: core/halves.h. Grids: core/grid.h.
#pragma once
#include "kvkernels/core/halves.h"

KK_BEGIN

struct m31 : Halves<TokenCodes<MidRise<3>, ScaleE5M3>, TokenCodes<MidRise<1>, ScaleE5M3>> {
  static constexpr const char* name = "m31";
};
static_assert(m31::side_bytes(Side::K, 64, 128) == 64 * 34);

KK_END
