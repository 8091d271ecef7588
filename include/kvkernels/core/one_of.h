// A run-time value becomes a compile-time one, or an error that lists what is allowed: the list and the ladder are one text.
#pragma once
#include "kvkernels/core/config.h"

namespace kk {
// Out of line (csrc/fail.cpp) so that per-ISA objects hold no STL code. Throws std::invalid_argument.
[[noreturn]] void fail_one_of(const char* what, const int64_t* allowed, int n, int64_t got);
[[noreturn]] void fail(const char* message);
}  // namespace kk

KK_BEGIN

template <int64_t N>
struct Int {
  static constexpr int64_t value = N;
  constexpr operator int64_t() const { return N; }
};

template <int64_t... Ns, typename F>
inline void one_of(const char* what, int64_t got, F&& f) {
  const bool hit = ((got == Ns && (f(Int<Ns>{}), true)) || ...);
  if (!hit) {
    constexpr int64_t allowed[] = {Ns...};
    fail_one_of(what, allowed, sizeof...(Ns), got);
  }
}

KK_END
