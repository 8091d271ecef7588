// K and V of one token and KV head between registers and page bytes: what the formats' headers say in scalar code, done
// by the L lanes of a row (cuda/rows.cuh). Same bytes. Products are __fmul_rn where a sum follows, so none is fused.
#pragma once
#include "cuda/rows.cuh"
#include "kvkernels/format.h"

namespace kk::cuda {

// One side of a pool.
struct PoolSide {
  uint8_t* data;
  int64_t page_stride, head_stride, token_stride;  // bytes; token_stride: 16-bit sides
  int64_t page_size;
  int head_dim;
  Side side;
  Format format;
  bool rotated;
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
  with_format(s.format, [&](auto fmt) { s.rotated = decltype(fmt)::rotated; });
  if (keys && s.rotated) s.transform = t;
  s.transform_vector = aligned16(s.transform.centre) && aligned16(s.transform.balance);  // head_dim * 4 bytes are
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

// ---- u8 u4 u3 u2

template <int Bits>
struct CodeWord;  // 8 codes
template <>
struct CodeWord<2> {
  using type = uint16_t;
};
template <>
struct CodeWord<4> {
  using type = uint32_t;
};
template <>
struct CodeWord<8> {
  using type = uint64_t;
};

// Where the codes and the scale of this lane's channels are.
template <typename Fmt, int L>
struct TokenPlace {
  static constexpr int D = kPerLane * L, group_lanes = L < 16 ? L : 16;
  using Word = typename CodeWord<Fmt::low_bits>::type;
  Word* low;
  uint8_t* high;  // u3
  uint16_t* scale;

  __device__ TokenPlace(uint8_t* side, int64_t token, int64_t page_size) {
    const int lane = threadIdx.x % L;
    low = reinterpret_cast<Word*>(side + token * (D * Fmt::low_bits / 8)) + lane;
    high = side + Fmt::plane1_offset(page_size, D) + token * (D / 8) + lane;
    scale = reinterpret_cast<uint16_t*>(side + Fmt::scales_offset(page_size, D)) + token * Fmt::groups(D) +
            lane / group_lanes;
  }
};

template <typename Fmt, int L>
__device__ __forceinline__ void unpack(const TokenPlace<Fmt, L>& at, float (&x)[8]) {
  using Grid = typename Fmt::Grid;
  const uint64_t low = *at.low;
  const float s = f16_to_float(*at.scale);
  uint32_t high = 0;
  if constexpr (Fmt::bits == 3) high = *at.high;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t code = static_cast<uint32_t>(low >> (Fmt::low_bits * i)) & ((1u << Fmt::low_bits) - 1u);
    if constexpr (Fmt::bits == 3) code |= (high >> i & 1u) << 2;
    x[i] = __fmul_rn(s, static_cast<float>(code) - Grid::offset);
  }
}

// MidRise::encode of core/midrise.h. x is in the stored basis; nothing is written for rows that are not `active`.
template <typename Fmt, int L>
__device__ __forceinline__ void pack(const float (&x)[8], bool active, const TokenPlace<Fmt, L>& at) {
  using Grid = typename Fmt::Grid;
  constexpr int G = TokenPlace<Fmt, L>::group_lanes, n = kPerLane * G;
  float t[8];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) finite &= fabsf(x[i]) <= 3.4028235e38f;
  finite = !any_lane<G>(!finite);

  float base;
  if constexpr (Grid::from_rms) {
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i] = __fmul_rn(x[i], x[i]);
    base = sqrtf(fold_sum<G>(t) * (1.0f / n));
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
    const float c = Grid::clamp_code(floorf(x[i] * inv0)) + 0.5f;
    t[i] = __fmul_rn(x[i], c);
    den += c * c;  // exact, fused or not
  }
  den = fold_lanes(den, G, [](float a, float b) { return a + b; });
  const uint16_t scale = float_to_f16(fminf(fold_sum<G>(t) / den, kMaxScale));
  const float s = f16_to_float(scale), inv = s > 0.0f ? 1.0f / s : 0.0f;

  uint64_t low = 0;
  uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = static_cast<int>(Grid::clamp_code(floorf(x[i] * inv))) + Grid::half_levels;
    low |= static_cast<uint64_t>(code & ((1u << Fmt::low_bits) - 1u)) << (Fmt::low_bits * i);
    high |= (code >> 2 & 1u) << i;
  }
  if (!active) return;
  *at.low = static_cast<typename TokenPlace<Fmt, L>::Word>(finite ? low : 0);
  if constexpr (Fmt::bits == 3) *at.high = static_cast<uint8_t>(finite ? high : 0);
  if (threadIdx.x % G == 0) *at.scale = finite ? scale : 0x7e00;
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

// k' = H diag(t) (k - mu)
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
  hadamard(x, kPerLane * L);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], fwht_scale(kPerLane * L));
}

// k = (H k') / t + mu
template <int L>
__device__ __forceinline__ void unrotate(const PoolSide& s, int64_t head, float (&x)[8]) {
  const LaneTransform t(s, head, threadIdx.x % L);
  float a[8];
  hadamard(x, kPerLane * L);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], fwht_scale(kPerLane * L));
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
      pack(x, active, TokenPlace<Fmt, L>(side, token, s.page_size));
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
    unpack(TokenPlace<Fmt, L>(side, token, s.page_size), x);
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
