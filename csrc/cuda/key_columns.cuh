// Keys of any format as columns of score_rows.cuh: 16 tokens of a KV head at a time. 16-bit keys and kivi2 are multiplied
// with the queries as they are, in units of 32 channels and runs of 8; rotated formats with rotated queries, in units of a
// scale group, so that a lane has a quarter of a token's codes in one piece.
#pragma once
#include "cuda/codec.cuh"
#include "cuda/score_rows.cuh"

namespace kk::cuda {

constexpr int kPlainRun = 2;
KK_HD int plain_steps(int head_dim) { return (head_dim + 31) / 32 * kPlainRun; }

template <typename Fmt>
inline constexpr bool kScored = Fmt::rotated;
template <>
inline constexpr bool kScored<b1> = false;
template <>
inline constexpr bool kScored<t1> = false;
template <>
inline constexpr bool kScored<u2_e5m3> = false;
template <>
inline constexpr bool kScored<t1_e5m3> = false;
template <>
inline constexpr bool kScored<b1_e5m3> = false;
template <>
inline constexpr bool kScored<m31> = false;
template <>
inline constexpr bool kScored<m42> = false;
template <>
inline constexpr bool kScored<m21> = false;

// Where a token is.
struct KeyPlace {
  const uint8_t* page;  // K side, or null: there is no such token
  int token;
};

// The codes of a word in their order, as pairs of bf16, less the offset of the grid. u3: its low bits, and half a word of the
// high ones.
template <typename Fmt, int N>
__device__ __forceinline__ void unpack_codes(uint32_t word, uint32_t high, uint32_t (&pairs)[N]) {
  if constexpr (Fmt::bits == 8) {
    // Code u is u - 128 as a signed byte, and means half more.
    word ^= 0x80808080u;
    const uint32_t even = signed_bytes(word), odd = signed_bytes(word >> 8);
    pairs[0] = add_bf16(low_halves(even, odd), 0x3f003f00u);
    pairs[1] = add_bf16(high_halves(even, odd), 0x3f003f00u);
  } else {
    // 64 + code, where the lowest bit of bf16 means a half, less 64 + offset: codes i and i + N at a time.
    constexpr uint32_t code = (1u << (Fmt::Grid::low_bits + 1)) - 2u;
    constexpr uint32_t offset = 0xc280u + static_cast<uint32_t>(2 * Fmt::Grid::offset);
    if constexpr (Fmt::bits == 3) high = __byte_perm(high, 0, 0x4140) << 3;
    uint32_t apart[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int shift = Fmt::Grid::low_bits * i - 1;
      uint32_t x = (shift < 0 ? word << 1 : word >> shift) & (code * 0x10001u);
      if constexpr (Fmt::bits == 3) x |= high >> i & 0x00080008u;
      apart[i] = add_bf16(x | 0x42804280u, offset * 0x10001u);
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      pairs[i] = low_halves(apart[2 * i], apart[2 * i + 1]);
      pairs[N / 2 + i] = high_halves(apart[2 * i], apart[2 * i + 1]);
    }
  }
}

// What a lane has read of 16 tokens, in two tiles of 8 columns. MaxD: 64, 128 or 256; packed formats have that head_dim.
template <int MaxD>
struct Keys {
  static constexpr int kGroups = MaxD > 128 ? 2 : 1, kRun = MaxD > 64 ? 8 : 4;  // of rotated formats
  static constexpr int kSteps = MaxD / 16;

  uint32_t w[2][MaxD / 8];
  uint2 scales[2];  // rotated formats: of columns 2 t and 2 t + 1, all groups

  template <typename Piece>
  __device__ __forceinline__ void load_piece(int tile, int at, const uint8_t* p) {
    const Piece x = __ldg(reinterpret_cast<const Piece*>(p));
    memcpy(w[tile] + at, &x, sizeof(Piece));
  }

  // Of the lane's own column.
  __device__ __forceinline__ void load_row(int tile, int head_dim, int64_t token_stride, const KeyPlace& column) {
    const uint8_t* row = column.page + column.token * token_stride;
#pragma unroll
    for (int i = 0; i < MaxD / 32; ++i) {
      const int c = i * 32 + threadIdx.x % 4 * 8;
      if (column.page && c < head_dim)
        load_piece<uint4>(tile, 4 * i, row + 2 * c);
      else
        w[tile][4 * i] = w[tile][4 * i + 1] = w[tile][4 * i + 2] = w[tile][4 * i + 3] = 0;
    }
  }

  // Of the 8 tokens from `first` on. A group takes kRun words, u3's high bits are in the fifth of them.
  template <typename Fmt>
  __device__ __forceinline__ void load_codes(int tile, int64_t page_size, const KeyPlace& first) {
    constexpr int kBytes = 4 * kRun * Fmt::Grid::low_bits / 8;  // of a lane and group
    using Piece = std::conditional_t<kBytes >= 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
    const int64_t token = first.token + threadIdx.x % 32 / 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int c = group * kScaleGroup + threadIdx.x % 4 * 4 * kRun;
      const uint8_t* low = first.page + (token * MaxD + c) * Fmt::Grid::low_bits / 8;
#pragma unroll
      for (int i = 0; i < kBytes; i += sizeof(Piece)) load_piece<Piece>(tile, kRun * group + i / 4, low + i);
      if constexpr (Fmt::bits == 3) {
        using High = std::conditional_t<kRun == 8, uint32_t, uint16_t>;
        const uint8_t* high = first.page + Fmt::plane1_offset(page_size, MaxD) + (token * MaxD + c) / 8;
        w[tile][kRun * group + kRun / 2] = __ldg(reinterpret_cast<const High*>(high));
      }
    }
    const uint8_t* scale =
        first.page + Fmt::scales_offset(page_size, MaxD) + (first.token + threadIdx.x % 4 * 2) * 2 * kGroups;
    if constexpr (kGroups == 2)
      scales[tile] = __ldg(reinterpret_cast<const uint2*>(scale));
    else
      scales[tile].x = __ldg(reinterpret_cast<const uint32_t*>(scale));
  }

  __device__ __forceinline__ float scale(int tile, int column, int group) const {
    const uint32_t both = kGroups == 2 && column == 1 ? scales[tile].y : scales[tile].x;
    return __half2float(__ushort_as_half(static_cast<uint16_t>(both >> (16 * (kGroups == 2 ? group : column)))));
  }

  // bf16 rows, or, where `f16`, of f16: a number of 11 bits is two of 8.
  template <bool SomeF16>
  __device__ __forceinline__ void multiply_rows(const QueryTile& q, int head_dim, const bool (&f16)[2],
                                                Sums (&sums)[2]) const {
#pragma unroll
    for (int step = 0; step < MaxD / 16; ++step) {
      if (step >= plain_steps(head_dim)) break;
      uint32_t b[2][SomeF16 ? 2 : 1][2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t pair = w[tile][2 * step + i];
          b[tile][0][i] = pair;
          if constexpr (SomeF16) {
            float x = __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
            float y = __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
            const uint32_t first = cut_digits(x, y), second = cut_digits(x, y);
            if (f16[tile]) b[tile][0][i] = first;
            b[tile][1][i] = f16[tile] ? second : 0;
          }
        }
      multiply(q, step, b, sums);
    }
  }

  // Codes of a group, without its scales.
  template <typename Fmt>
  __device__ __forceinline__ void multiply_codes(const QueryTile& q, int group, Sums (&sums)[2]) const {
    constexpr int kWordSteps = 8 / Fmt::Grid::low_bits;
#pragma unroll
    for (int k = 0; k < kRun / kWordSteps; ++k) {
      uint32_t pairs[2][2 * kWordSteps];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t high = Fmt::bits == 3 ? w[tile][kRun * group + kRun / 2] >> (16 * k) : 0;
        unpack_codes<Fmt>(w[tile][kRun * group + k], high, pairs[tile]);
      }
#pragma unroll
      for (int s = 0; s < kWordSteps; ++s)
        multiply<2, 1>(q, group * kRun + k * kWordSteps + s,
                       {{{pairs[0][2 * s], pairs[0][2 * s + 1]}}, {{pairs[1][2 * s], pairs[1][2 * s + 1]}}}, sums);
    }
  }
};

// kivi2 has its scales per channel of the page: keys are decoded, and are sums of three bf16.
template <int MaxD>
__device__ __forceinline__ void multiply_kivi2(const QueryTile& q, int64_t page_size, const KeyPlace& first,
                                               Sums (&sums)[2]) {
  const int g = threadIdx.x % 32 / 4;
  for (int unit = 0; unit < MaxD / 32; ++unit) {
    const int c = unit * 32 + threadIdx.x % 4 * 8;
    float scale[8], zero[8], x[2][8];
    load8<DType::f16>(first.page + kivi2::scale_offset(page_size, MaxD) + 2 * c, true, scale);
    load8<DType::f16>(first.page + kivi2::zero_offset(Side::K, page_size, MaxD) + 2 * c, true, zero);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint8_t* codes = first.page + ((first.token + 8 * tile + g) * MaxD + c) / 4;
      const uint32_t word = __ldg(reinterpret_cast<const uint16_t*>(codes));
#pragma unroll
      for (int i = 0; i < 8; ++i) x[tile][i] = zero[i] + __fmul_rn(scale[i], static_cast<float>(word >> (2 * i) & 3u));
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t b[2][3][2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int d = 0; d < 3; ++d)
#pragma unroll
          for (int i = 0; i < 2; ++i) b[tile][d][i] = cut_digits(x[tile][4 * s + 2 * i], x[tile][4 * s + 2 * i + 1]);
      multiply(q, unit * kPlainRun + s, b, sums);
    }
  }
}

}  // namespace kk::cuda
