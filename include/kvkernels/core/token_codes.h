// One side (K or V) of a page for formats whose every token is coded by itself: u8, u4, u3, u2.
//
//   +--------------------------+-------------------------+----------------------------------------+
//   | plane 0: [page_size]     | plane 1 (u3 only):      | scales: fp16 [page_size][ceil(D/128)]   |
//   |   B0*D/8 bytes per token |   D/8 bytes per token   |                                         |
//   +--------------------------+-------------------------+----------------------------------------+
//
// A plane holds some bits of every code, little-endian and linear along the head dim (core/pack.h). u3 = 2-bit plane + 1-bit plane.
#pragma once
#include "kvkernels/core/midrise.h"
#include "kvkernels/core/side.h"

KK_BEGIN

template <int B>
struct TokenCodes {
  static constexpr int bits = B;
  static constexpr bool packed = true;
  static constexpr bool rotated = true;            // stored as H diag(t) (x - mu) for K, H x for V
  static constexpr int low_bits = B == 3 ? 2 : B;  // width of plane 0
  using Grid = MidRise<B>;

  KK_HD static constexpr bool whole_pages(Side) { return false; }
  KK_HD static constexpr int64_t groups(int64_t D) { return (D + kScaleGroup - 1) / kScaleGroup; }
  KK_HD static constexpr int64_t plane1_offset(int64_t page_size, int64_t D) { return page_size * D * low_bits / 8; }
  KK_HD static constexpr int64_t scales_offset(int64_t page_size, int64_t D) { return page_size * D * B / 8; }
  KK_HD static constexpr int64_t side_bytes(Side, int64_t page_size, int64_t D) {
    return scales_offset(page_size, D) + page_size * groups(D) * 2;
  }

  // x [n][D] in the stored basis -> tokens first .. first + n - 1 of the page.
  KK_HD static void encode(Side, const float* x, int64_t first, int64_t n, uint8_t* side, int64_t page_size,
                           int64_t D) {
    uint8_t code[256];
    for (int64_t t = first; t < first + n; ++t, x += D) {
      for (int64_t g = 0; g < groups(D); ++g) {
        const int64_t c = g * kScaleGroup, len = D - c < kScaleGroup ? D - c : kScaleGroup;
        const uint16_t scale = Grid::encode(x + c, len, code + c);
        memcpy(side + scales_offset(page_size, D) + (t * groups(D) + g) * 2, &scale, 2);
      }
      pack_bits<low_bits>(code, D, 0, side + t * D * low_bits / 8);
      if constexpr (B == 3) pack_bits<1>(code, D, 2, side + plane1_offset(page_size, D) + t * D / 8);
    }
  }

  KK_HD static void decode(Side, const uint8_t* side, int64_t first, int64_t n, float* x, int64_t page_size,
                           int64_t D) {
    for (int64_t t = first; t < first + n; ++t, x += D) {
      uint8_t code[256] = {};
      unpack_bits<low_bits>(side + t * D * low_bits / 8, D, 0, code);
      if constexpr (B == 3) unpack_bits<1>(side + plane1_offset(page_size, D) + t * D / 8, D, 2, code);
      for (int64_t i = 0; i < D; ++i) {
        uint16_t scale;
        memcpy(&scale, side + scales_offset(page_size, D) + (t * groups(D) + i / kScaleGroup) * 2, 2);
        x[i] = Grid::decode(code[i], f16_to_float(scale));
      }
    }
  }
};

KK_END
