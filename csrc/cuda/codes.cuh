// Packed codes -> fp16 operands of mma.m16n8k16, without a conversion: a code is put into the mantissa of a half whose
// exponent makes it 1024 + code * 2^p, and one fused multiply-add makes the centred number of it, exactly.
//
//   half   0 11001 mmmmmmmmmm     0x6400 | code << p  =  1024 + code 2^p       2 <= p, p + bits <= 10
//   hfma2  x 2^-p - (1024 2^-p + offset)  =  code - offset                   both constants are fp16 numbers, as p >= 2
//
// An operand register holds two halves, and unpack() makes eight of them at a time from a Pair: eight codes of one run
// of channels in the low halves, eight of another in the high ones.
//   keys    the runs are channels 0-7 and 8-15 of one token (q's channels lie in the same order)
//   values  the runs are the same eight channels of two tokens
// Codes of one bit are signs: 0.5 with the bit's complement on top.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "kvkernels/core/config.h"

namespace kk::cuda {

__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 r =
      __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b), *reinterpret_cast<__half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&r);
}
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&h);
}

KK_HD constexpr uint32_t twice(uint32_t half) { return half | half << 16; }

// The way of a code that stands at bit B * i of its half (B = 2, 4; of the 2-bit plane for 3): shifted left by `shift`,
// it stands at bit p. Few different shifts, 2 <= p, and p + bits <= 10.
//   i     0  1  2  3  4  5  6  7
//   u2    8  2  4  6  8  2  4  6   = p, after shifts by  8 0 0 0 0 -8 -8 -8
//   u3    4  2  4  6  4  6  4  6                         4 0 0 0 -4 -4 -8 -8
//   u4    4  4  4  4                                     4 0 -4 -8
KK_HD constexpr int code_shift(int bits, int i) {
  if (bits == 2) return i == 0 ? 8 : i < 5 ? 0 : -8;
  if (bits == 3) return i == 0 ? 4 : i < 4 ? 0 : i < 6 ? -4 : -8;
  return 4 - 4 * i;
}
KK_HD constexpr int code_place(int bits, int i) { return (bits == 4 ? 4 : 2) * i + code_shift(bits, i); }

__device__ __forceinline__ uint32_t shift_left(uint32_t x, int n) { return n >= 0 ? x << n : x >> -n; }

template <int B>
struct Pair {
  static constexpr int words = B <= 3 ? 1 : B / 2;
  // b1, u2, u3: eight codes per half (b1: in bits 0-7; what stands above them does not matter), of u3 two bits each;
  // u4: four codes per half and word; u8: bytes a0 b0 a1 b1, ...
  uint32_t low[words];
  uint32_t high;  // u3: bits 0-7 of each half are the codes' third bits; what stands above them does not matter
};

// Bytes a0 a1 a2 a3 and b0 b1 b2 b3 -> [a0 a1 | b0 b1] and [a2 a3 | b2 b3] (u8: a0 b0 a1 b1 and a2 b2 a3 b3).
template <int B>
__device__ __forceinline__ void pair_words(const uint32_t* a, const uint32_t* b, Pair<B>& out) {
  if constexpr (B == 4) {
    out.low[0] = __byte_perm(a[0], b[0], 0x5410);
    out.low[1] = __byte_perm(a[0], b[0], 0x7632);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out.low[2 * i] = __byte_perm(a[i], b[i], 0x5140);
      out.low[2 * i + 1] = __byte_perm(a[i], b[i], 0x7362);
    }
  }
}

// Channels 16 n ... 16 n + 15 of one token: (w, high) are this lane's words.
template <int B>
__device__ __forceinline__ Pair<B> pair_channels(const uint32_t* w, uint32_t high, int n) {
  Pair<B> out{};
  if constexpr (B == 1) {
    out.low[0] = __byte_perm(w[0], w[0], n == 0 ? 0x1100 : 0x3322);
  } else if constexpr (B <= 3) {
    out.low[0] = w[n];
    if constexpr (B == 3) out.high = __byte_perm(high, high, n == 0 ? 0x1100 : 0x3322);
  } else {
    pair_words<B>(w + n * B / 2, w + n * B / 2 + B / 4, out);
  }
  return out;
}

// Channels 0-3 and 4-7 of one token instead of 0-7 and 8-15: unpack() makes four operands of them, and four that mean
// nothing.
template <int B>
__device__ __forceinline__ Pair<B> pair_few_channels(uint32_t w, uint32_t high) {
  static_assert(B <= 4);
  Pair<B> out{};
  out.low[0] = B == 1 ? w | w << 12 : B == 4 ? w : w | w << 8;
  out.high = high | high << 12;
  return out;
}

// Channels 8 n ... 8 n + 7 of tokens a and b.
template <int B>
__device__ __forceinline__ Pair<B> pair_tokens(const uint32_t* a, uint32_t a_high, const uint32_t* b, uint32_t b_high,
                                               int n) {
  Pair<B> out{};
  if constexpr (B == 1) {
    out.low[0] = __byte_perm(a[0], b[0], n == 0 ? 0x5410 : 0x5511);
  } else if constexpr (B <= 3) {
    out.low[0] = __byte_perm(a[0], b[0], n == 0 ? 0x5410 : 0x7632);
    if constexpr (B == 3) out.high = __byte_perm(a_high, b_high, n == 0 ? 0x4400 : 0x5511);
  } else {
    pair_words<B>(a + n * B / 4, b + n * B / 4, out);
  }
  return out;
}

// fp16 (1024, 1024). It comes to kernels as an argument and through shared memory, so that the compilers see a variable
// in a register: of (a & mask) | constant ptxas makes two instructions, of (a & mask) | register one, and this is a
// third of all that unpacks 2-bit codes.
constexpr uint32_t kBias = twice(0x6400);

// fp16 (-(1024 2^-p + offset)), twice.
KK_HD constexpr uint32_t minus_offset(int p, uint32_t twice_offset) {
  return twice(0x8000u | (25u - p) << 10 | twice_offset << p >> 1);
}

struct Constants {
  uint32_t bias;             // kBias
  uint32_t minus_offset[4];  // of codes of 2 bits at p = 2, 4, 6, 8: there are two kinds of them, u2's and trits
  __device__ explicit Constants(uint32_t fp16_bias, bool trits = false) : bias(fp16_bias) {
    for (int i = 0; i < 4; ++i) minus_offset[i] = cuda::minus_offset(2 * i + 2, trits ? 2 : 3);
  }
};

// out[i] = code - offset of the two runs' channel i; `Quarter`: code / 4 instead (kivi2).
template <int B, bool Quarter = false>
__device__ __forceinline__ void unpack(const Pair<B>& x, const Constants& k, uint32_t (&out)[8]) {
  if constexpr (B == 1) {
    const uint32_t minus_half = k.bias ^ twice(0x6400 ^ 0xb800);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = (x.low[0] << (15 - i) & twice(0x8000)) ^ minus_half;
  } else if constexpr (B == 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // 1024 + code; 127.5 more would not be an fp16 number, so it takes two steps
      const uint32_t biased = __byte_perm(x.low[i / 2], 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342);
      const uint32_t code = fma2(biased, twice(0x3c00), twice(0xe400));
      out[i] = fma2(code, twice(0x3c00), twice(0xd7f8));
    }
  } else {
    constexpr int plane = B == 3 ? 2 : B, per_word = 8 / Pair<B>::words;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i % per_word, p = code_place(B, at);
      uint32_t m = (shift_left(x.low[i / per_word], code_shift(B, at)) & twice(((1u << plane) - 1u) << p)) | k.bias;
      if constexpr (B == 3) m |= shift_left(x.high, p + 2 - i) & twice(4u << p);
      if constexpr (Quarter)
        out[i] = fma2(m, twice((13u - p) << 10), twice(0x8000u | (23u - p) << 10));
      else
        out[i] = fma2(m, twice((15u - p) << 10), B == 2 ? k.minus_offset[p / 2 - 1] : minus_offset(p, (1u << B) - 1u));
    }
  }
}

// N bytes of shared memory into words; fewer than four bytes leave the rest zero.
template <int N>
__device__ __forceinline__ void load_words(const uint8_t* p, uint32_t (&w)[N < 4 ? 1 : N / 4]) {
  if constexpr (N == 1) w[0] = *p;
  if constexpr (N == 2) w[0] = *reinterpret_cast<const uint16_t*>(p);
  if constexpr (N == 4) w[0] = *reinterpret_cast<const uint32_t*>(p);
  if constexpr (N == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    w[0] = v.x, w[1] = v.y;
  }
  if constexpr (N >= 16) {
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i];
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
}

}  // namespace kk::cuda
