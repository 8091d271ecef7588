// One side of a page for the 16-bit formats: the numbers as they are, [page_size][D], nothing rotated, nothing scaled.
#pragma once
#include "kvkernels/core/half.h"
#include "kvkernels/core/side.h"

KK_BEGIN

struct Rows16 {
  static constexpr int bits = 16;
  static constexpr bool packed = false;
  static constexpr bool rotated = false;
  static constexpr bool keys_only = false;

  KK_HD static constexpr bool whole_pages(Side) { return false; }
  KK_HD static constexpr int64_t side_bytes(Side, int64_t page_size, int64_t D) { return page_size * D * 2; }
};

KK_END
