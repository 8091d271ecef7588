// The scale of a group of codes as it is stored: fp16, or 8 bits that keep fp16's range.
//   e5m3   | exponent 5 | mantissa 3 |   the fp16 number without its sign, mantissa rounded to 3 bits (nearest, ties to even)
// Scales are never negative, so e4m3's sign bit is better spent on the exponent: no factor per tensor is needed.
#pragma once
#include "kvkernels/core/half.h"

KK_BEGIN

struct ScaleF16 {
  using Bits = uint16_t;
  static constexpr Bits nan = 0x7e00;
  static constexpr float largest = 65504.0f;
  KK_HD static Bits from_float(float x) { return float_to_f16(x); }  // 0 <= x <= largest
  KK_HD static float to_float(Bits b) { return f16_to_float(b); }
};

struct ScaleE5M3 {
  using Bits = uint8_t;
  static constexpr Bits nan = 0xfc;
  static constexpr float largest = 61440.0f;
  KK_HD static Bits from_float(float x) {
    const unsigned h = float_to_f16(x);
    return static_cast<Bits>((h + 0x3fu + (h >> 7 & 1u)) >> 7);
  }
  KK_HD static float to_float(Bits b) { return f16_to_float(static_cast<uint16_t>(b << 7)); }
};

KK_END
