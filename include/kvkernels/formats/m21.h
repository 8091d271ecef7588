// m21: keys only; channels ordered by variance, halves rotated apart, codes of 2 and 1 bits, an 8-bit scale per token and half.
// 1.625 bits per element at D = 128. Page side: core/halves.h. Grids: core/grid.h.
#pragma once
#include "kvkernels/core/halves.h"

KK_BEGIN

struct m21 : Halves<TokenCodes<MidRise<2>, ScaleE5M3>, TokenCodes<MidRise<1>, ScaleE5M3>> {
  static constexpr const char* name = "m21";
};
static_assert(m21::side_bytes(Side::K, 64, 128) == 64 * 26);

KK_END
