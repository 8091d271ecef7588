// kivi2: 2-bit affine codes, unrotated. K per channel over the tokens of the page, V per token over groups of 32 channels.
// Source: Liu et al. 2024, arXiv:2402.02750 (KIVI).
//
//   K side  +-----------------------------+------------------+-----------------+
//           | codes [page_size][D/4 B]    | scale: fp16 [D]  | zero: fp16 [D]  |
//           +-----------------------------+------------------+-----------------+
//   V side  +-----------------------------+-------------------------------+------------------------------+
//           | codes [page_size][D/4 B]    | scale: fp16 [page_size][D/32] | zero: fp16 [page_size][D/32] |
//           +-----------------------------+-------------------------------+------------------------------+
//   codes: byte i of a token: | channel 4i (bits 0-1) | 4i+1 | 4i+2 | 4i+3 |        x = zero + scale * code
//
// K: 2 + 32 / page_size bits per element; V: 3 bits. K of a page is coded at once, so write_kv refuses it (pack_pages does it).
// Encoding: zero = fp16(min), scale = fp16((max - zero) / 3), both clamped to +-65504; code = rint((x - zero) / scale) in [0, 3].
// A constant group gets scale 0, codes 0 and decodes to its own value in fp16; one with NaN or Inf decodes to NaN.
#pragma once
#include <cmath>

#include "kvkernels/core/half.h"
#include "kvkernels/core/pack.h"
#include "kvkernels/core/side.h"

KK_BEGIN

struct kivi2 {
  static constexpr const char* name = "kivi2";
  static constexpr int bits = 2;
  static constexpr bool packed = true;
  static constexpr bool rotated = false;
  static constexpr bool keys_only = false;
  static constexpr int64_t v_group = 32;

  KK_HD static constexpr bool whole_pages(Side s) { return s == Side::K; }
  KK_HD static constexpr int64_t scale_offset(int64_t page_size, int64_t D) { return page_size * D / 4; }
  KK_HD static constexpr int64_t zero_offset(Side s, int64_t page_size, int64_t D) {
    return scale_offset(page_size, D) + (s == Side::K ? D * 2 : page_size * (D / v_group) * 2);
  }
  KK_HD static constexpr int64_t side_bytes(Side s, int64_t page_size, int64_t D) {
    return scale_offset(page_size, D) + (s == Side::K ? D * 4 : page_size * (D / v_group) * 4);
  }

  struct Affine {
    uint16_t scale, zero;
  };
  // n values at x, x + stride, ...
  KK_HD static Affine fit(const float* x, int64_t n, int64_t stride) {
    float lo = x[0], hi = x[0];
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      const float v = x[i * stride];
      finite &= fabsf(v) <= 3.4028235e38f;
      lo = fminf(lo, v);
      hi = fmaxf(hi, v);
    }
    return affine(lo, hi, finite);
  }
  // Each + 0.0f makes 0.0 of -0.0: which of the two zeros fminf and fmaxf return is not defined.
  KK_HD static Affine affine(float lo, float hi, bool finite) {
    if (!finite) return {0x7e00, 0x7e00};
    const uint16_t zero = float_to_f16(fminf(fmaxf(lo + 0.0f, -65504.0f), 65504.0f));
    const float z = f16_to_float(zero);
    // rounding zero up may leave max - zero slightly negative on a constant group
    const uint16_t scale = float_to_f16(fminf(fmaxf((hi + 0.0f - z) / 3.0f, 0.0f) + 0.0f, 65504.0f));
    return {scale, zero};
  }
  KK_HD static uint8_t code(float x, Affine a) {
    const float s = f16_to_float(a.scale), inv = s > 0.0f ? 1.0f / s : 0.0f;  // NaN: inv = 0, x - NaN = NaN, fmaxf -> 0
    return static_cast<uint8_t>(fminf(fmaxf(rintf((x - f16_to_float(a.zero)) * inv), 0.0f), 3.0f));
  }

  KK_HD static void encode(Side side_kind, const float* x, int64_t first, int64_t n, uint8_t* side, int64_t page_size,
                           int64_t D) {
    const int64_t so = scale_offset(page_size, D), zo = zero_offset(side_kind, page_size, D);
    const int64_t groups = D / v_group;
    if (side_kind == Side::K)  // first == 0 and n == page_size: a channel's tokens are coded at once
      for (int64_t c = 0; c < D; ++c) {
        const Affine a = fit(x + c, n, D);
        memcpy(side + so + c * 2, &a.scale, 2);
        memcpy(side + zo + c * 2, &a.zero, 2);
      }
    for (int64_t t = first; t < first + n; ++t, x += D) {
      uint8_t codes[256];
      for (int64_t c = 0; c < D; ++c) {
        const int64_t m = side_kind == Side::K ? c : t * groups + c / v_group;
        Affine a;
        if (side_kind == Side::V && c % v_group == 0) {
          a = fit(x + c, v_group, 1);
          memcpy(side + so + m * 2, &a.scale, 2);
          memcpy(side + zo + m * 2, &a.zero, 2);
        }
        memcpy(&a.scale, side + so + m * 2, 2);
        memcpy(&a.zero, side + zo + m * 2, 2);
        codes[c] = code(x[c], a);
      }
      pack_bits<2>(codes, D, 0, side + t * D / 4);
    }
  }

  KK_HD static void decode(Side side_kind, const uint8_t* side, int64_t first, int64_t n, float* x, int64_t page_size,
                           int64_t D) {
    const int64_t so = scale_offset(page_size, D), zo = zero_offset(side_kind, page_size, D);
    for (int64_t t = first; t < first + n; ++t, x += D)
      for (int64_t c = 0; c < D; ++c) {
        const int64_t m = side_kind == Side::K ? c : t * (D / v_group) + c / v_group;
        uint16_t scale, zero;
        memcpy(&scale, side + so + m * 2, 2);
        memcpy(&zero, side + zo + m * 2, 2);
        const unsigned code = (side[t * D / 4 + c / 4] >> (2 * (c % 4))) & 3u;
        x[c] = f16_to_float(zero) + f16_to_float(scale) * static_cast<float>(code);
      }
  }
};
static_assert(kivi2::side_bytes(Side::K, 64, 128) == 64 * 32 + 512);
static_assert(kivi2::side_bytes(Side::V, 64, 128) == 64 * 48);

KK_END
