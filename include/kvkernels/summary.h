// What stands for a run of tokens when pages are chosen: a record of one KV head.
//
//   minmax    [ max of every channel | min of every channel | scales ]     Quest's bounds: q.k <= sum max(q max, q min)
//   mean      [ mean of every channel | scale ]                            a landmark
//   channels  [ channel c[0] of every token | channel c[1] ... | scales ]  a label cache: some channels of every token
//
// At 16 bits numbers are bf16 and there are no scales. At 8 bits they are signed bytes times a scale: max, min and mean
// each have one, channels one per token. At 4 bits (channels only) code c of 0 ... 15 means (c - 7.5) * scale, tokens 2 i
// and 2 i + 1 of a channel in the low and high half of byte i. Scales are bf16, rounded up so that the largest number has
// a code; records are padded to 16 bytes. Bounds are rounded outwards, so that they stay bounds; numbers of labels and
// means are rounded to nearest even. A run with a NaN or infinite key has NaN scales, and scores NaN at 8 and 4 bits.
#pragma once
#include <cmath>

#include "kvkernels/core/half.h"

namespace kk {

enum class SummaryKind : int32_t { minmax = 0, mean = 1, channels = 2 };

struct SummaryLayout {
  SummaryKind kind;
  int32_t bits;       // 16, 8; channels also 4
  int64_t head_dim;   // D
  int64_t channels;   // r, of a label cache
  int64_t page_size;  // tokens of a record of labels, even at 4 bits
};

}  // namespace kk

KK_BEGIN

KK_HD int64_t summary_codes_bytes(const SummaryLayout& s) {
  const int64_t numbers = s.kind == SummaryKind::minmax ? 2 * s.head_dim
                          : s.kind == SummaryKind::mean ? s.head_dim
                                                        : s.channels * s.page_size;
  return numbers * s.bits / 8;
}
KK_HD int64_t summary_scales(const SummaryLayout& s) {
  if (s.bits == 16) return 0;
  return s.kind == SummaryKind::minmax ? 2 : s.kind == SummaryKind::mean ? 1 : s.page_size;
}
KK_HD int64_t summary_bytes(const SummaryLayout& s) {
  return (summary_codes_bytes(s) + 2 * summary_scales(s) + 15) / 16 * 16;
}

// The next bf16 that is not below x; above it for bf16_down.
KK_HD uint16_t bf16_up(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u >> 16) + ((u & 0xffffu) != 0 && (u >> 31) == 0));
}
KK_HD uint16_t bf16_down(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u >> 16) + ((u & 0xffffu) != 0 && (u >> 31) != 0));
}

// Of numbers whose largest magnitude is `most`, with codes up to `top`: 127, or 7.5 at 4 bits. NaN if most is not finite.
KK_HD uint16_t summary_scale(float most, float top) { return most - most == 0.0f ? bf16_up(most / top) : 0x7fc0; }

enum class Rounding : int { down, nearest, up };

// A signed byte; scale is that of summary_scale.
KK_HD int32_t summary_code8(float x, float scale, Rounding r) {
  if (!(scale > 0.0f)) return 0;
  const float c = x / scale, n = r == Rounding::up ? ceilf(c) : r == Rounding::down ? floorf(c) : rintf(c);
  return static_cast<int32_t>(n < -127.0f ? -127.0f : n > 127.0f ? 127.0f : n);
}
KK_HD int32_t summary_code4(float x, float scale) {
  if (!(scale > 0.0f)) return 0;
  const float n = rintf(x / scale + 7.5f);
  return static_cast<int32_t>(n < 0.0f ? 0.0f : n > 15.0f ? 15.0f : n);
}

KK_END
