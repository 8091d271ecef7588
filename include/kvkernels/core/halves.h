// Keys of two grids: channels in the order of their variance (KeyTransform::order), the first half of them in a fine grid, the
// second in a coarse one. Each half is rotated by itself, H_{D/2}, so that it keeps its variance, and is a side of its own:
//
//   +-----------------------------------------------+------------------------------------------------+
//   | channels order[0 .. D/2): a side of First     | channels order[D/2 .. D): a side of Second     |
//   |   with head dim D/2                           |   with head dim D/2                            |
//   +-----------------------------------------------+------------------------------------------------+
//
// After a rotation of the full width all channels are alike, and uneven bits would gain nothing.
// Source: channels reordered before quantisation as in Su et al. 2025, arXiv:2501.16383 (RotateKV), bits by the range of the
// channel as in Tao et al. 2025, arXiv:2503.16257 (VidKV); the combination measured for this library.
#pragma once
#include "kvkernels/core/token_codes.h"

KK_BEGIN

template <int p, typename First, typename Second>
struct PartOf {
  using type = First;
};
template <typename First, typename Second>
struct PartOf<1, First, Second> {
  using type = Second;
};

template <typename First, typename Second>
struct Halves {
  static constexpr bool packed = true;
  static constexpr bool rotated = true;  // stored as H_{D/2} (diag(t) (k - mu))[order], in halves
  static constexpr bool keys_only = true;
  static constexpr int parts = 2;
  template <int p>
  using Part = typename PartOf<p, First, Second>::type;

  KK_HD static constexpr bool whole_pages(Side) { return false; }
  KK_HD static constexpr int64_t part_offset(int p, int64_t page_size, int64_t D) {
    return p == 0 ? 0 : First::side_bytes(Side::K, page_size, D / 2);
  }
  KK_HD static constexpr int64_t side_bytes(Side, int64_t page_size, int64_t D) {
    return part_offset(1, page_size, D) + Second::side_bytes(Side::K, page_size, D / 2);
  }

  KK_HD static void encode(Side kind, const float* x, int64_t first, int64_t n, uint8_t* side, int64_t page_size,
                           int64_t D) {
    for (int64_t t = first; t < first + n; ++t, x += D) {
      First::encode(kind, x, t, 1, side, page_size, D / 2);
      Second::encode(kind, x + D / 2, t, 1, side + part_offset(1, page_size, D), page_size, D / 2);
    }
  }

  KK_HD static void decode(Side kind, const uint8_t* side, int64_t first, int64_t n, float* x, int64_t page_size,
                           int64_t D) {
    for (int64_t t = first; t < first + n; ++t, x += D) {
      First::decode(kind, side, t, 1, x, page_size, D / 2);
      Second::decode(kind, side + part_offset(1, page_size, D), t, 1, x + D / 2, page_size, D / 2);
    }
  }
};

KK_END
