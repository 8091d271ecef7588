// Keys of any format as columns of score_rows.cuh: 16 tokens of a KV head at a time. 16-bit keys and kivi2 are multiplied
// with the queries as they are, in units of 32 channels and runs of 8; rotated formats with rotated queries, in units of a
// scale group, so that a lane has a quarter of its codes in one piece.
#pragma once
#include "cuda/codec.cuh"
#include "cuda/score_rows.cuh"

namespace kk::cuda {

constexpr int kPlainRun = 2;
KK_HD int plain_steps(int head_dim) { return (head_dim + 31) / 32 * kPlainRun; }

// Where a token is.
struct KeyPlace {
  const uint8_t* page;  // K side, or null: there is no such token
  int token;
};

// A rotated key is multiplied in units, the groups of its scales. 4 run channels of a unit are a lane's.
template <typename Fmt, int D>
struct Units {
  static constexpr int part_dim = D / Fmt::parts, channels = part_dim < kScaleGroup ? part_dim : kScaleGroup;
  static constexpr int of_part = part_dim / channels, count = of_part * Fmt::parts, run = channels / 16;
  template <int unit>
  using Codes = typename Fmt::template Part<unit / of_part>;
};

// Runs of formats of one part, and of two.
KK_HD constexpr int unit_run(int D, int parts) { return (D / parts < kScaleGroup ? D / parts : kScaleGroup) / 16; }

// Four codes as pairs of bf16, less the offset of the grid.
__device__ __forceinline__ void unpack_bytes(uint32_t word, uint32_t (&pairs)[2]) {
  // Code u is u - 128 as a signed byte, and means half more.
  word ^= 0x80808080u;
  const uint32_t even = signed_bytes(word), odd = signed_bytes(word >> 8);
  pairs[0] = add_bf16(low_halves(even, odd), 0x3f003f00u);
  pairs[1] = add_bf16(high_halves(even, odd), 0x3f003f00u);
}

// Codes 4 s ... 4 s + 3 of the low half of a word, and of the high half. Grid: at most 4 bits, trits in two. high: the third
// bits of the codes of a word, in half a one.
template <typename Grid>
__device__ __forceinline__ void unpack_halves(uint32_t word, uint32_t high, int s, uint32_t (&first)[2],
                                              uint32_t (&second)[2]) {
  // 64 + code, where the lowest bit of bf16 means a half, less 64 + offset: a code of each half at a time.
  constexpr uint32_t code = (1u << (kCodeBits<Grid> + 1)) - 2u;
  constexpr uint32_t offset = 0xc280u + static_cast<uint32_t>(2 * Grid::offset);
  if constexpr (Grid::bits == 3) high = __byte_perm(high, 0, 0x4140) << 3;
  uint32_t apart[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int shift = kCodeBits<Grid> * (4 * s + i) - 1;
    uint32_t x = (shift < 0 ? word << 1 : word >> shift) & (code * 0x10001u);
    if constexpr (Grid::bits == 3) x |= high >> (4 * s + i) & 0x00080008u;
    apart[i] = add_bf16(x | 0x42804280u, offset * 0x10001u);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    first[i] = low_halves(apart[2 * i], apart[2 * i + 1]);
    second[i] = high_halves(apart[2 * i], apart[2 * i + 1]);
  }
}

// What a lane has read of 16 tokens, in two tiles of 8 columns. MaxD: 64, 128 or 256; packed formats have that head_dim.
template <int MaxD>
struct Keys {
  static constexpr int kSteps = MaxD / 16, kUnitWords = MaxD / 16;

  uint32_t w[2][MaxD / 8];
  uint32_t scales[2][2];  // of the units of a rotated key: fp16, of columns 2 t and 2 t + 1

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

  // Of the 8 tokens from `first` on. The codes of a unit begin at word kUnitWords * unit, u3's high bits follow.
  template <typename Fmt>
  __device__ __forceinline__ void load_codes(int tile, int64_t page_size, const KeyPlace& first) {
    load_unit<Fmt, 0>(tile, page_size, first);
    if constexpr (Units<Fmt, MaxD>::count == 2) load_unit<Fmt, 1>(tile, page_size, first);
  }

  template <typename Fmt, int unit>
  __device__ __forceinline__ void load_unit(int tile, int64_t page_size, const KeyPlace& first) {
    using U = Units<Fmt, MaxD>;
    using Codes = typename U::template Codes<unit>;
    using Grid = typename Codes::Grid;
    constexpr int group = unit % U::of_part, lane_channels = 4 * U::run, D = U::part_dim;
    const uint8_t* side = first.page + Fmt::part_offset(unit / U::of_part, page_size, MaxD);
    const int64_t token = first.token + threadIdx.x % 32 / 4;
    const uint8_t* low = side + token * Codes::low_row(D) + group * Grid::low_bytes(U::channels);
    constexpr int at = kUnitWords * unit;
    if constexpr (std::is_same_v<Grid, Ternary>)
      load_trits<lane_channels>(tile, at, low);
    else
      load_bytes<lane_channels * Grid::low_bits / 8>(tile, at, low);
    if constexpr (Grid::bits == 3)
      load_bytes<lane_channels / 8>(tile, at + (U::run + 3) / 4,
                                    side + Codes::plane1_offset(page_size, D) + token * Codes::high_row(D) +
                                        group * Grid::high_bytes(U::channels));
    // Columns 2 t and 2 t + 1, where a token has of_part scales.
    using Bits = typename Codes::Scale::Bits;
    const uint8_t* scale = side + Codes::scales_offset(page_size, D) +
                           ((first.token + threadIdx.x % 4 * 2) * U::of_part + group) * sizeof(Bits);
    const uint32_t a = __ldg(reinterpret_cast<const Bits*>(scale));
    const uint32_t b = __ldg(reinterpret_cast<const Bits*>(scale) + U::of_part);
    scales[tile][unit] = sizeof(Bits) == 1 ? (a | b << 16) << 7 : a | b << 16;
  }

  // Of N bytes for each lane of the quad, this lane's.
  template <int N>
  __device__ __forceinline__ void load_bytes(int tile, int at, const uint8_t* row) {
    using Piece = std::conditional_t<(N >= 16), uint4, typename Word<(N < 16 ? N : 8)>::type>;
    const uint8_t* p = row + threadIdx.x % 4 * N;
    if constexpr (N < 4) {
      w[tile][at] = __ldg(reinterpret_cast<const Piece*>(p));
    } else {
#pragma unroll
      for (int i = 0; i < N; i += sizeof(Piece)) load_piece<Piece>(tile, at + i / 4, p + i);
    }
  }

  // The lane's 16 or 32 trits, two bits each. They begin in the middle of a byte.
  template <int N>
  __device__ __forceinline__ void load_trits(int tile, int at, const uint8_t* row) {
    const int first = threadIdx.x % 4 * N, skip = first % 5;
    const uint8_t* p = row + first / 5;
    constexpr int bytes = N / 4;  // the last of them may lie behind the row, where the page goes on
    uint32_t codes[3] = {};       // of three bytes each
#pragma unroll
    for (int i = 0; i < bytes; ++i) codes[i / 3] |= static_cast<uint32_t>(__ldg(p + i)) << (i % 3 * 10);
#pragma unroll
    for (int i = 0; i < (bytes + 2) / 3; ++i) codes[i] = unpack_trits(codes[i]);
    const uint32_t second = codes[1] >> 2 | codes[2] << 28;
    w[tile][at] = __funnelshift_r(codes[0] | codes[1] << 30, second, 2 * skip);
    if constexpr (N == 32) w[tile][at + 1] = __funnelshift_r(second, codes[2] >> 4, 2 * skip);
  }

  __device__ __forceinline__ float scale(int tile, int column, int unit) const {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(scales[tile][unit] >> (16 * column))));
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

  // Codes of a unit, without its scales.
  template <typename Fmt, int unit>
  __device__ __forceinline__ void multiply_codes(const QueryTile& q, Sums (&sums)[2]) const {
    using U = Units<Fmt, MaxD>;
    using Grid = typename U::template Codes<unit>::Grid;
    constexpr int at = kUnitWords * unit, first_step = unit * U::run;
    if constexpr (Grid::bits == 8) {
#pragma unroll
      for (int k = 0; k < U::run; ++k) {
        uint32_t b[2][1][2];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) unpack_bytes(w[tile][at + k], b[tile][0]);
        multiply(q, first_step + k, b, sums);
      }
    } else {
      constexpr int half_steps = 4 / kCodeBits<Grid>;  // of half a word
#pragma unroll
      for (int step = 0; step < U::run; step += 2 * half_steps)
#pragma unroll
        for (int s = step; s < step + half_steps && s < U::run; ++s) {
          uint32_t b[2][2][1][2];
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            const uint32_t high = Grid::bits == 3 ? w[tile][at + (U::run + 3) / 4] >> (4 * step) : 0;
            unpack_halves<Grid>(w[tile][at + step / (2 * half_steps)], high, s - step, b[0][tile][0], b[1][tile][0]);
          }
          multiply(q, first_step + s, b[0], sums);
          if (s + half_steps < U::run) multiply(q, first_step + s + half_steps, b[1], sums);
        }
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
