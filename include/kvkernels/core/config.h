// What every header shares: host/device marks and the namespace that keeps ISAs apart.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define KK_HD __host__ __device__ inline
#else
#define KK_HD inline
#endif

// The same header is compiled with -mavx512f in one object and without it in the next. In one namespace the linker would
// keep a single copy of each inline function, possibly the AVX-512 one, and the base path would die of SIGILL. An inline
// namespace named after the ISA gives every object its own copy (tests/test_layers.py checks it).
#ifndef KK_ISA
#define KK_ISA host
#endif
#define KK_BEGIN \
  namespace kk { \
  inline namespace KK_ISA {
#define KK_END \
  }            \
  }
