// Cache lines of the chunk to come. The page table says where they are; the processor's own prefetcher does not, and stops at
// every 4 KB besides. They are asked for in step with the work on the current chunk: a burst would make the loads behind it
// wait, and in a phase that asks for none the memory would idle. With 16-bit pages an even pace is worth a quarter of the time.
#pragma once
#include "cpu/chunk.h"

KK_BEGIN

class Ahead {
 public:
  static constexpr int kMaxRanges = 6 * kChunk;  // of single tokens: K and V of u3 lie in three places each

  void clear() { lines_ = num_ = now_ = 0; }
  void add(const uint8_t* x, int64_t bytes) {
    if (num_ == kMaxRanges) return;
    range_[num_++] = {x, x + bytes};
    lines_ += (bytes + kLine - 1) / kLine;
  }
  // How many lines each of `steps` calls of take() must ask for so that together they ask for n sixteenths of all.
  int share(int n, int64_t steps) const { return static_cast<int>((lines_ * n + 16 * steps - 1) / (16 * steps)); }
  [[gnu::always_inline]] void take(int64_t lines) {  // a call would put every register of the caller in memory
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
  struct Range {
    const uint8_t *at, *end;
  };
  Range range_[kMaxRanges];
  int64_t lines_ = 0;
  int num_ = 0, now_ = 0;
};

// Sixteenths of the lines asked for in each phase of a chunk: about what the phases take.
constexpr int kAheadScores = 5, kAheadSoftmax = 5, kAheadSums = 6;

KK_END
