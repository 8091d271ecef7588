// Packed, rotated sides of pages, read as the codes that they are. A side is parts of the channels, a part is groups of
// channels with one scale per token, whose codes are a row, those of 3 bits two. Sizes are run-time values: one kernel reads all.
#pragma once
#include "cpu/ahead.h"
#include "cpu/chunk.h"
#include "kvkernels/format.h"

KK_BEGIN

#if defined(__AVX2__)
constexpr bool kReadsCodes = true;  // products of bytes; else, and for 8 bits, rows of numbers (rows.h)
#else
constexpr bool kReadsCodes = false;
#endif

struct CodeRows {  // bytes: where in the side the first token's row begins, and of each row
  int64_t at, bytes;
};
struct CodePart {
  int bits;                         // of a code; 0: trits
  float mean;                       // of the codes: value = scale * (code - mean)
  int64_t channels, group, groups;  // groups of `group` channels
  CodeRows low, high, scales;       // high: the third bit, else bytes 0

  bool wide_scales() const { return scales.bytes == 2 * groups; }  // fp16
};
struct PackedSide {
  int parts;  // 0: not such a side
  CodePart part[2];

  template <typename Fn>
  void each_rows(Fn&& f) const {
    for (int i = 0; i < parts; ++i) {
      f(part[i].low);
      if (part[i].high.bytes) f(part[i].high);
      f(part[i].scales);
    }
  }
  int64_t token_bytes() const {
    int64_t n = 0;
    each_rows([&](const CodeRows& r) { n += r.bytes; });
    return n;
  }
  bool as_codes() const { return kReadsCodes && parts && part[0].bits < 8; }
};

template <typename Fmt, int p>
CodePart code_part(int64_t page_size, int64_t D) {
  using Part = typename Fmt::template Part<p>;
  const int64_t n = D / Fmt::parts, at = Fmt::part_offset(p, page_size, D);
  return {Part::bits,
          Part::Grid::offset,
          n,
          Part::group_channels(n),
          Part::groups(n),
          {at, Part::low_row(n)},
          {at + Part::plane1_offset(page_size, n), Part::high_row(n)},
          {at + Part::scales_offset(page_size, n), Part::scale_row(n)}};
}
inline PackedSide packed_side(Format format, int64_t page_size, int64_t D) {
  PackedSide side{};
  with_format(format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    if constexpr (Fmt::rotated) {
      side.parts = Fmt::parts;
      side.part[0] = code_part<Fmt, 0>(page_size, D);
      if constexpr (Fmt::parts == 2) side.part[1] = code_part<Fmt, 1>(page_size, D);
    }
  });
  return side;
}

// fp32 scales of the chunk's tokens, [groups][kChunk]. Tiles are read whole: the page goes on to the next multiple of 16.
void load_scales(const CodePart& part, Side side, const Chunk& c, float* scale);

#if defined(__AVX2__)

// Words of four digits that the channels of a group take: 35 for 128 trits. A constant, so that the inner loop has one address
// for all rows.
constexpr int kQuads = 36;

// Queries against the keys of a part: integers of 2 or 3 digits, in the order of the codes, times `step`.
struct CodeQueries {
  int32_t* words;  // [groups][rows][digits][kQuads]
  float* step;     // [rows]
  float* offset;   // [rows][groups][digits] mean * sum of digits
};
// q [rows][ldq], in the basis of the part.
void make_queries(const CodePart& part, int digits, const float* q, int64_t ldq, int rows, const CodeQueries& out);

// s[row][token] = base[row] + q.k, or that on top of what s holds where base is null. s [rows][kChunk].
void code_scores(const CodePart& part, int digits, const CodeQueries& q, const Chunk& c, int rows, const float* base,
                 float* s, Ahead& ahead, int sixteenths);

// acc[row][lane] += sum over tokens of p * scale * (code - mean). p [rows][kChunk], 0 behind the chunk. Where light[row], 8 bits
// are enough for p, else 15 (2 digits) or 22 (3). codes: kChunk * channels / 2 bytes of scratch. At most 2 * channels lanes.
void code_sums(const CodePart& part, int digits, const Chunk& c, const float* p, const bool* light, int rows,
               uint8_t* codes, float* acc, int64_t lda, Ahead& ahead, int sixteenths);

// Lanes of a row of acc added to the channels that they hold, out [channels].
void add_lanes(const CodePart& part, const float* acc, float* out);

#endif

KK_END
