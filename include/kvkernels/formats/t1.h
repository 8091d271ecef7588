// t1: rotated, ternary codes, five to a byte, one fp16 scale per token and 128 channels. 1.75 bits per element at D = 128.
//   byte i of a group of n = min(D, 128) channels: | channel 5i | 5i+1 | 5i+2 | 5i+3 | 5i+4 |, trits (core/pack.h); ceil(n / 5) bytes
// Page side: core/token_codes.h. Grid and encoder: core/grid.h.
// Source: the ternary values of Tao et al. 2025, arXiv:2503.16257 (VidKV), which are packed in 2 bits there.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

struct t1 : TokenCodes<Ternary> {
  static constexpr const char* name = "t1";
};
static_assert(t1::side_bytes(Side::K, 64, 128) == 64 * (26 + 2));
static_assert(t1::side_bytes(Side::V, 64, 256) == 64 * (2 * 26 + 4));
static_assert(t1::side_bytes(Side::V, 64, 64) == 64 * (13 + 2));

KK_END
