// Keys of any format as columns of score_rows.cuh: 8 tokens of a KV head at a time. 16-bit keys and kivi2 are multiplied with
// the queries as they are, in units of 32 channels and runs of 8; rotated formats with rotated queries, in units of a scale
// group, so that a lane has a quarter of a token's codes in one piece.
#pragma once
#include "cuda/codec.cuh"
#include "cuda/score_rows.cuh"

namespace kk::cuda {

constexpr int kPlainRun = 2;
constexpr int kKeyWords = 32;  // of a lane: 512 bytes of a row by four lanes

// Scale groups of a token in a rotated format, and the steps of one.
KK_HD int key_groups(int head_dim) { return head_dim > 128 ? 2 : 1; }
KK_HD int rotated_run(int head_dim) { return head_dim > 64 ? 8 : 4; }
KK_HD int plain_steps(int head_dim) { return (head_dim + 31) / 32 * kPlainRun; }
KK_HD int rotated_steps(int head_dim) { return head_dim / 16; }

// Where a column is.
struct KeyPlace {
  const uint8_t* page;  // K side, or null: there is no such token
  int token;
};

// What a lane has read of the 8 tokens that begin at `first`, for packed formats, or of its own column's.
struct Keys {
  uint32_t w[kKeyWords];
  uint2 scales;  // of columns 2 t and 2 t + 1, all groups: rotated formats

  template <typename Piece>
  __device__ __forceinline__ void load_piece(int at, const uint8_t* p) {
    const Piece x = __ldg(reinterpret_cast<const Piece*>(p));
    memcpy(w + at, &x, sizeof(Piece));
  }

  __device__ __forceinline__ void load_row(int head_dim, int64_t token_stride, const KeyPlace& column) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kKeyWords / 4; ++i) {
      const int c = i * 32 + t * 8;
      if (column.page && c < head_dim)
        load_piece<uint4>(4 * i, column.page + column.token * token_stride + 2 * c);
      else
        w[4 * i] = w[4 * i + 1] = w[4 * i + 2] = w[4 * i + 3] = 0;
    }
  }

  // Words of a group begin at w[8 * group]; u3 has the high bits in w[8 * group + 4].
  template <typename Fmt>
  __device__ __forceinline__ void load_codes(int head_dim, int64_t page_size, const KeyPlace& first) {
    constexpr int kBits = Fmt::low_bits;  // and words of 32 codes
    using Half = std::conditional_t<kBits == 8, uint4, std::conditional_t<kBits == 4, uint2, uint32_t>>;
    using Whole = std::conditional_t<kBits == 2, uint2, uint4>;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, codes = 4 * rotated_run(head_dim);
    const int64_t token = first.token + g;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if (group == key_groups(head_dim)) break;
      const int64_t c = group * kScaleGroup + t * codes;
      const uint8_t* low = first.page + (token * head_dim + c) * Fmt::low_bits / 8;
      if (codes == 32) {
        load_piece<Whole>(8 * group, low);
        if constexpr (kBits == 8) load_piece<Whole>(8 * group + 4, low + sizeof(Whole));
      } else {
        load_piece<Half>(8 * group, low);
      }
      if constexpr (Fmt::bits == 3) {
        const uint8_t* high = first.page + Fmt::plane1_offset(page_size, head_dim) + (token * head_dim + c) / 8;
        w[8 * group + 4] = codes == 32 ? __ldg(reinterpret_cast<const uint32_t*>(high))
                                       : __ldg(reinterpret_cast<const uint16_t*>(high));
      }
    }
    const uint8_t* scale = first.page + Fmt::scales_offset(page_size, head_dim);
    const int64_t two = first.token + 2 * t;
    if (key_groups(head_dim) == 2)
      scales = __ldg(reinterpret_cast<const uint2*>(scale + two * 4));
    else
      scales.x = __ldg(reinterpret_cast<const uint32_t*>(scale + two * 2));
  }

  __device__ __forceinline__ float scale(int column, int group, int groups) const {
    const uint32_t both = groups == 2 && column == 1 ? scales.y : scales.x;
    const int half = groups == 2 ? group : column;
    return f16_to_float(static_cast<uint16_t>(both >> (16 * half)));
  }

  // bf16 rows, or, where `f16`, of f16: a number of 11 bits is two of 8.
  template <bool SomeF16>
  __device__ __forceinline__ void multiply_row(const QueryTile& q, int head_dim, bool f16, Sums& sums) const {
#pragma unroll
    for (int step = 0; step < kKeyWords / 2; ++step) {
      if (step >= plain_steps(head_dim)) break;
      if constexpr (!SomeF16) {
        sums.add<1>(q, step, {{w[2 * step], w[2 * step + 1]}});
      } else {
        uint32_t b[2][2] = {{w[2 * step], w[2 * step + 1]}, {0, 0}};
        if (f16) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float x = f16_to_float(static_cast<uint16_t>(w[2 * step + i]));
            float y = f16_to_float(static_cast<uint16_t>(w[2 * step + i] >> 16));
            b[0][i] = next_digits(x, y, false);
            b[1][i] = next_digits(x, y, true);
          }
        }
        sums.add<2>(q, step, b);
      }
    }
  }

  // A group of codes, without its scale.
  template <typename Fmt>
  __device__ __forceinline__ void multiply_codes(const QueryTile& q, int head_dim, int group, Sums& sums) const {
    constexpr int kWords = Fmt::low_bits, kSteps = 8 / kWords;  // words of a lane, steps of a word
    const int run = rotated_run(head_dim);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      if (k * kSteps >= run) break;
      const uint32_t word = group ? w[8 + k] : w[k];
      uint32_t pairs[2 * kSteps];
      if constexpr (Fmt::bits == 8) {
        // Code u is u - 128 as a signed byte, and means half more.
        const uint32_t even = signed_bytes(word ^ 0x80808080u), odd = signed_bytes((word ^ 0x80808080u) >> 8);
        pairs[0] = add_bf16(low_halves(even, odd), 0x3f003f00u);
        pairs[1] = add_bf16(high_halves(even, odd), 0x3f003f00u);
      } else {
        // 64 + code, whose last bit means a half, less 64 + offset: codes i and i + 16 / bits at a time.
        constexpr uint32_t code = (1u << (Fmt::low_bits + 1)) - 2u;
        constexpr uint32_t offset = 0xc280u + static_cast<uint32_t>(2 * Fmt::Grid::offset);
        uint32_t high = 0;
        if constexpr (Fmt::bits == 3) high = __byte_perm((group ? w[12] : w[4]) >> (16 * k), 0, 0x4140) << 3;
        uint32_t apart[2 * kSteps];
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const int shift = Fmt::low_bits * i - 1;
          uint32_t x = (shift < 0 ? word << 1 : word >> shift) & (code * 0x10001u);
          if constexpr (Fmt::bits == 3) x |= high >> i & 0x00080008u;
          apart[i] = add_bf16(x | 0x42804280u, offset * 0x10001u);
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          pairs[i] = low_halves(apart[2 * i], apart[2 * i + 1]);
          pairs[kSteps + i] = high_halves(apart[2 * i], apart[2 * i + 1]);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sums.add<1>(q, group * run + k * kSteps + s, {{pairs[2 * s], pairs[2 * s + 1]}});
    }
  }
};

// kivi2 has its scales per channel of the page: keys are decoded, and are sums of three bf16.
__device__ __forceinline__ void multiply_kivi2(const QueryTile& q, int head_dim, int64_t page_size,
                                               const KeyPlace& first, Sums& sums) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int unit = 0; unit < head_dim / 32; ++unit) {
    const int c = unit * 32 + t * 8;
    const uint32_t codes = *reinterpret_cast<const uint16_t*>(first.page + ((first.token + g) * head_dim + c) / 4);
    float scale[8], x[8];
    load8<DType::f16>(first.page + kivi2::scale_offset(page_size, head_dim) + 2 * c, true, scale);
    load8<DType::f16>(first.page + kivi2::zero_offset(Side::K, page_size, head_dim) + 2 * c, true, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] + __fmul_rn(scale[i], static_cast<float>(codes >> (2 * i) & 3u));
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t b[3][2];
#pragma unroll
      for (int d = 0; d < 3; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) b[d][i] = next_digits(x[4 * s + 2 * i], x[4 * s + 2 * i + 1], d == 2);
      sums.add<3>(q, unit * kPlainRun + s, b);
    }
  }
}

}  // namespace kk::cuda
