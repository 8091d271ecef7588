// K and V of one token and KV head between registers and page bytes: what the formats' headers say in scalar code, done
// by the L lanes of a row (cuda/rows.cuh). Same bytes. Products are __fmul_rn where a sum follows, so none is fused.
#pragma once
#include <type_traits>

#include "cuda/rows.cuh"
#include "cuda/trits.cuh"
#include "kvkernels/format.h"

namespace kk::cuda {

constexpr int kCodecThreads = 256;  // of the blocks that encode and decode

// One side of a pool.
struct PoolSide {
  uint8_t* data;
  int64_t page_stride, head_stride, token_stride;  // bytes; token_stride: 16-bit sides
  int64_t page_size;
  int head_dim;
  Side side;
  Format format;
  bool rotated;
  int parts;               // of its channels, each rotated by itself (core/halves.h)
  KeyTransform transform;  // null where it does not apply
  bool transform_vector;   // 16-byte aligned

  __device__ uint8_t* page(int64_t page, int64_t head) const { return data + page * page_stride + head * head_stride; }
};

inline PoolSide pool_side(const std::string& what, const Pool& p, Side side, const KeyTransform& t, int64_t page_size,
                          int64_t head_dim) {
  const bool keys = side == Side::K;
  PoolSide s{};
  s.data = keys ? p.k : p.v;
  s.page_stride = keys ? p.k_page : p.v_page;
  s.head_stride = keys ? p.k_head : p.v_head;
  s.token_stride = keys ? p.k_token : p.v_token;
  s.page_size = page_size;
  s.head_dim = static_cast<int>(head_dim);
  s.side = side;
  s.format = keys ? p.k_format : p.v_format;
  with_format(s.format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    s.rotated = Fmt::rotated;
    s.parts = 1;
    if constexpr (Fmt::rotated) s.parts = Fmt::parts;
  });
  if (keys && s.rotated) s.transform = t;
  if (s.parts == 1) s.transform.order = nullptr;
  s.transform_vector = aligned16(s.transform.centre) && aligned16(s.transform.balance) &&
                       aligned16(s.transform.order);  // head_dim * 4 bytes are
  require_aligned16(what + (keys ? ", keys" : ", values"), s.data, s.page_stride, s.head_stride, s.token_stride);
  return s;
}

// f(Int<L>): the lanes that hold a row.
template <typename F>
inline void with_row_lanes(int64_t head_dim, F&& f) {
  one_of<64, 80, 96, 112, 128, 192, 256>("head_dim", head_dim, [&](auto D) {
    f(Int<(D.value <= 64 ? 8 : D.value <= 128 ? 16 : 32)>{});
  });
}

// slot -> page and token in the page. A 64-bit division is a call to 80 instructions, one of 32 bits takes 20.
struct Slot {
  int64_t page, token;
};
__device__ __forceinline__ Slot locate(int64_t slot, int64_t page_size) {
  if (static_cast<uint64_t>(slot | page_size) >> 32) return {slot / page_size, slot % page_size};
  const uint32_t s = static_cast<uint32_t>(slot), n = static_cast<uint32_t>(page_size);
  return {s / n, s % n};
}

// ---- codes of a token: core/token_codes.h

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// Bits of a code of plane 0 in registers: trits have two there.
template <typename Grid>
inline constexpr int kCodeBits = Grid::low_bits;
template <>
inline constexpr int kCodeBits<Ternary> = 2;

// Where the codes and the scale of this lane's channels are. L: the lanes of a part of the row.
template <typename Codes, int L>
struct TokenPlace {
  using Grid = typename Codes::Grid;
  using Scale = typename Codes::Scale;
  static constexpr int D = kPerLane * L, group_lanes = L < 16 ? L : 16;
  uint8_t *low, *high;  // low: of the lane's group
  typename Scale::Bits* scale;

  static __device__ int group_lane() { return threadIdx.x % group_lanes; }

  // A side has less than 4 GiB.
  __device__ TokenPlace(uint8_t* side, int64_t token, int64_t page_size) {
    const uint32_t lane = threadIdx.x % L, group = lane / group_lanes;
    low = side + static_cast<uint32_t>(token * Codes::low_row(D) + group * Grid::low_bytes(kPerLane * group_lanes));
    high = side + static_cast<uint32_t>(Codes::plane1_offset(page_size, D) + token * (D / 8) + lane);
    scale = reinterpret_cast<typename Scale::Bits*>(side + static_cast<uint32_t>(Codes::scales_offset(page_size, D) +
                                                                                 token * Codes::scale_row(D) +
                                                                                 group * sizeof(typename Scale::Bits)));
  }

  using LowWord = typename Word<kCodeBits<Grid>>::type;  // eight codes
  __device__ LowWord* low_word() const { return reinterpret_cast<LowWord*>(low) + group_lane(); }

  __device__ __forceinline__ uint64_t load_low() const {
    if constexpr (std::is_same_v<Grid, Ternary>) {
      // Channels 8 i ... 8 i + 7 begin in the middle of a byte and lie in two or three.
      const int first = group_lane() * kPerLane, skip = first % 5;
      const uint8_t* p = low + first / 5;
      const uint32_t third = skip > 2 ? p[2] : 0;
      return unpack_trits(p[0] | static_cast<uint32_t>(p[1]) << 10 | third << 20) >> (2 * skip);
    } else {
      return *low_word();
    }
  }

  // By a warp; `active` lanes write.
  __device__ __forceinline__ void store_low(uint64_t codes, bool active) const {
    if constexpr (std::is_same_v<Grid, Ternary>) {
      // A lane writes the one or two bytes that begin with its channels; the last of them ends in the next lane's.
      const uint32_t own = static_cast<uint32_t>(codes);
      const uint32_t next = __shfl_down_sync(kWholeWarp, own, 1, group_lanes);
      const uint32_t both = own | (group_lane() + 1 < group_lanes ? next : 0u) << 16;
      const int first = group_lane() * kPerLane, skip = (5 - first % 5) % 5;
      uint8_t* p = low + (first + skip) / 5;
      if (!active) return;
      p[0] = pack_trits(both >> (2 * skip));
      if (skip + 5 < kPerLane) p[1] = pack_trits(both >> (2 * skip + 10));
    } else {
      if (active) *low_word() = static_cast<LowWord>(codes);
    }
  }
};

template <typename Codes, int L>
__device__ __forceinline__ void unpack(const TokenPlace<Codes, L>& at, float (&x)[8]) {
  using Grid = typename Codes::Grid;
  constexpr int bits = kCodeBits<Grid>;
  const uint64_t low = at.load_low();
  const float s = Codes::Scale::to_float(*at.scale);
  uint32_t high = 0;
  if constexpr (Grid::bits == 3) high = *at.high;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t code = static_cast<uint32_t>(low >> (bits * i)) & ((1u << bits) - 1u);
    if constexpr (Grid::bits == 3) code |= (high >> i & 1u) << 2;
    x[i] = __fmul_rn(s, static_cast<float>(code) - Grid::offset);
  }
}

// encode_group of core/grid.h. x is in the stored basis; nothing is written for lanes that are not `active`.
template <typename Codes, int L>
__device__ __forceinline__ void pack(const float (&x)[8], bool unbiased, bool active, const TokenPlace<Codes, L>& at) {
  using Grid = typename Codes::Grid;
  using Scale = typename Codes::Scale;
  constexpr int G = TokenPlace<Codes, L>::group_lanes, n = kPerLane * G, bits = kCodeBits<Grid>;
  float t[8];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) finite &= fabsf(x[i]) <= 3.4028235e38f;
  finite = !any_lane<G>(!finite);

  float base, squares = 0.0f;
  if constexpr (Grid::from_rms) {
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i] = __fmul_rn(x[i], x[i]);
    squares = fold_sum<G>(t);
    base = sqrtf(squares * (1.0f / n));
  } else {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[i]));
    base = fold_lanes(top, G, [](float a, float b) { return fmaxf(a, b); });
  }
  const float inv0 = 1.0f / fminf(fmaxf(base * Grid::start, kTinyScale), kMaxScale);

  float den = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float l = Grid::level(__fmul_rn(x[i], inv0));
    t[i] = __fmul_rn(x[i], l);
    den += l * l;  // exact, fused or not
  }
  den = fold_lanes(den, G, [](float a, float b) { return a + b; });
  const float dot = fold_sum<G>(t), least_squares = den > 0.0f ? dot / den : 0.0f;

  uint64_t low = 0;
  uint32_t high = 0;
  const auto make_codes = [&](float inv) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float l = Grid::level(__fmul_rn(x[i], inv));
      t[i] = __fmul_rn(x[i], l);
      const uint32_t code = static_cast<uint32_t>(l + Grid::offset);
      low |= static_cast<uint64_t>(code & ((1u << bits) - 1u)) << (bits * i);
      high |= (code >> 2 & 1u) << i;
    }
  };
  typename Scale::Bits scale;
  if (Grid::unbiased_values && unbiased) {  // alike for the lanes of a warp
    make_codes(1.0f / fmaxf(least_squares, kTinyScale));
    const float length = fold_sum<G>(t);
    scale = Scale::from_float(length > 0.0f ? fminf(squares / length, Scale::largest) : 0.0f);
  } else {
    scale = Scale::from_float(fminf(least_squares, Scale::largest));
    const float s = Scale::to_float(scale);
    make_codes(s > 0.0f ? 1.0f / s : 0.0f);
  }
  at.store_low(finite ? low : 0, active);
  if (!active) return;
  if constexpr (Grid::bits == 3) *at.high = static_cast<uint8_t>(finite ? high : 0);
  if (threadIdx.x % G == 0) *at.scale = finite ? scale : Scale::nan;
}

// ---- kivi2

// Eight 2-bit codes.
template <typename Code>
__device__ __forceinline__ uint16_t pack_kivi2(Code code) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(code(i)) << (2 * i);
  return static_cast<uint16_t>(word);
}

template <int L>
__device__ __forceinline__ uint16_t* kivi2_codes(uint8_t* side, int64_t token) {
  return reinterpret_cast<uint16_t*>(side) + token * L + threadIdx.x % L;
}

template <int L>
__device__ __forceinline__ void encode_kivi2_values(const float (&x)[8], bool active, uint8_t* side, int64_t token,
                                                    int64_t page_size) {
  constexpr int D = kPerLane * L, G = kivi2::v_group / kPerLane;
  float lo = x[0], hi = x[0];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    finite &= fabsf(x[i]) <= 3.4028235e38f;
    lo = fminf(lo, x[i]);
    hi = fmaxf(hi, x[i]);
  }
  lo = fold_lanes(lo, G, [](float a, float b) { return fminf(a, b); });
  hi = fold_lanes(hi, G, [](float a, float b) { return fmaxf(a, b); });
  const kivi2::Affine a = kivi2::affine(lo, hi, !any_lane<G>(!finite));
  if (!active) return;
  *kivi2_codes<L>(side, token) = pack_kivi2([&](int i) { return kivi2::code(x[i], a); });
  const int lane = threadIdx.x % L;
  if (lane % G == 0) {
    const int64_t group = token * (L / G) + lane / G;
    reinterpret_cast<uint16_t*>(side + kivi2::scale_offset(page_size, D))[group] = a.scale;
    reinterpret_cast<uint16_t*>(side + kivi2::zero_offset(Side::V, page_size, D))[group] = a.zero;
  }
}

template <int L>
__device__ __forceinline__ void decode_kivi2(Side kind, uint8_t* side, int64_t token, int64_t page_size,
                                             float (&x)[8]) {
  constexpr int D = kPerLane * L, G = kivi2::v_group / kPerLane;
  const int lane = threadIdx.x % L;
  const uint8_t* scales = side + kivi2::scale_offset(page_size, D);
  const uint8_t* zeros = side + kivi2::zero_offset(kind, page_size, D);
  float scale[8], zero[8];
  if (kind == Side::K) {
    load8<DType::f16>(scales + lane * 16, true, scale);
    load8<DType::f16>(zeros + lane * 16, true, zero);
  } else {
    const int64_t group = token * (L / G) + lane / G;
    const float s = f16_to_float(reinterpret_cast<const uint16_t*>(scales)[group]);
    const float z = f16_to_float(reinterpret_cast<const uint16_t*>(zeros)[group]);
#pragma unroll
    for (int i = 0; i < 8; ++i) scale[i] = s, zero[i] = z;
  }
  const uint32_t codes = *kivi2_codes<L>(side, token);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = zero[i] + __fmul_rn(scale[i], static_cast<float>(codes >> (2 * i) & 3u));
}

// ---- any format. A warp calls these together; lanes of rows that are not `active` touch no page.

// This lane's channels of mu and t.
struct LaneTransform {
  const float *centre, *balance;
  bool vector;
  __device__ LaneTransform(const PoolSide& s, int64_t head, int lane)
      : centre(s.transform.centre), balance(s.transform.balance), vector(s.transform_vector) {
    const int64_t i = head * s.head_dim + lane * kPerLane;
    if (centre) centre += i;
    if (balance) balance += i;
  }
};

// H / sqrt(n) within each part of n channels.
template <int L>
__device__ __forceinline__ void rotate_parts(int parts, float (&x)[8]) {
  hadamard(x, kPerLane * L / 2);
  if (parts == 1) hadamard_stage(x, L / 2);
  const float scale = parts == 1 ? fwht_scale(kPerLane * L) : fwht_scale(kPerLane * L / 2);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], scale);
}

// Between the user's order of the channels and the order they are stored in, through shared memory: `scatter` is the way
// back. By a warp, of a block of kCodecThreads.
template <int L>
__device__ __forceinline__ void reorder(const PoolSide& s, int64_t head, bool scatter, float (&x)[8]) {
  KK_SHARED(float, rows, [kCodecThreads / L][kPerLane * L]);
  float* row = rows[threadIdx.x / L];
  const int c = threadIdx.x % L * kPerLane;
  const int32_t* order = s.transform.order + head * s.head_dim + c;
  int32_t at[8];
  if (s.transform_vector) {
    const int4 a = *reinterpret_cast<const int4*>(order), b = *reinterpret_cast<const int4*>(order + 4);
    at[0] = a.x, at[1] = a.y, at[2] = a.z, at[3] = a.w, at[4] = b.x, at[5] = b.y, at[6] = b.z, at[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = order[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) row[scatter ? at[i] : c + i] = x[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = row[scatter ? c + i : at[i]];
}

// k' = H (diag(t) (k - mu))[order]
template <int L>
__device__ __forceinline__ void rotate(const PoolSide& s, int64_t head, float (&x)[8]) {
  const LaneTransform t(s, head, threadIdx.x % L);
  float a[8];
  if (t.centre) {
    load8<DType::f32>(t.centre, t.vector, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] - a[i];
  }
  if (t.balance) {
    load8<DType::f32>(t.balance, t.vector, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], a[i]);
  }
  if (s.transform.order) reorder<L>(s, head, false, x);
  rotate_parts<L>(s.parts, x);
}

// k = (H k')[order back] / t + mu
template <int L>
__device__ __forceinline__ void unrotate(const PoolSide& s, int64_t head, float (&x)[8]) {
  const LaneTransform t(s, head, threadIdx.x % L);
  float a[8];
  rotate_parts<L>(s.parts, x);
  if (s.transform.order) reorder<L>(s, head, true, x);
  if (t.balance) {
    load8<DType::f32>(t.balance, t.vector, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] / a[i];
  }
  if (t.centre) {
    load8<DType::f32>(t.centre, t.vector, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] + a[i];
  }
}

// f(fmt) as with_format does it on the host.
template <typename F>
__device__ __forceinline__ void switch_format(Format format, F&& f) {
  switch (format) {
#define KK_FORMAT(name, number) \
  case Format::name:            \
    return f(name{});
#include "kvkernels/formats.def"
#undef KK_FORMAT
  }
}

// f(codes, lanes, own, data) for each part of a rotated format: its TokenCodes, its lanes of the L of a row, whether this lane is
// one of them, and its bytes.
template <typename Fmt, int L, typename F>
__device__ __forceinline__ void each_part(uint8_t* side, int64_t page_size, F&& f) {
  constexpr int lanes = L / Fmt::parts;
  f(typename Fmt::template Part<0>{}, Int<lanes>{}, threadIdx.x % L < lanes, side);
  if constexpr (Fmt::parts == 2)
    f(typename Fmt::template Part<1>{}, Int<lanes>{}, threadIdx.x % L >= lanes,
      side + Fmt::part_offset(1, page_size, kPerLane * L));
}

template <typename Fmt>
inline constexpr DType kPlainType = DType::bf16;
template <>
inline constexpr DType kPlainType<f16> = DType::f16;

// x, in the user's basis, becomes a token of the page; x is overwritten. Not for kivi2 keys.
template <int L>
__device__ __forceinline__ void encode(const PoolSide& s, float (&x)[8], bool active, int64_t page, int64_t head,
                                       int64_t token) {
  uint8_t* side = s.page(page, head);
  const int lane = threadIdx.x % L;
  if (s.rotated) rotate<L>(s, head, x);
  switch_format(s.format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    if constexpr (Fmt::rotated) {
      each_part<Fmt, L>(side, s.page_size, [&](auto codes, auto lanes, bool own, uint8_t* part) {
        const TokenPlace<decltype(codes), lanes.value> at(part, token, s.page_size);
        pack(x, s.side == Side::V, active && own, at);
      });
    } else if constexpr (Fmt::packed) {
      encode_kivi2_values<L>(x, active, side, token, s.page_size);
    } else if (active && lane * kPerLane < s.head_dim) {
      store8<kPlainType<Fmt>>(x, true, side + token * s.token_stride + lane * 16);
    }
  });
}

// A token as the page stores it, rotated or not. Rows that are not active are zero.
template <typename Fmt, int L>
__device__ __forceinline__ void load_stored(const PoolSide& s, bool active, int64_t page, int64_t head, int64_t token,
                                            float (&x)[8]) {
  uint8_t* side = s.page(page, head);
  const int lane = threadIdx.x % L;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  if (!active || lane * kPerLane >= s.head_dim) return;
  if constexpr (Fmt::rotated)
    each_part<Fmt, L>(side, s.page_size, [&](auto codes, auto lanes, bool own, uint8_t* part) {
      if (own) unpack(TokenPlace<decltype(codes), lanes.value>(part, token, s.page_size), x);
    });
  else if constexpr (Fmt::packed)
    decode_kivi2<L>(s.side, side, token, s.page_size, x);
  else
    load8<kPlainType<Fmt>>(side + token * s.token_stride + lane * 16, true, x);
}

// The way back.
template <int L>
__device__ __forceinline__ void decode(const PoolSide& s, bool active, int64_t page, int64_t head, int64_t token,
                                       float (&x)[8]) {
  switch_format(s.format, [&](auto fmt) { load_stored<decltype(fmt), L>(s, active, page, head, token, x); });
  if (s.rotated) unrotate<L>(s, head, x);
}

}  // namespace kk::cuda
