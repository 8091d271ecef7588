// m42: keys only; channels ordered by variance, halves rotated apart, codes of 4 and 2 bits, an 8-bit scale per token and half.
// 3.125 bits per element at D = 128. Page side: core/halves.h. Grids: core/grid.h.
#pragma once
#include "kvkernels/core/halves.h"

KK_BEGIN

struct m42 : Halves<TokenCodes<MidRise<4>, ScaleE5M3>, TokenCodes<MidRise<2>, ScaleE5M3>> {
  static constexpr const char* name = "m42";
};
static_assert(m42::side_bytes(Side::K, 64, 128) == 64 * 50);

KK_END
