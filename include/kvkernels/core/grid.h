// The grids of formats whose every token is coded by itself: one scale s per token and group of up to 128 channels, codes c,
//   x[i] = s * (c[i] - offset)
//   mid-rise, B bits   offset (2^B - 1) / 2: levels at +-s/2, +-3s/2, ...        u8 u4 u3 u2, and b1: the sign
//   ternary            offset 1: levels -s, 0, s                                 t1
// No zero point, no table. Encoding, in fp32 without fused multiply-add, sums in fold_sum order, so that every backend writes
// the same bytes:
//   1. s0 = start * rms (1-3 bits, ternary: the Gaussian optimum) | max|x| / 2^(B-1) (4, 8 bits)
//   2. l0 = level(x / s0);  s = sum x l0 / sum l0 l0, least squares
//   3. keys:   s is stored;  c = level(x / stored s) + offset
//      values: c = level(x / s) + offset;  stored is sum x x / sum x l, where the grid is coarse (at most 2 bits): errors of
//              values add up over the tokens that attention sums, so their mean must be right, not their square
// A zero group gets s = 0 and decodes to 0; s past the largest stored scale is clamped to it (the group clips); a group that
// holds NaN or Inf gets s = NaN, codes 0 and decodes to NaN.
// Source of 3.: Gao and Long 2024, arXiv:2405.12497 (RaBitQ), its estimator <x, x> / <x, l>.
#pragma once
#include <cmath>

#include "kvkernels/core/fwht.h"
#include "kvkernels/core/pack.h"
#include "kvkernels/core/scale.h"

KK_BEGIN

constexpr int64_t kScaleGroup = 128;         // channels per scale
constexpr float kTinyScale = 5.9604645e-8f;  // 2^-24, the least positive fp16
constexpr float kMaxScale = 65504.0f;        // the largest fp16

template <int B>
struct MidRise {
  static constexpr int bits = B;
  static constexpr int low_bits = B == 3 ? 2 : B;  // plane 0; u3 = a 2-bit plane + a 1-bit plane of the high bits
  static constexpr int half_levels = 1 << (B - 1);
  static constexpr float offset = half_levels - 0.5f;
  static constexpr bool from_rms = B <= 3;
  // (1 bit: any, the code is the sign)
  static constexpr float start = B == 1 ? 1.0f : B == 2 ? 0.9957f : B == 3 ? 0.586f : 1.0f / half_levels;
  static constexpr bool unbiased_values = B <= 2;

  KK_HD static float clamp_code(float x) {
    return fminf(fmaxf(x, -static_cast<float>(half_levels)), half_levels - 1.0f);
  }
  KK_HD static float level(float y) { return clamp_code(floorf(y)) + 0.5f; }

  // Bytes of n channels in the planes.
  KK_HD static constexpr int64_t low_bytes(int64_t n) { return n * low_bits / 8; }
  KK_HD static constexpr int64_t high_bytes(int64_t n) { return B == 3 ? n / 8 : 0; }
  KK_HD static void pack(const uint8_t* code, int64_t n, uint8_t* low, uint8_t* high) {
    pack_bits<low_bits>(code, n, 0, low);
    if constexpr (B == 3) pack_bits<1>(code, n, 2, high);
  }
  KK_HD static void unpack(const uint8_t* low, const uint8_t* high, int64_t n, uint8_t* code) {
    for (int64_t i = 0; i < n; ++i) code[i] = 0;
    unpack_bits<low_bits>(low, n, 0, code);
    if constexpr (B == 3) unpack_bits<1>(high, n, 2, code);
  }
};

struct Ternary {
  static constexpr int bits = 0;  // a fifth of a byte
  static constexpr float offset = 1.0f;
  static constexpr bool from_rms = true;
  static constexpr float start = 1.224f;  // threshold at 0.612 rms
  static constexpr bool unbiased_values = true;

  KK_HD static float level(float y) { return fminf(fmaxf(floorf(y + 0.5f), -1.0f), 1.0f); }

  KK_HD static constexpr int64_t low_bytes(int64_t n) { return (n + 4) / 5; }
  KK_HD static constexpr int64_t high_bytes(int64_t) { return 0; }
  KK_HD static void pack(const uint8_t* code, int64_t n, uint8_t* low, uint8_t*) { pack_trits(code, n, low); }
  KK_HD static void unpack(const uint8_t* low, const uint8_t*, int64_t n, uint8_t* code) { unpack_trits(low, n, code); }
};

// x[n], n <= 128 a power of two -> codes, and the stored scale. `unbiased`: step 3 as for values.
template <typename Grid, typename Scale>
KK_HD typename Scale::Bits encode_group(const float* x, int64_t n, bool unbiased, uint8_t* code) {
  float tmp[kScaleGroup] = {}, top = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite &= fabsf(x[i]) <= 3.4028235e38f;
    top = fmaxf(top, fabsf(x[i]));
    tmp[i] = x[i] * x[i];
  }
  if (!finite) {
    for (int64_t i = 0; i < n; ++i) code[i] = 0;
    return Scale::nan;
  }
  const float squares = fold_sum(tmp, n), base = Grid::from_rms ? sqrtf(squares * (1.0f / n)) : top;
  const float inv0 = 1.0f / fminf(fmaxf(base * Grid::start, kTinyScale), kMaxScale);
  float den = 0.0f;  // exact in any order: multiples of 1/4 below 2^22
  for (int64_t i = 0; i < n; ++i) {
    const float l = Grid::level(x[i] * inv0);
    tmp[i] = x[i] * l;
    den += l * l;
  }
  const float least_squares = den > 0.0f ? fold_sum(tmp, n) / den : 0.0f;
  if (unbiased) {
    const float inv = 1.0f / fmaxf(least_squares, kTinyScale);
    for (int64_t i = 0; i < n; ++i) {
      const float l = Grid::level(x[i] * inv);
      tmp[i] = x[i] * l;
      code[i] = static_cast<uint8_t>(l + Grid::offset);
    }
    const float dot = fold_sum(tmp, n);
    return Scale::from_float(dot > 0.0f ? fminf(squares / dot, Scale::largest) : 0.0f);  // Inf / Inf gives the largest
  }
  const typename Scale::Bits scale = Scale::from_float(fminf(least_squares, Scale::largest));
  const float s = Scale::to_float(scale), inv = s > 0.0f ? 1.0f / s : 0.0f;
  for (int64_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>(Grid::level(x[i] * inv) + Grid::offset);
  return scale;
}

KK_END
