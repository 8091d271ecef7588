// CUDA's header, with all of its functions inlined: in `*p = f(x)` g++ does not instrument the store when f is a call that
// returns a struct, as __float2half_rn does. For a host compiler the header declares them `static __attribute__((unused))`.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cstring>
#if defined(__SANITIZE_THREAD__)
#define unused always_inline
#endif
#include_next <cuda_fp16.h>
#undef unused
