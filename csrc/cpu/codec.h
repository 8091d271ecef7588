// Rows of K and V on their way between tensors, registers and page bytes. What the formats' headers say in scalar code, done
// with F: same bytes on every ISA (tests/cpp/test_codec.cpp compares them).
#pragma once
#include "cpu/simd.h"
#include "kvkernels/format.h"
#include "kvkernels/pool.h"

KK_BEGIN

// g(0) .. g(N - 1). With constant indices an array of vectors stays in registers; base has too few of them to gain by it.
template <int N, typename G>
inline void each(G&& g) {
#if defined(__AVX2__)
  if constexpr (N > 0) {
    each<N - 1>(g);
    g(Int<N - 1>{});
  }
#else
  for (int i = 0; i < N; ++i) g(i);
#endif
}

// ---- lanes

// a, b = 2W neighbours -> the even ones, the odd ones.
inline void deinterleave(F& a, F& b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const F lo = _mm512_permutex2var_ps(a.v, even, b.v);
  b = _mm512_permutex2var_ps(a.v, _mm512_or_si512(even, _mm512_set1_epi32(1)), b.v);
  a = lo;
#elif defined(__AVX2__)
  const __m256d lo = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  const __m256d hi = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
  a = _mm256_castpd_ps(_mm256_permute4x64_pd(lo, 0xd8));
  b = _mm256_castpd_ps(_mm256_permute4x64_pd(hi, 0xd8));
#else
  const F x = a, y = b;
  a = F::Vec{x.v[0], x.v[2], y.v[0], y.v[2]};
  b = F::Vec{x.v[1], x.v[3], y.v[1], y.v[3]};
#endif
}

// Trade bit `p` of the lane number for the bit that tells a from b: lanes with the bit clear end up in a, the others in b.
template <int p>
inline void exchange(F& a, F& b) {
  const F x = a, y = b;
#if defined(__AVX512F__)
  if constexpr (p == 0) {
    a = _mm512_mask_moveldup_ps(x.v, 0xaaaa, y.v);
    b = _mm512_mask_movehdup_ps(y.v, 0x5555, x.v);
  }
  if constexpr (p == 1) {
    a = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x.v), _mm512_castps_pd(y.v)));
    b = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x.v), _mm512_castps_pd(y.v)));
  }
  if constexpr (p == 2) {
    a = _mm512_mask_shuffle_f32x4(x.v, 0xf0f0, y.v, y.v, 0xa0);
    b = _mm512_mask_shuffle_f32x4(y.v, 0x0f0f, x.v, x.v, 0xf5);
  }
  if constexpr (p == 3) {
    a = _mm512_shuffle_f32x4(x.v, y.v, 0x44);
    b = _mm512_shuffle_f32x4(x.v, y.v, 0xee);
  }
#elif defined(__AVX2__)
  if constexpr (p == 0) {
    a = _mm256_blend_ps(x.v, _mm256_moveldup_ps(y.v), 0xaa);
    b = _mm256_blend_ps(_mm256_movehdup_ps(x.v), y.v, 0xaa);
  }
  if constexpr (p == 1) {
    a = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x.v), _mm256_castps_pd(y.v)));
    b = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x.v), _mm256_castps_pd(y.v)));
  }
  if constexpr (p == 2) {
    a = _mm256_permute2f128_ps(x.v, y.v, 0x20);
    b = _mm256_permute2f128_ps(x.v, y.v, 0x31);
  }
#else
  if constexpr (p == 0) {
    a = F::Vec{x.v[0], y.v[0], x.v[2], y.v[2]};
    b = F::Vec{x.v[1], y.v[1], x.v[3], y.v[3]};
  }
  if constexpr (p == 1) {
    a = F::Vec{x.v[0], x.v[1], y.v[0], y.v[1]};
    b = F::Vec{x.v[2], x.v[3], y.v[2], y.v[3]};
  }
#endif
}

// ---- tensors

template <DType T>
inline constexpr int64_t kElementBytes = T == DType::f32 ? 4 : 2;

template <DType T>
inline F load(const uint8_t* p) {
  if constexpr (T == DType::f16) return F::load_f16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (T == DType::bf16) return F::load_bf16(reinterpret_cast<const uint16_t*>(p));
  return F::load(reinterpret_cast<const float*>(p));
}
template <DType T>
inline void store(F x, uint8_t* p) {
  if constexpr (T == DType::f16) return x.store_f16(reinterpret_cast<uint16_t*>(p));
  if constexpr (T == DType::bf16) return x.store_bf16(reinterpret_cast<uint16_t*>(p));
  x.store(reinterpret_cast<float*>(p));
}

// Even and odd elements of the 2W at p. The two halves of a 32-bit word are free to tell apart in bf16.
template <DType T>
inline void load_split(const uint8_t* p, F& even, F& odd) {
#if defined(__AVX512F__)
  if constexpr (T == DType::bf16) {
    const __m512i w = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (T == DType::bf16) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    return;
  }
#endif
  even = load<T>(p);
  odd = load<T>(p + F::W * kElementBytes<T>);
  deinterleave(even, odd);
}

// ---- Walsh-Hadamard

inline void add_sub(F& a, F& b) {
  const F sum = a + b;
  b = a - b;
  a = sum;
}

template <int p, int Lanes>
inline void fwht_lanes(F& a, F& b) {
  if constexpr (p < Lanes) {
    exchange<p>(a, b);
    add_sub(a, b);
    fwht_lanes<p + 1, Lanes>(a, b);
  }
}

template <int N, int h>
inline void fwht_registers(F* v) {
  if constexpr (h < N) {
    each<N / 2>([&](auto i) {
      const int j = static_cast<int>(i) / h * 2 * h + static_cast<int>(i) % h;
      add_sub(v[j], v[j + h]);
    });
    fwht_registers<N, 2 * h>(v);
  }
}

// H x for N vectors, pairs of them split into even and odd elements (load_split); the result is in natural order. Stage 1 is
// a sum across the pair, each exchange brings the next stride there, and after log2 W of them the lanes are in order again:
// 2 instructions per stage and vector. Stages run from stride 1 upwards, as core/fwht.h has it.
template <int N>
inline void fwht_split(F* v) {
  constexpr int lane_bits = F::W == 16 ? 4 : F::W == 8 ? 3 : 2;
  each<N / 2>([&](auto i) {
    add_sub(v[2 * i], v[2 * i + 1]);
    fwht_lanes<0, lane_bits>(v[2 * i], v[2 * i + 1]);
  });
  fwht_registers<N, 2>(v);
}

// Sum of N vectors in the order of core/fwht.h fold_sum; overwrites v.
template <int N>
inline float fold_sum(F* v) {
  if constexpr (N == 1) {
    return v[0].fold_sum();
  } else {
    each<N / 2>([&](auto i) { v[i] = v[i] + v[i + N / 2]; });
    return fold_sum<N / 2>(v);
  }
}

// ---- codes <-> bytes, 4 W codes at a time

#if defined(__AVX512F__)
using Bytes = __m512i;
#elif defined(__AVX2__)
using Bytes = __m256i;
#endif

// c[4] in [-2^(B-1), 2^(B-1) - 1/2] -> floor(c) + 2^(B-1), packed into 4 W low_bits / 8 bytes of `low` and (B == 3) 4 W / 8 of `high`.
template <int B>
inline void pack_codes(const F* c, uint8_t* low, uint8_t* high) {
  constexpr int half_levels = 1 << (B - 1);
#if defined(__AVX512F__)
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512i ab = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[0].v, down), _mm512_cvt_roundps_epi32(c[1].v, down));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[2].v, down), _mm512_cvt_roundps_epi32(c[3].v, down));
  // The packs work inside 128-bit lanes: 32-bit word 4 l + j holds codes 4 l .. 4 l + 3 of c[j].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Bytes code =
      _mm512_add_epi8(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd)), _mm512_set1_epi8(half_levels));
  if constexpr (B == 8) _mm512_storeu_si512(low, code);
  if constexpr (B == 4) {
    const __m512i pairs = _mm512_maddubs_epi16(code, _mm512_set1_epi16(0x1001));  // c0 + 16 c1
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi16_epi8(pairs));
  }
  if constexpr (B <= 3) {
    const Bytes two = B == 3 ? _mm512_and_si512(code, _mm512_set1_epi8(3)) : code;
    const __m512i pairs = _mm512_maddubs_epi16(two, _mm512_set1_epi16(0x0401));     // c0 + 4 c1
    const __m512i quads = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));  // + 16 (c2 + 4 c3)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(quads));
  }
  if constexpr (B == 3) {
    const uint64_t bits = _mm512_test_epi8_mask(code, _mm512_set1_epi8(4));
    memcpy(high, &bits, 8);
  }
#elif defined(__AVX2__)
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(floor(c[0]).v), _mm256_cvtps_epi32(floor(c[1]).v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(floor(c[2]).v), _mm256_cvtps_epi32(floor(c[3]).v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i words = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  const Bytes code = _mm256_add_epi8(words, _mm256_set1_epi8(static_cast<char>(half_levels)));
  if constexpr (B == 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), code);
  if constexpr (B == 4) {
    const __m256i pairs = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x1001));  // c0 + 16 c1
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(bytes));
  }
  if constexpr (B <= 3) {
    const Bytes two = B == 3 ? _mm256_and_si256(code, _mm256_set1_epi8(3)) : code;
    const __m256i pairs = _mm256_maddubs_epi16(two, _mm256_set1_epi16(0x0401));     // c0 + 4 c1
    const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));  // + 16 (c2 + 4 c3)
    const __m256i bytes = _mm256_shuffle_epi8(quads, _mm256_set1_epi32(0x0c080400));
    const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(low), eight);
  }
  if constexpr (B == 3) {
    const int bits = _mm256_movemask_epi8(_mm256_slli_epi16(code, 5));  // bit 2 of each byte becomes its sign
    memcpy(high, &bits, 4);
  }
#else
  uint8_t code[4 * F::W];
  for (int i = 0; i < 4 * F::W; ++i)
    code[i] = static_cast<uint8_t>(static_cast<int>(::floorf(c[i / F::W].v[i % F::W])) + half_levels);
  pack_bits<B == 3 ? 2 : B>(code, 4 * F::W, 0, low);
  if constexpr (B == 3) pack_bits<1>(code, 4 * F::W, 2, high);
#endif
}

// The way back: c[4] = 4 W codes, whole numbers in [0, 2^B).
template <int B>
inline void unpack_codes(const uint8_t* low, const uint8_t* high, F* c) {
  alignas(64) uint8_t code[4 * F::W] = {};
#if defined(__AVX512F__)
  Bytes all;
  if constexpr (B == 8) all = _mm512_loadu_si512(low);
  if constexpr (B == 4) {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    all = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
  }
  if constexpr (
      B <= 3) {  // a byte dcba becomes the four bytes a, b, c, d: shifts by 0, 6, 12, 18 bits, then the low two of each
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i ab = _mm512_or_si512(w, _mm512_slli_epi32(w, 6));
    all = _mm512_and_si512(_mm512_or_si512(ab, _mm512_slli_epi32(ab, 12)), _mm512_set1_epi8(3));
  }
  if constexpr (B == 3) {
    uint64_t bits;
    memcpy(&bits, high, 8);
    all = _mm512_or_si512(all, _mm512_maskz_set1_epi8(bits, 4));
  }
  _mm512_store_si512(code, all);
#elif defined(__AVX2__)
  Bytes all;
  if constexpr (B == 8) all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  if constexpr (B == 4) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    all = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), _mm256_set1_epi8(15));
  }
  if constexpr (B <= 3) {
    const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
    const __m256i ab = _mm256_or_si256(w, _mm256_slli_epi32(w, 6));
    all = _mm256_and_si256(_mm256_or_si256(ab, _mm256_slli_epi32(ab, 12)), _mm256_set1_epi8(3));
  }
  if constexpr (B == 3) {
    int bits;
    memcpy(&bits, high, 4);
    const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                             2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const __m256i hit = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    all = _mm256_or_si256(all, _mm256_and_si256(_mm256_cmpeq_epi8(hit, bit_of), _mm256_set1_epi8(4)));
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(code), all);
#else
  unpack_bits<B == 3 ? 2 : B>(low, 4 * F::W, 0, code);
  if constexpr (B == 3) unpack_bits<1>(high, 4 * F::W, 2, code);
#endif
  each<4>([&](auto i) { c[i] = F::load_u8(code + i * F::W); });
}

// ---- one row of a side

// Rows of one token: what stays the same from token to token. Strides in bytes.
struct Rows {
  int64_t heads, head_dim;
  int64_t row_stride;    // from head to head in the tensor
  int64_t side_stride;   // from head to head in the pool
  int64_t token_stride;  // from token to token within a 16-bit side
  int64_t page_size;
  KeyTransform transform;  // of the first head; null where it does not apply
};

inline uint16_t half_bits(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  return float_to_f16(x);
#endif
}
inline float half_value(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return f16_to_float(h);
#endif
}
inline uint16_t load_u16(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return h;
}
inline void store_u16(uint16_t h, uint8_t* p) { memcpy(p, &h, 2); }

constexpr float kFloatMax = 3.4028235e38f;

// MidRise<B>::encode of N vectors. c receives what pack_codes<B> wants.
template <int B, int N>
inline uint16_t encode_group(const F* x, F* c) {
  using Grid = MidRise<B>;
  constexpr int n = N * F::W;
  const F low = F::fill(-Grid::half_levels), high = F::fill(Grid::half_levels - 1.0f), half = F::fill(0.5f);
  F t[N];
  each<N>([&](auto i) { t[i] = x[i] * x[i]; });
  const float sum = fold_sum<N>(t);
  if (__builtin_expect(!(sum <= kFloatMax), 0)) {  // NaN, Inf, or past 1e19: the definition has the last word
    float row[n];
    uint8_t code[n];
    for (int i = 0; i < N; ++i) x[i].store(row + i * F::W);
    const uint16_t scale = Grid::encode(row, n, code);
    for (int i = 0; i < N; ++i) c[i] = F::load_u8(code + i * F::W) - F::fill(Grid::half_levels);
    return scale;
  }
  float base;
  if constexpr (Grid::from_rms) {
    base = ::sqrtf(sum * (1.0f / n));
  } else {
    F top = F::zero();
    each<N>([&](auto i) { top = max(top, abs(x[i])); });
    base = top.fold_max();
  }
  float start = base * Grid::start;
  start = start > kTinyScale ? start : kTinyScale;
  start = start < kMaxScale ? start : kMaxScale;
  // clamp(floor(x)) == floor(clamp(x)) for whole bounds
  const F inv0 = F::fill(1.0f / start);
  F den = F::zero();
  each<N>([&](auto i) {
    const F level = floor(min(max(x[i] * inv0, low), high)) + half;
    t[i] = x[i] * level;
    den = fma(level, level, den);  // exact, so fusing changes nothing
  });
  float s = fold_sum<N>(t) / den.fold_sum();
  s = s < kMaxScale ? s : kMaxScale;
  const uint16_t scale = half_bits(s);
  s = half_value(scale);
  const F inv = F::fill(s > 0.0f ? 1.0f / s : 0.0f);
  each<N>([&](auto i) { c[i] = min(max(x[i] * inv, low), high); });
  return scale;
}

// H diag(t) (x - mu), scaled, N vectors in natural order.
template <DType T, int N>
inline void load_rotated(const uint8_t* x, const float* centre, const float* balance, F* v) {
  constexpr int64_t step = 2 * F::W;
  each<N / 2>([&](auto i) { load_split<T>(x + i * step * kElementBytes<T>, v[2 * i], v[2 * i + 1]); });
  if (centre)
    each<N / 2>([&](auto i) {
      F even = F::load(centre + i * step), odd = F::load(centre + i * step + F::W);
      deinterleave(even, odd);
      v[2 * i] = v[2 * i] - even;
      v[2 * i + 1] = v[2 * i + 1] - odd;
    });
  if (balance)
    each<N / 2>([&](auto i) {
      F even = F::load(balance + i * step), odd = F::load(balance + i * step + F::W);
      deinterleave(even, odd);
      v[2 * i] = v[2 * i] * even;
      v[2 * i + 1] = v[2 * i + 1] * odd;
    });
  fwht_split<N>(v);
  const F scale = F::fill(fwht_scale(N * F::W));
  each<N>([&](auto i) { v[i] = v[i] * scale; });
}

// The way back. v in natural order, overwritten.
template <DType T, int N>
inline void store_unrotated(F* v, const float* centre, const float* balance, uint8_t* x) {
  each<N / 2>([&](auto i) { deinterleave(v[2 * i], v[2 * i + 1]); });
  fwht_split<N>(v);
  const F scale = F::fill(fwht_scale(N * F::W));
  each<N>([&](auto i) { v[i] = v[i] * scale; });
  if (balance) each<N>([&](auto i) { v[i] = v[i] / F::load(balance + i * F::W); });
  if (centre) each<N>([&](auto i) { v[i] = v[i] + F::load(centre + i * F::W); });
  each<N>([&](auto i) { store<T>(v[i], x + i * F::W * kElementBytes<T>); });
}

// Encodes the rows of all heads of one token; x and side point at the first head.
using EncodeRows = void (*)(const uint8_t* x, uint8_t* side, int64_t token, const Rows& r);
// Decodes them: in the user's basis, rotation and key transform undone.
using DecodeRows = void (*)(const uint8_t* side, int64_t token, uint8_t* x, const Rows& r);

template <typename Fmt, DType T, int D>
struct TokenRows {  // u8 u4 u3 u2
  static constexpr int B = Fmt::bits, N = D / F::W, group = D < kScaleGroup ? D : static_cast<int>(kScaleGroup);
  static constexpr int groups = D / group, per_group = group / F::W;
  static constexpr int64_t low_bytes = D * Fmt::low_bits / 8;

  static void encode(const uint8_t* x, uint8_t* side, int64_t token, const Rows& r) {
    const float *centre = r.transform.centre, *balance = r.transform.balance;
    uint8_t* low = side + token * low_bytes;
    uint8_t* high = side + Fmt::plane1_offset(r.page_size, D) + token * (D / 8);
    uint8_t* scales = side + Fmt::scales_offset(r.page_size, D) + token * groups * 2;
    for (int64_t h = 0; h < r.heads; ++h) {
      F v[N], c[N];
      load_rotated<T, N>(x, centre, balance, v);
      each<groups>(
          [&](auto g) { store_u16(encode_group<B, per_group>(v + g * per_group, c + g * per_group), scales + g * 2); });
      each<N / 4>(
          [&](auto i) { pack_codes<B>(c + i * 4, low + i * (F::W / 2) * Fmt::low_bits, high + i * (F::W / 2)); });
      x += r.row_stride;
      low += r.side_stride, high += r.side_stride, scales += r.side_stride;
      if (centre) centre += D;
      if (balance) balance += D;
    }
  }

  static void decode(const uint8_t* side, int64_t token, uint8_t* x, const Rows& r) {
    const float *centre = r.transform.centre, *balance = r.transform.balance;
    const uint8_t* low = side + token * low_bytes;
    const uint8_t* high = side + Fmt::plane1_offset(r.page_size, D) + token * (D / 8);
    const uint8_t* scales = side + Fmt::scales_offset(r.page_size, D) + token * groups * 2;
    for (int64_t h = 0; h < r.heads; ++h) {
      F v[N];
      each<N / 4>(
          [&](auto i) { unpack_codes<B>(low + i * (F::W / 2) * Fmt::low_bits, high + i * (F::W / 2), v + i * 4); });
      each<groups>([&](auto g) {
        const F s = F::fill(half_value(load_u16(scales + g * 2))), offset = F::fill(MidRise<B>::offset);
        each<per_group>([&](auto i) { v[g * per_group + i] = s * (v[g * per_group + i] - offset); });
      });
      store_unrotated<T, N>(v, centre, balance, x);
      x += r.row_stride;
      low += r.side_stride, high += r.side_stride, scales += r.side_stride;
      if (centre) centre += D;
      if (balance) balance += D;
    }
  }
};

template <DType To, DType T>
struct PlainRows {  // bf16 f16; head_dim a multiple of 16
  static void encode(const uint8_t* x, uint8_t* side, int64_t token, const Rows& r) {
    side += token * r.token_stride;
    for (int64_t h = 0; h < r.heads; ++h, x += r.row_stride, side += r.side_stride)
      for (int64_t i = 0; i < r.head_dim; i += F::W) store<To>(load<T>(x + i * kElementBytes<T>), side + i * 2);
  }
  static void decode(const uint8_t* side, int64_t token, uint8_t* x, const Rows& r) {
    side += token * r.token_stride;
    for (int64_t h = 0; h < r.heads; ++h, x += r.row_stride, side += r.side_stride)
      for (int64_t i = 0; i < r.head_dim; i += F::W) store<T>(load<To>(side + i * 2), x + i * kElementBytes<T>);
  }
};

template <typename Fmt>
inline constexpr DType kPlainType = DType::bf16;
template <>
inline constexpr DType kPlainType<f16> = DType::f16;

// What pack_codes<2> wants for kivi2::code.
inline F kivi2_code(F x, F zero, F inv) {
  return min(max(rint((x - zero) * inv), F::zero()), F::fill(3.0f)) - F::fill(2.0f);  // max drops NaN
}
inline float kivi2_inv(uint16_t scale) {
  const float s = half_value(scale);
  return s > 0.0f ? 1.0f / s : 0.0f;
}

template <DType T, int D>
struct Kivi2Values {
  static constexpr int N = D / F::W, per_group = static_cast<int>(kivi2::v_group) / F::W, groups = N / per_group;

  static void encode(const uint8_t* x, uint8_t* side, int64_t token, const Rows& r) {
    uint8_t* codes = side + token * (D / 4);
    uint8_t* scales = side + kivi2::scale_offset(r.page_size, D) + token * groups * 2;
    uint8_t* zeros = side + kivi2::zero_offset(Side::V, r.page_size, D) + token * groups * 2;
    for (int64_t h = 0; h < r.heads; ++h) {
      F c[N];
      for (int g = 0; g < groups; ++g) {
        F v[per_group], lo = F::fill(INFINITY), hi = F::fill(-INFINITY), odd = F::zero();
        each<per_group>([&](auto i) {
          v[i] = load<T>(x + (g * per_group + i) * F::W * kElementBytes<T>);
          lo = min(lo, v[i]);
          hi = max(hi, v[i]);
          odd = odd + v[i] * F::zero();  // NaN where v is not finite
        });
        const kivi2::Affine a = kivi2::affine(-(F::zero() - lo).fold_max(), hi.fold_max(), all_finite(odd));
        store_u16(a.scale, scales + g * 2);
        store_u16(a.zero, zeros + g * 2);
        const F zero = F::fill(half_value(a.zero)), inv = F::fill(kivi2_inv(a.scale));
        each<per_group>([&](auto i) { c[g * per_group + i] = kivi2_code(v[i], zero, inv); });
      }
      each<N / 4>([&](auto i) { pack_codes<2>(c + i * 4, codes + i * F::W, nullptr); });
      x += r.row_stride;
      codes += r.side_stride, scales += r.side_stride, zeros += r.side_stride;
    }
  }

  static void decode(const uint8_t* side, int64_t token, uint8_t* x, const Rows& r) {
    const uint8_t* codes = side + token * (D / 4);
    const uint8_t* scales = side + kivi2::scale_offset(r.page_size, D) + token * groups * 2;
    const uint8_t* zeros = side + kivi2::zero_offset(Side::V, r.page_size, D) + token * groups * 2;
    for (int64_t h = 0; h < r.heads; ++h) {
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(codes + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = F::fill(half_value(load_u16(scales + i / per_group * 2)));
        const F zero = F::fill(half_value(load_u16(zeros + i / per_group * 2)));
        store<T>(zero + s * c[i], x + i * F::W * kElementBytes<T>);
      }
      x += r.row_stride;
      codes += r.side_stride, scales += r.side_stride, zeros += r.side_stride;
    }
  }
};

template <DType T, int D>
struct Kivi2Keys {
  static constexpr int N = D / F::W;

  // A channel's tokens are coded at once: `row(token, float x[D])` is asked for every row of the page, twice.
  template <typename Row>
  static void encode_page(Row&& row, uint8_t* side, int64_t page_size) {
    float x[D], lo[D], hi[D], odd[D];
    for (int i = 0; i < D; ++i) lo[i] = INFINITY, hi[i] = -INFINITY, odd[i] = 0.0f;
    for (int64_t token = 0; token < page_size; ++token) {
      row(token, x);
      for (int i = 0; i < D; i += F::W) {
        const F v = F::load(x + i);
        min(F::load(lo + i), v).store(lo + i);
        max(F::load(hi + i), v).store(hi + i);
        (F::load(odd + i) + v * F::zero()).store(odd + i);
      }
    }
    float *zero = lo, *inv = hi;
    for (int i = 0; i < D; ++i) {
      const kivi2::Affine a = kivi2::affine(lo[i], hi[i], odd[i] == 0.0f);
      store_u16(a.scale, side + kivi2::scale_offset(page_size, D) + i * 2);
      store_u16(a.zero, side + kivi2::zero_offset(Side::K, page_size, D) + i * 2);
      zero[i] = half_value(a.zero);
      inv[i] = kivi2_inv(a.scale);
    }
    for (int64_t token = 0; token < page_size; ++token) {
      row(token, x);
      F c[N];
      for (int i = 0; i < N; ++i)
        c[i] = kivi2_code(F::load(x + i * F::W), F::load(zero + i * F::W), F::load(inv + i * F::W));
      for (int i = 0; i < N; i += 4) pack_codes<2>(c + i, side + token * (D / 4) + i / 4 * F::W, nullptr);
    }
  }

  static void decode(const uint8_t* side, int64_t token, uint8_t* x, const Rows& r) {
    const uint8_t* codes = side + token * (D / 4);
    const uint8_t* scales = side + kivi2::scale_offset(r.page_size, D);
    const uint8_t* zeros = side + kivi2::zero_offset(Side::K, r.page_size, D);
    for (int64_t h = 0; h < r.heads; ++h) {
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(codes + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = load<DType::f16>(scales + i * F::W * 2), zero = load<DType::f16>(zeros + i * F::W * 2);
        store<T>(zero + s * c[i], x + i * F::W * kElementBytes<T>);
      }
      x += r.row_stride;
      codes += r.side_stride, scales += r.side_stride, zeros += r.side_stride;
    }
  }
};

// ---- from run-time format, dtype and head_dim to a row function

template <DType T>
struct DTypeTag {
  static constexpr DType value = T;
};
template <typename G>
inline void with_dtype(DType dtype, G&& g) {
  if (dtype == DType::f32) return g(DTypeTag<DType::f32>{});
  if (dtype == DType::f16) return g(DTypeTag<DType::f16>{});
  if (dtype == DType::bf16) return g(DTypeTag<DType::bf16>{});
  fail("dtype must be one of float32, float16, bfloat16");
}

// Only those that are needed are instantiated: `T` is float32 alone in pack_pages.
template <DType T>
inline EncodeRows encode_rows(Format format, Side side, int64_t head_dim) {
  EncodeRows f = nullptr;
  with_format(format, [&](auto tag) {
    using Fmt = decltype(tag);
    if constexpr (!Fmt::packed) {
      one_of<64, 80, 96, 112, 128, 192, 256>("head_dim", head_dim,
                                             [&](auto) { f = PlainRows<kPlainType<Fmt>, T>::encode; });
    } else {
      one_of<64, 128, 256>("head_dim", head_dim, [&](auto D) {
        if constexpr (Fmt::rotated) {
          f = TokenRows<Fmt, T, D.value>::encode;
        } else {
          if (side == Side::K) fail("kivi2 codes the keys of a page at once: use pack_pages");
          f = Kivi2Values<T, D.value>::encode;
        }
      });
    }
  });
  return f;
}

template <DType T>
inline DecodeRows decode_rows(Format format, Side side, int64_t head_dim) {
  DecodeRows f = nullptr;
  with_format(format, [&](auto tag) {
    using Fmt = decltype(tag);
    if constexpr (!Fmt::packed) {
      one_of<64, 80, 96, 112, 128, 192, 256>("head_dim", head_dim,
                                             [&](auto) { f = PlainRows<kPlainType<Fmt>, T>::decode; });
    } else {
      one_of<64, 128, 256>("head_dim", head_dim, [&](auto D) {
        if constexpr (Fmt::rotated) {
          f = TokenRows<Fmt, T, D.value>::decode;
        } else {
          f = side == Side::K ? Kivi2Keys<T, D.value>::decode : Kivi2Values<T, D.value>::decode;
        }
      });
    }
  });
  return f;
}

inline bool rotated(Format format) {
  bool r = false;
  with_format(format, [&](auto tag) { r = decltype(tag)::rotated; });
  return r;
}

// Rows of the K or V side of `pool`; `heads` of them, row_stride bytes apart in the tensor.
inline Rows side_rows(const Pool& pool, Side side, const KeyTransform& t, int64_t heads, int64_t row_stride,
                      int64_t head_dim, int64_t page_size) {
  Rows r{};
  r.heads = heads;
  r.head_dim = head_dim;
  r.row_stride = row_stride;
  r.side_stride = side == Side::K ? pool.k_head : pool.v_head;
  r.token_stride = side == Side::K ? pool.k_token : pool.v_token;
  r.page_size = page_size;
  if (side == Side::K && rotated(pool.k_format)) r.transform = t;
  return r;
}

KK_END
