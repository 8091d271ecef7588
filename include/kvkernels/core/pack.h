// Bit packing of codes, little-endian and linear along the head dim: code i of a plane of b bits sits in byte i*b/8, at
// bit (i*b) % 8. Scalar; the definition.
#pragma once
#include "kvkernels/core/config.h"

KK_BEGIN

template <int B>
KK_HD void pack_bits(const uint8_t* code, int64_t n, int shift,
                     uint8_t* out) {  // takes bits [shift, shift + B) of each code
  constexpr int per_byte = 8 / B;
  for (int64_t i = 0; i < n; i += per_byte) {
    unsigned byte = 0;
    for (int j = 0; j < per_byte; ++j) byte |= ((code[i + j] >> shift) & ((1u << B) - 1u)) << (B * j);
    out[i / per_byte] = static_cast<uint8_t>(byte);
  }
}

template <int B>
KK_HD void unpack_bits(const uint8_t* in, int64_t n, int shift, uint8_t* code) {  // ORs the plane into code at `shift`
  constexpr int per_byte = 8 / B;
  for (int64_t i = 0; i < n; ++i)
    code[i] =
        static_cast<uint8_t>(code[i] | (((in[i / per_byte] >> (B * (i % per_byte))) & ((1u << B) - 1u)) << shift));
}

KK_END
