// The workspace of a call, in pieces.
#pragma once
#include "kvkernels/core/config.h"

KK_BEGIN

inline int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }
inline int64_t round_down(int64_t x, int64_t m) { return x / m * m; }

// Hands out 64-byte aligned pieces of the workspace; with base == nullptr it only counts.
struct Arena {
  uint8_t* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

KK_END
