// The grid of u8, u4, u3 and u2: one fp16 scale s per token and group of 128 channels, codes c in [0, 2^B),
//   x[i] = s * (c[i] - (2^B - 1) / 2)        levels at +-s/2, +-3s/2, ...: no zero point, no table
// Encoding, in fp32 without fused multiply-add, sums in fold_sum order, so that every backend writes the same bytes:
//   1. s0 = 0.9957 rms (2 bits) | 0.586 rms (3 bits): the Gaussian optimum | max|x| / 2^(B-1) (4, 8 bits)
//   2. c0 = floor(x / s0) clamped to [-2^(B-1), 2^(B-1) - 1], plus 1/2;  s = fp16(sum x c0 / sum c0 c0), least squares
//   3. c  = floor(x / s) clamped, plus 2^(B-1)
// Values: a zero group gets s = 0 and decodes to 0; s past 65504 is clamped to it (the group clips); a group that holds
// NaN or Inf gets s = NaN, codes 0 and decodes to NaN.
#pragma once
#include <cmath>

#include "kvkernels/core/fwht.h"
#include "kvkernels/core/half.h"
#include "kvkernels/core/pack.h"

KK_BEGIN

constexpr int64_t kScaleGroup = 128;         // channels per scale
constexpr float kTinyScale = 5.9604645e-8f;  // 2^-24, the least positive fp16
constexpr float kMaxScale = 65504.0f;        // the largest fp16

template <int B>
struct MidRise {
  static constexpr int half_levels = 1 << (B - 1);
  static constexpr float offset = half_levels - 0.5f;
  static constexpr bool from_rms = B <= 3;
  static constexpr float start = B == 2 ? 0.9957f : B == 3 ? 0.586f : 1.0f / half_levels;

  KK_HD static float clamp_code(float x) {
    return fminf(fmaxf(x, -static_cast<float>(half_levels)), half_levels - 1.0f);
  }

  // x[n], n <= 128 a power of two. Returns the fp16 bits of the scale.
  KK_HD static uint16_t encode(const float* x, int64_t n, uint8_t* code) {
    float tmp[kScaleGroup] = {}, top = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      finite &= fabsf(x[i]) <= 3.4028235e38f;
      top = fmaxf(top, fabsf(x[i]));
      tmp[i] = x[i] * x[i];
    }
    if (!finite) {
      for (int64_t i = 0; i < n; ++i) code[i] = 0;
      return 0x7e00;  // NaN
    }
    const float base = from_rms ? sqrtf(fold_sum(tmp, n) * (1.0f / n)) : top;
    const float inv0 = 1.0f / fminf(fmaxf(base * start, kTinyScale), kMaxScale);
    float den = 0.0f;  // exact in any order: multiples of 1/4 below 2^22
    for (int64_t i = 0; i < n; ++i) {
      const float c = clamp_code(floorf(x[i] * inv0)) + 0.5f;
      tmp[i] = x[i] * c;
      den += c * c;
    }
    const uint16_t scale = float_to_f16(fminf(fold_sum(tmp, n) / den, kMaxScale));
    const float s = f16_to_float(scale);
    const float inv = s > 0.0f ? 1.0f / s : 0.0f;
    for (int64_t i = 0; i < n; ++i)
      code[i] = static_cast<uint8_t>(static_cast<int>(clamp_code(floorf(x[i] * inv))) + half_levels);
    return scale;
  }

  KK_HD static float decode(uint8_t code, float s) { return s * (static_cast<float>(code) - offset); }
};

KK_END
