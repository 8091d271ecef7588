// Bit packing of codes, little-endian and linear along the head dim: code i of a plane of b bits sits in byte i*b/8, at
// bit (i*b) % 8. Trits: five to a byte. Scalar; the definition.
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

// Code i in {0, 1, 2} is trit i % 5 of byte i / 5: of v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4 the byte is b = ceil(256 v / 243),
// so that t_j = (b 3^j mod 256) * 3 / 256: no division, no table. The last byte is filled up with zeros.
KK_HD void pack_trits(const uint8_t* code, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 5) {
    unsigned v = 0;
    for (int64_t j = i; j < i + 5; ++j) v = v * 3 + (j < n ? code[j] : 0u);
    out[i / 5] = static_cast<uint8_t>((v * 256 + 242) / 243);
  }
}

KK_HD void unpack_trits(const uint8_t* in, int64_t n, uint8_t* code) {
  for (int64_t i = 0; i < n; i += 5) {
    unsigned b = in[i / 5];
    for (int64_t j = i; j < i + 5 && j < n; ++j, b = b * 3 & 255u) code[j] = static_cast<uint8_t>(b * 3 >> 8);
  }
}

KK_END
