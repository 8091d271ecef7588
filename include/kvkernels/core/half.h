// float <-> IEEE half and bfloat16, scalar, round to nearest even. These define the bytes; SIMD and CUDA must agree.
#pragma once
#include <cstring>

#include "kvkernels/core/config.h"

KK_BEGIN

KK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
KK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

KK_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }
KK_HD uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  // NaN first: rounding could carry its payload into the exponent and make it infinite. Torch's CPU NaN is 0x7fc0.
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

KK_HD float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, mag = h & 0x7fffu;
  if (mag >= 0x7c00u) return bits_float(sign | 0x7f800000u | (mag << 13));  // inf, NaN
  if (mag >= 0x0400u) return bits_float(sign | ((mag + 0x1c000u) << 13));
  const float sub = static_cast<float>(mag) * 5.9604644775390625e-8f;  // subnormal: mag * 2^-24, exact
  return bits_float(sign | float_bits(sub));
}
KK_HD uint16_t float_to_f16(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((mag >> 13) & 0x3ffu));  // NaN, payload as F16C
  if (mag >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);                          // rounds past 65504
  if (mag >= 0x38800000u) {                                                                      // normal
    const uint32_t r = mag + 0xfffu + ((mag >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
  }
  // Subnormal: adding 0.5 puts the units of 2^-24 into the last bits of the mantissa, rounded to nearest even.
  const uint32_t r = float_bits(bits_float(mag) + 0.5f);
  return static_cast<uint16_t>(sign | (r - 0x3f000000u));
}

KK_END
