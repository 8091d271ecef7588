// Tokens that are worked on at once.
#pragma once
#include "kvkernels/pool.h"

KK_BEGIN

constexpr int kChunk = 128;  // most tokens between two softmax updates: packed formats, whose chunk is 8 KB at 2 bits
constexpr int kRowChunk =
    64;  // formats read as rows: a chunk of 16-bit K or V is 16 KB, and the next one is on its way too
constexpr int kTile = 16;     // packed formats are read by tiles; pages of them are multiples of it
constexpr int kMaxRows = 64;  // query rows of a task; where there are more, the pages are read again

// Tokens that lie together in one page.
struct Piece {
  const uint8_t* k;  // K side of the page and head (packed) or its first row (16-bit caches: rows k_token apart)
  const uint8_t* v;
  int64_t token;  // first token within the page
  int64_t start;  // its position in the sequence
  int n, col;     // tokens, and the first one's column in the chunk

  const uint8_t* side(Side which) const { return which == Side::K ? k : v; }
};
struct Chunk {
  const Pool* pool;
  int pool_index;
  int64_t start, end;  // positions of the first token and behind the last one; only of a selection more than n apart
  int skip;            // columns that do not count: a window may begin inside a tile
  int n, pieces;
  Piece piece[kChunk];

  bool one_run() const { return end - start == n; }
  // Columns of tokens before a position.
  int64_t column(int64_t position) const {
    if (position <= start) return 0;
    if (position >= end) return n;
    if (one_run()) return position - start;
    int lo = 0, hi = pieces - 1;  // the first piece that ends behind the position
    while (lo < hi) {
      const int mid = (lo + hi) / 2;
      if (piece[mid].start + piece[mid].n <= position)
        lo = mid + 1;
      else
        hi = mid;
    }
    return piece[lo].col + (position > piece[lo].start ? position - piece[lo].start : 0);
  }
};

KK_END
