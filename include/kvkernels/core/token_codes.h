// One side (K or V) of a page for formats whose every token is coded by itself.
//
//   +-----------------------------------+----------------------------+-------------------------------------------+
//   | plane 0: [page_size]              | plane 1 (3 bits only):     | scales: [page_size][ceil(D/128)]          |
//   |   B0*D/8 bytes per token          |   D/8 bytes per token      |   fp16, or 1 byte (core/scale.h)          |
//   |   (trits: ceil(n/5) per n = 128)  |                            |                                           |
//   +-----------------------------------+----------------------------+-------------------------------------------+
//
// A plane holds some bits of every code, little-endian and linear along the head dim (core/pack.h). u3 = 2-bit plane + 1-bit plane.
#pragma once
#include "kvkernels/core/grid.h"
#include "kvkernels/core/side.h"

KK_BEGIN

template <typename Grid_, typename Scale_ = ScaleF16>
struct TokenCodes {
  using Grid = Grid_;
  using Scale = Scale_;
  static constexpr int bits = Grid::bits;
  static constexpr bool packed = true;
  static constexpr bool rotated = true;  // stored as H diag(t) (x - mu) for K, H x for V
  static constexpr bool keys_only = false;
  static constexpr int parts = 1;  // of the channels, each rotated and stored by itself (core/halves.h)
  template <int>
  using Part = TokenCodes;

  KK_HD static constexpr bool whole_pages(Side) { return false; }
  KK_HD static constexpr int64_t groups(int64_t D) { return (D + kScaleGroup - 1) / kScaleGroup; }
  KK_HD static constexpr int64_t group_channels(int64_t D) { return D < kScaleGroup ? D : kScaleGroup; }
  // Bytes of a token in a plane; those of group g begin g / groups(D) into it.
  KK_HD static constexpr int64_t low_row(int64_t D) { return groups(D) * Grid::low_bytes(group_channels(D)); }
  KK_HD static constexpr int64_t high_row(int64_t D) { return groups(D) * Grid::high_bytes(group_channels(D)); }
  KK_HD static constexpr int64_t scale_row(int64_t D) {
    return groups(D) * static_cast<int64_t>(sizeof(typename Scale::Bits));
  }
  KK_HD static constexpr int64_t plane1_offset(int64_t page_size, int64_t D) { return page_size * low_row(D); }
  KK_HD static constexpr int64_t scales_offset(int64_t page_size, int64_t D) {
    return page_size * (low_row(D) + high_row(D));
  }
  KK_HD static constexpr int64_t part_offset(int, int64_t, int64_t) { return 0; }
  KK_HD static constexpr int64_t side_bytes(Side, int64_t page_size, int64_t D) {
    return scales_offset(page_size, D) + page_size * scale_row(D);
  }

  // x [n][D] in the stored basis -> tokens first .. first + n - 1 of the page.
  KK_HD static void encode(Side kind, const float* x, int64_t first, int64_t n, uint8_t* side, int64_t page_size,
                           int64_t D) {
    const bool unbiased = kind == Side::V && Grid::unbiased_values;
    const int64_t len = group_channels(D);
    uint8_t code[kScaleGroup];
    for (int64_t t = first; t < first + n; ++t)
      for (int64_t g = 0; g < groups(D); ++g, x += len) {
        const auto scale = encode_group<Grid, Scale>(x, len, unbiased, code);
        memcpy(side + scales_offset(page_size, D) + t * scale_row(D) + g * sizeof(scale), &scale, sizeof(scale));
        Grid::pack(code, len, side + t * low_row(D) + g * Grid::low_bytes(len),
                   side + plane1_offset(page_size, D) + t * high_row(D) + g * Grid::high_bytes(len));
      }
  }

  KK_HD static void decode(Side, const uint8_t* side, int64_t first, int64_t n, float* x, int64_t page_size,
                           int64_t D) {
    const int64_t len = group_channels(D);
    uint8_t code[kScaleGroup];
    for (int64_t t = first; t < first + n; ++t)
      for (int64_t g = 0; g < groups(D); ++g, x += len) {
        typename Scale::Bits scale;
        memcpy(&scale, side + scales_offset(page_size, D) + t * scale_row(D) + g * sizeof(scale), sizeof(scale));
        Grid::unpack(side + t * low_row(D) + g * Grid::low_bytes(len),
                     side + plane1_offset(page_size, D) + t * high_row(D) + g * Grid::high_bytes(len), len, code);
        const float s = Scale::to_float(scale);
        for (int64_t i = 0; i < len; ++i) x[i] = s * (static_cast<float>(code[i]) - Grid::offset);
      }
  }
};

KK_END
