// How many tokens are worked on at once.
#pragma once
#include "kvkernels/core/config.h"

KK_BEGIN

constexpr int kChunk = 128;  // most tokens between two softmax updates: packed formats, whose chunk is 8 KB at 2 bits
constexpr int kRowChunk =
    64;  // formats read as rows: a chunk of 16-bit K or V is 16 KB, and the next one is on its way too
constexpr int kTile = 16;  // packed formats are read by tiles; pages of them are multiples of it

KK_END
