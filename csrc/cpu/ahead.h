// Cache lines of the chunk to come. The page table says where they are; the processor's own prefetcher does not, and stops at
// every 4 KB besides. They are asked for in step with the work on the current chunk: a burst would make the loads behind it
// wait, and in a phase that asks for none the memory would idle. With 16-bit pages an even pace is worth a quarter of the time.
//
// Ranges of 1 to 4 KB, a head's K or V of a small page, are asked for four at a time, a line of each in turn: the processor's
// prefetcher then runs ahead in all four, and lines come from L2 instead of holding one of the few misses that L1 can have
// open. On Zen 5, bf16 pages of 16 tokens, that is worth a sixth of the time, a fifth where a selection scatters them; with six
// or eight at a time it is less, and shorter or longer ranges lose by it.
#pragma once
#include "cpu/chunk.h"

KK_BEGIN

class Ahead {
 public:
  static constexpr int kMaxRanges = 8 * kChunk;  // of single tokens: K of m31 lies in five places, V of u3 in three

  void clear() { lines_ = num_ = now_ = num_fours_ = now_four_ = streams_ = 0; }
  void add(const uint8_t* x, int64_t bytes) {
    const int64_t lines = (bytes + kLine - 1) / kLine;
    if (lines >= kMinStream && lines <= kMaxStream) return add_stream(x, lines);
    if (num_ == kMaxRanges) return;
    range_[num_++] = {x, x + bytes};
    lines_ += lines;
  }
  // How many lines each of `steps` calls of take() must ask for so that together they ask for n sixteenths of all.
  int share(int n, int64_t steps) const { return static_cast<int>((lines_ * n + 16 * steps - 1) / (16 * steps)); }
  [[gnu::always_inline]] void take(int64_t lines) {  // a call would put every register of the caller in memory
    while (lines > 0 && now_four_ < num_fours_) {
      Four& f = four_[now_four_];
      int64_t n = (lines + 3) / 4;
      if (n > f.lines) n = f.lines;
      lines -= 4 * n;
      f.lines -= n;
      if (f.lines == 0) ++now_four_;
      int64_t at = f.next;
      for (; n > 0; --n, at += kLine)
        for (int i = 0; i < 4; ++i) __builtin_prefetch(f.at[i] + at, 0, 3);
      f.next = at;
    }
    while (lines > 0 && now_ < num_) {
      Range& r = range_[now_];
      const uint8_t *x = r.at, *end = r.end;
      for (; lines >= 4 && end - x >= 4 * kLine; lines -= 4, x += 4 * kLine)
        for (int i = 0; i < 4; ++i) __builtin_prefetch(x + i * kLine, 0, 3);
      for (; lines > 0 && x < end; --lines, x += kLine) __builtin_prefetch(x, 0, 3);
      r.at = x;
      if (x >= end) ++now_;
    }
  }
  void take_rest() { take(lines_ + num_); }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kMinStream = 16, kMaxStream = 64;  // lines
  static constexpr int kMaxFours = 32;                        // K and V of a chunk of 16-bit tokens, 1 KB each
  struct Range {
    const uint8_t *at, *end;
  };
  struct Four {
    const uint8_t* at[4];
    int64_t next, lines;  // bytes that were asked for of each, lines that were not
  };
  Range range_[kMaxRanges];
  Four four_[kMaxFours];
  int64_t lines_ = 0;
  int num_ = 0, now_ = 0, num_fours_ = 0, now_four_ = 0;
  int streams_ = 0;  // of the last four

  // Streams of one length stand together. What a four lacks is its first stream again.
  void add_stream(const uint8_t* x, int64_t lines) {
    if (streams_ > 0 && streams_ < 4 && four_[num_fours_ - 1].lines == lines) {
      four_[num_fours_ - 1].at[streams_++] = x;
    } else if (num_fours_ < kMaxFours) {
      four_[num_fours_++] = {{x, x, x, x}, 0, lines};
      lines_ += 4 * lines;
      streams_ = 1;
    }
  }
};

// Sixteenths of the lines asked for in each phase of a chunk: about what the phases take.
constexpr int kAheadScores = 5, kAheadSoftmax = 5, kAheadSums = 6;

KK_END
