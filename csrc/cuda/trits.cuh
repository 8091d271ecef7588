// Five trits a byte (core/pack.h) <-> codes of 2 bits, the first channel lowest.
#pragma once
#include "cuda/launch.cuh"
#include "kvkernels/core/config.h"

namespace kk::cuda {

// Three bytes, ten bits apart -> their 15 codes. What a tripled byte has above its eight bits is the next trit.
__device__ __forceinline__ uint32_t unpack_trits(uint32_t bytes) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    bytes *= 3;
    codes |= (bytes >> 8 & 0x00300c03u) << (2 * i);
    bytes &= 0x0ff3fcffu;
  }
  return codes;
}

// The five lowest codes -> a byte.
__device__ __forceinline__ uint8_t pack_trits(uint32_t codes) {
  uint32_t v = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) v = v * 3 + (codes >> (2 * i) & 3u);
  return static_cast<uint8_t>((v * 256 + 242) / 243);
}

}  // namespace kk::cuda
