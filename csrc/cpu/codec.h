// Rows of K and V on their way between tensors, registers and page bytes. What the formats' headers say in scalar code, done
// with F: same bytes on every ISA (tests/cpp/test_codec.cpp compares them).
#pragma once
#include "cpu/simd.h"
#include "kvkernels/format.h"
#include "kvkernels/pool.h"

KK_BEGIN

// The size of a row function is past what the compiler inlines by itself, and its vectors would go through memory.
#define KK_INLINE [[gnu::always_inline]] inline

// g(0) .. g(N - 1). With constant indices an array of vectors stays in registers; base has too few of them to gain by it.
template <int N, typename G>
KK_INLINE void each(G&& g) {
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
KK_INLINE void deinterleave(F& a, F& b) {
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

// Three bits of the element number change places: lane bit p -> a or b -> lane bit p + 1 -> lane bit p. Twice, and what lane
// bit p + 1 held is told by a or b.
template <int p>
KK_INLINE void exchange(F& a, F& b) {
  const F x = a, y = b;
#if defined(__AVX512F__)
  if constexpr (p == 0) {
    a = _mm512_shuffle_ps(x.v, y.v, 0x88);
    b = _mm512_shuffle_ps(x.v, y.v, 0xdd);
  } else {
    a = _mm512_shuffle_f32x4(x.v, y.v, 0x88);
    b = _mm512_shuffle_f32x4(x.v, y.v, 0xdd);
  }
#elif defined(__AVX2__)
  if constexpr (p == 0) {
    a = _mm256_shuffle_ps(x.v, y.v, 0x88);
    b = _mm256_shuffle_ps(x.v, y.v, 0xdd);
  } else {  // one lane bit is left
    a = _mm256_permute2f128_ps(x.v, y.v, 0x20);
    b = _mm256_permute2f128_ps(x.v, y.v, 0x31);
  }
#else
  a = F::Vec{x.v[0], x.v[2], y.v[0], y.v[2]};
  b = F::Vec{x.v[1], x.v[3], y.v[1], y.v[3]};
#endif
}

// ---- tensors

template <DType T>
inline constexpr int64_t kElementBytes = T == DType::f32 ? 4 : 2;

template <DType T>
KK_INLINE F load(const uint8_t* p) {
  if constexpr (T == DType::f16) return F::load_f16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (T == DType::bf16) return F::load_bf16(reinterpret_cast<const uint16_t*>(p));
  return F::load(reinterpret_cast<const float*>(p));
}
template <DType T>
KK_INLINE void store(F x, uint8_t* p) {
  if constexpr (T == DType::f16) return x.store_f16(reinterpret_cast<uint16_t*>(p));
  if constexpr (T == DType::bf16) return x.store_bf16(reinterpret_cast<uint16_t*>(p));
  x.store(reinterpret_cast<float*>(p));
}

// F::W elements of a tensor from number i on.
inline F load_floats(const void* x, DType type, int64_t i) {
  if (type == DType::f32) return F::load(static_cast<const float*>(x) + i);
  if (type == DType::f16) return F::load_f16(static_cast<const uint16_t*>(x) + i);
  return F::load_bf16(static_cast<const uint16_t*>(x) + i);
}

// Even and odd elements of the 2W at p. The two halves of a 32-bit word are free to tell apart in bf16.
template <DType T>
KK_INLINE void load_split(const uint8_t* p, F& even, F& odd) {
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

KK_INLINE void add_sub(F& a, F& b) {
  const F sum = a + b;
  b = a - b;
  a = sum;
}

template <int N, int h>
KK_INLINE void fwht_registers(F* v) {
  if constexpr (h < N) {
    each<N / 2>([&](auto i) {
      const int j = static_cast<int>(i) / h * 2 * h + static_cast<int>(i) % h;
      add_sub(v[j], v[j + h]);
    });
    fwht_registers<N, 2 * h>(v);
  }
}

// H x for N vectors, pairs of them split into even and odd elements (load_split); the result is in natural order. Stage 1 is
// a sum across the pair, each exchange brings the next stride there: 2 instructions per stage and vector. Bits of the element
// number, (a or b) | lane bits downwards, for W = 16:
//   split 0|4321   exchange<0> 1|4302   2|4310   exchange<2> 3|2410   4|3210
// Stages run from stride 1 upwards, as core/fwht.h has it.
template <int N>
KK_INLINE void fwht_split(F* v) {
  each<N / 2>([&](auto i) {
    F &a = v[2 * i], &b = v[2 * i + 1];
    add_sub(a, b);
    exchange<0>(a, b);
    add_sub(a, b);
    exchange<0>(a, b);
    add_sub(a, b);
    if constexpr (F::W >= 8) {
      exchange<2>(a, b);
      add_sub(a, b);
    }
    if constexpr (F::W >= 16) {
      exchange<2>(a, b);
      add_sub(a, b);
    }
  });
  fwht_registers<N, 2>(v);
}

// N vectors onto one, halves onto halves: what core/fwht.h fold_sum does before the halves get shorter than a vector.
template <int N, typename Op>
KK_INLINE F fold(F* v, Op op) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    each<N / 2>([&](auto i) { v[i] = op(v[i], v[i + N / 2]); });
    return fold<N / 2>(v, op);
  }
}

// Rows that are encoded together: one per 128 bits, so that what is computed once per row (sums, roots, quotients) takes one
// instruction for all of them and no row waits for its own.
constexpr int kRows = F::W / 4;
// Rows between two steps of the encoder: 8 KB of fp32 at D = 128, and enough to hide the latency of a root and two quotients.
constexpr int64_t kBlock = 16;

// The rest of fold_sum: lanes 4r .. 4r+3 of the result all hold the fold of the lanes of v[r].
template <typename Op>
KK_INLINE F fold_rows(const F* v, Op op) {
#if defined(__AVX512F__)
  const F ab = op(F(_mm512_shuffle_f32x4(v[0].v, v[1].v, 0x44)), F(_mm512_shuffle_f32x4(v[0].v, v[1].v, 0xee)));
  const F cd = op(F(_mm512_shuffle_f32x4(v[2].v, v[3].v, 0x44)), F(_mm512_shuffle_f32x4(v[2].v, v[3].v, 0xee)));
  const F rows = op(F(_mm512_shuffle_f32x4(ab.v, cd.v, 0x88)), F(_mm512_shuffle_f32x4(ab.v, cd.v, 0xdd)));
  const F twos = op(rows, F(_mm512_permute_ps(rows.v, 0x4e)));
  return op(twos, F(_mm512_permute_ps(twos.v, 0xb1)));
#elif defined(__AVX2__)
  const F rows = op(F(_mm256_permute2f128_ps(v[0].v, v[1].v, 0x20)), F(_mm256_permute2f128_ps(v[0].v, v[1].v, 0x31)));
  const F twos = op(rows, F(_mm256_permute_ps(rows.v, 0x4e)));
  return op(twos, F(_mm256_permute_ps(twos.v, 0xb1)));
#else
  const F::Vec x = v[0].v;
  const F twos = op(v[0], F(F::Vec{x[2], x[3], x[0], x[1]}));
  return op(twos, F(F::Vec{twos.v[1], twos.v[0], twos.v[3], twos.v[2]}));
#endif
}

// ---- codes <-> bytes, 4 W codes at a time

#if defined(__AVX512F__)
using Bytes = __m512i;
#elif defined(__AVX2__)
using Bytes = __m256i;
#endif

#if !defined(__AVX512F__)
// floor(y) clamped to [-2^(B-1), 2^(B-1) - 1]. Clamping first, to whole numbers, gives the same.
template <int B>
KK_INLINE F floor_to_code(F y) {
  const F x = min(max(y, F::fill(-MidRise<B>::half_levels)), F::fill(MidRise<B>::half_levels - 1.0f));
#if defined(__AVX2__)
  return floor(x);
#else  // ::floorf is a call here, and numbers this small go through integers
  const F::Vec whole = __builtin_convertvector(__builtin_convertvector(x.v, F::Mask), F::Vec);  // towards zero
  return whole + __builtin_convertvector(whole > x.v, F::Vec);                                  // a true lane is -1
#endif
}
#endif

// Codes floor(c[4]) clamped to [-2^(B-1), 2^(B-1) - 1], plus 2^(B-1): packed into 4 W low_bits / 8 bytes of `low` and (B == 3)
// 4 W / 8 of `high`. |c| < 2^31. The packs to bytes saturate, so clamping is free at 8 bits and done on bytes below.
template <int B>
KK_INLINE void pack_codes(const F* c, uint8_t* low, uint8_t* high) {
  constexpr int half_levels = 1 << (B - 1);
#if defined(__AVX512F__)
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512i ab = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[0].v, down), _mm512_cvt_roundps_epi32(c[1].v, down));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[2].v, down), _mm512_cvt_roundps_epi32(c[3].v, down));
  // The packs work inside 128-bit lanes: 32-bit word 4 l + j holds codes 4 l .. 4 l + 3 of c[j].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Bytes code = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
  if constexpr (B < 8) {
    code = _mm512_max_epi8(code, _mm512_set1_epi8(-half_levels));
    code = _mm512_min_epi8(code, _mm512_set1_epi8(half_levels - 1));
  }
  code = _mm512_add_epi8(code, _mm512_set1_epi8(static_cast<char>(half_levels)));
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
  Bytes code = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  if constexpr (B < 8) {
    code = _mm256_max_epi8(code, _mm256_set1_epi8(-half_levels));
    code = _mm256_min_epi8(code, _mm256_set1_epi8(half_levels - 1));
  }
  code = _mm256_add_epi8(code, _mm256_set1_epi8(static_cast<char>(half_levels)));
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
  for (int i = 0; i < 4; ++i) (floor_to_code<B>(c[i]) + F::fill(half_levels)).store_u8(code + i * F::W);
  pack_bits<B == 3 ? 2 : B>(code, 4 * F::W, 0, low);
  if constexpr (B == 3) pack_bits<1>(code, 4 * F::W, 2, high);
#endif
}

// The way back: c[4] = 4 W codes, whole numbers in [0, 2^B).
template <int B>
KK_INLINE void unpack_codes(const uint8_t* low, const uint8_t* high, F* c) {
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

// ---- rows

struct Row {
  uint8_t* x;  // in the tensor; encoding only reads it
  uint8_t* side;
  int64_t token;
  KeyTransform transform;  // of this head; null where it does not apply
};

struct SideLayout {
  Side side;
  int64_t page_size, head_dim;
  int64_t token_stride;  // bytes from token to token, 16-bit sides
};

// Row.x -> Row.side, `n` rows of one format, dtype and head_dim. rows[n] .. rows[named - 1] come next: they are prefetched.
using EncodeRows = void (*)(const Row* rows, int64_t n, int64_t named, const SideLayout& at);
// Row.side -> Row.x in the user's basis: rotation and key transform undone.
using DecodeRows = void (*)(const Row* rows, int64_t n, const SideLayout& at);

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

// H diag(t) (x - mu), scaled, N vectors in natural order.
template <DType T, int N>
KK_INLINE void load_rotated(const uint8_t* x, const KeyTransform& t, F* v) {
  constexpr int64_t step = 2 * F::W;
  each<N / 2>([&](auto i) { load_split<T>(x + i * step * kElementBytes<T>, v[2 * i], v[2 * i + 1]); });
  if (t.centre)
    each<N / 2>([&](auto i) {
      F even = F::load(t.centre + i * step), odd = F::load(t.centre + i * step + F::W);
      deinterleave(even, odd);
      v[2 * i] = v[2 * i] - even;
      v[2 * i + 1] = v[2 * i + 1] - odd;
    });
  if (t.balance)
    each<N / 2>([&](auto i) {
      F even = F::load(t.balance + i * step), odd = F::load(t.balance + i * step + F::W);
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
KK_INLINE void store_unrotated(F* v, const KeyTransform& t, uint8_t* x) {
  each<N / 2>([&](auto i) { deinterleave(v[2 * i], v[2 * i + 1]); });
  fwht_split<N>(v);
  const F scale = F::fill(fwht_scale(N * F::W));
  each<N>([&](auto i) { v[i] = v[i] * scale; });
  if (t.balance) each<N>([&](auto i) { v[i] = v[i] / F::load(t.balance + i * F::W); });
  if (t.centre) each<N>([&](auto i) { v[i] = v[i] + F::load(t.centre + i * F::W); });
  each<N>([&](auto i) { store<T>(v[i], x + i * F::W * kElementBytes<T>); });
}

// floor(y) clamped to the codes, plus 1/2.
template <int B>
KK_INLINE F grid_level(F y) {
#if defined(__AVX512F__)  // one instruction clamps both ways, to the float below half_levels
  const F inside = _mm512_range_ps(y.v, _mm512_set1_ps(MidRise<B>::half_levels * 0.99999994f), 2);
  return floor(inside) + F::fill(0.5f);
#else
  return floor_to_code<B>(y) + F::fill(0.5f);
#endif
}

template <typename Fmt, DType T, int D>
struct TokenRows {  // u8 u4 u3 u2
  using Grid = typename Fmt::Grid;
  static constexpr int B = Grid::bits, N = D / F::W, groups = static_cast<int>(Fmt::groups(D)), M = N / groups;

  static uint8_t* low(const Row& r) { return r.side + r.token * (D * Grid::low_bits / 8); }
  static uint8_t* high(const Row& r, const SideLayout& at) {
    return r.side + Fmt::plane1_offset(at.page_size, D) + r.token * (D / 8);
  }
  static uint8_t* scale(const Row& r, const SideLayout& at, int g) {
    return r.side + Fmt::scales_offset(at.page_size, D) + (r.token * groups + g) * 2;
  }

  // MidRise::encode, each step for up to kBlock rows before the next: the roots and quotients of one row take longer than all
  // its other work, and here others fill the wait. A short group of kRows repeats the last row.
  static void encode(const Row* rows, int64_t n, int64_t named, const SideLayout& at) {
    for (int64_t first = 0; first < n; first += kBlock)
      encode_block(rows + first, n - first < kBlock ? n - first : kBlock, named - first, at);
  }

  static void encode_block(const Row* rows, int64_t n, int64_t named, const SideLayout& at) {
    const auto plus = [](F a, F b) { return a + b; };
    const auto larger = [](F a, F b) { return max(a, b); };
    const auto row = [&](int64_t r) -> const Row& { return rows[r < n ? r : n - 1]; };
    const int64_t whole = (n + kRows - 1) / kRows * kRows;
    alignas(64) float x[kBlock][D], inv[groups][kBlock * 4];
    const bool unbiased = at.side == Side::V && Grid::unbiased_values;
    F sums[groups][kBlock], tops[groups][kBlock], squares[groups][kBlock];  // later: sums of x c and of c c

    for (int64_t r = 0; r < whole; ++r) {
      if (r + kBlock < named) {
        const Row& next = rows[r + kBlock];
        for (int64_t i = 0; i < D * kElementBytes<T>; i += 64) __builtin_prefetch(next.x + i);
        __builtin_prefetch(low(next), 1);
        __builtin_prefetch(scale(next, at, 0), 1);
      }
      F v[N];
      load_rotated<T, N>(row(r).x, row(r).transform, v);
      each<N>([&](auto i) { v[i].store(x[r] + i * F::W); });
      each<groups>([&](auto g) {
        F t[M];
        each<M>([&](auto i) { t[i] = v[g * M + i] * v[g * M + i]; });
        sums[g][r] = fold<M>(t, plus);
        if constexpr (!Grid::from_rms) {
          each<M>([&](auto i) { t[i] = abs(v[g * M + i]); });
          tops[g][r] = fold<M>(t, larger);
        }
      });
    }

    bool ordinary = true;
    for (int g = 0; g < groups; ++g)
      for (int64_t r = 0; r < whole; r += kRows) {
        const F sum = fold_rows(sums[g] + r, plus);
        ordinary &= all_finite(sum * F::fill(1e26f));
        F base;
        if constexpr (Grid::from_rms)
          base = sqrt(sum * F::fill(1.0f / (M * F::W)));
        else
          base = fold_rows(tops[g] + r, larger);
        squares[g][r] = sum;
        const F start = min(max(base * F::fill(Grid::start), F::fill(kTinyScale)), F::fill(kMaxScale));
        (F::fill(1.0f) / start).store(inv[g] + 4 * r);
      }
    if (!ordinary) {  // NaN, Inf, or a norm past 1e6, where codes before the clamp could pass 2^31
      for (int64_t r = 0; r < n; ++r) Fmt::encode(at.side, x[r], rows[r].token, 1, rows[r].side, at.page_size, D);
      return;
    }

    for (int64_t r = 0; r < whole; ++r)
      each<groups>([&](auto g) {
        const F inv_r = F::fill(inv[g][4 * r]);
        F t[M], den = F::zero();
        each<M>([&](auto i) {
          const F v = F::load(x[r] + (g * M + i) * F::W), level = grid_level<B>(v * inv_r);
          t[i] = v * level;
          den = fma(level, level, den);  // exact, so fusing changes nothing
        });
        sums[g][r] = fold<M>(t, plus);
        tops[g][r] = den;
      });

    const auto store_scales = [&](F s, int64_t r, int g) {
      alignas(64) uint16_t half[F::W];
      min(s, F::fill(kMaxScale)).store_f16(half);
      for (int64_t i = 0; i < kRows; ++i) store_u16(half[4 * i], scale(row(r + i), at, g));
      return F::load_f16(half);
    };
    for (int g = 0; g < groups; ++g)
      for (int64_t r = 0; r < whole; r += kRows) {
        const F least_squares = fold_rows(sums[g] + r, plus) / fold_rows(tops[g] + r, plus);
        if (unbiased) {
          (F::fill(1.0f) / max(least_squares, F::fill(kTinyScale))).store(inv[g] + 4 * r);
        } else {
          const F s = store_scales(least_squares, r, g);
          where_positive(s, F::fill(1.0f) / s).store(inv[g] + 4 * r);
        }
      }

    if (unbiased) {
      for (int64_t r = 0; r < whole; ++r)
        each<groups>([&](auto g) {
          const F inv_r = F::fill(inv[g][4 * r]);
          F t[M];
          each<M>([&](auto i) {
            const F v = F::load(x[r] + (g * M + i) * F::W);
            t[i] = v * grid_level<B>(v * inv_r);
          });
          sums[g][r] = fold<M>(t, plus);
        });
      for (int g = 0; g < groups; ++g)
        for (int64_t r = 0; r < whole; r += kRows) {
          const F dot = fold_rows(sums[g] + r, plus);
          store_scales(where_positive(dot, squares[g][r] / dot), r, g);
        }
    }

    for (int64_t r = 0; r < n; ++r) {
      uint8_t *low_r = low(rows[r]), *high_r = high(rows[r], at);
      each<groups>([&](auto g) {
        const F inv_r = F::fill(inv[g][4 * r]);
        each<M / 4>([&](auto j) {
          constexpr int unit = F::W / 2;  // bytes that 4 W codes take, per bit of a code
          const int64_t q = g * (M / 4) + j;
          F c[4];
          each<4>([&](auto i) { c[i] = F::load(x[r] + (q * 4 + i) * F::W) * inv_r; });
          pack_codes<B>(c, low_r + q * unit * Grid::low_bits, high_r + q * unit);
        });
      });
    }
  }

  static void decode(const Row* rows, int64_t n, const SideLayout& at) {
    for (const Row* r = rows; r < rows + n; ++r) {
      const uint8_t *low_r = low(*r), *high_r = high(*r, at);
      F v[N];
      each<N / 4>([&](auto i) {
        unpack_codes<B>(low_r + i * (F::W / 2) * Grid::low_bits, high_r + i * (F::W / 2), v + i * 4);
      });
      each<groups>([&](auto g) {
        const F s = F::fill(half_value(load_u16(scale(*r, at, g)))), offset = F::fill(Grid::offset);
        each<M>([&](auto i) { v[g * M + i] = s * (v[g * M + i] - offset); });
      });
      store_unrotated<T, N>(v, r->transform, r->x);
    }
  }
};

template <DType To, DType T>
struct PlainRows {  // bf16 f16; head_dim a multiple of 16
  static void encode(const Row* rows, int64_t n, int64_t named, const SideLayout& at) {
    for (int64_t r = 0; r < n; ++r) {
      uint8_t* side = rows[r].side + rows[r].token * at.token_stride;
      if (r + kBlock < named) {
        const Row& next = rows[r + kBlock];
        uint8_t* next_side = next.side + next.token * at.token_stride;
        for (int64_t i = 0; i < at.head_dim * kElementBytes<T>; i += 64) __builtin_prefetch(next.x + i);
        for (int64_t i = 0; i < at.head_dim * 2; i += 64) __builtin_prefetch(next_side + i, 1);
      }
      for (int64_t i = 0; i < at.head_dim; i += F::W)
        store<To>(load<T>(rows[r].x + i * kElementBytes<T>), side + i * 2);
    }
  }
  static void decode(const Row* rows, int64_t n, const SideLayout& at) {
    for (const Row* r = rows; r < rows + n; ++r)
      for (int64_t i = 0; i < at.head_dim; i += F::W)
        store<T>(load<To>(r->side + r->token * at.token_stride + i * 2), r->x + i * kElementBytes<T>);
  }
};

template <typename Fmt>
inline constexpr DType kPlainType = DType::bf16;
template <>
inline constexpr DType kPlainType<f16> = DType::f16;

// kivi2::code as pack_codes<2> wants it.
KK_INLINE F kivi2_code(F x, F zero, F inv) {
  return min(max(rint((x - zero) * inv), F::zero()), F::fill(3.0f)) - F::fill(2.0f);  // max drops NaN
}
inline float kivi2_inv(uint16_t scale) {
  const float s = half_value(scale);
  return s > 0.0f ? 1.0f / s : 0.0f;
}

template <DType T, int D>
struct Kivi2Values {
  static constexpr int N = D / F::W, M = static_cast<int>(kivi2::v_group) / F::W, groups = N / M;

  static uint8_t* codes(const Row& r) { return r.side + r.token * (D / 4); }
  static uint8_t* scales(const Row& r, const SideLayout& at) {
    return r.side + kivi2::scale_offset(at.page_size, D) + r.token * groups * 2;
  }
  static uint8_t* zeros(const Row& r, const SideLayout& at) {
    return r.side + kivi2::zero_offset(Side::V, at.page_size, D) + r.token * groups * 2;
  }

  static void encode(const Row* rows, int64_t n, int64_t, const SideLayout& at) {
    for (const Row* r = rows; r < rows + n; ++r) {
      F c[N];
      for (int g = 0; g < groups; ++g) {
        F v[M], lo = F::fill(INFINITY), hi = F::fill(-INFINITY), odd = F::zero();
        each<M>([&](auto i) {
          v[i] = load<T>(r->x + (g * M + i) * F::W * kElementBytes<T>);
          lo = min(lo, v[i]);
          hi = max(hi, v[i]);
          odd = odd + v[i] * F::zero();  // NaN where v is not finite
        });
        const kivi2::Affine a = kivi2::affine(-(F::zero() - lo).fold_max(), hi.fold_max(), all_finite(odd));
        store_u16(a.scale, scales(*r, at) + g * 2);
        store_u16(a.zero, zeros(*r, at) + g * 2);
        const F zero = F::fill(half_value(a.zero)), inv = F::fill(kivi2_inv(a.scale));
        each<M>([&](auto i) { c[g * M + i] = kivi2_code(v[i], zero, inv); });
      }
      each<N / 4>([&](auto i) { pack_codes<2>(c + i * 4, codes(*r) + i * F::W, nullptr); });
    }
  }

  static void decode(const Row* rows, int64_t n, const SideLayout& at) {
    for (const Row* r = rows; r < rows + n; ++r) {
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(codes(*r) + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = F::fill(half_value(load_u16(scales(*r, at) + i / M * 2)));
        const F zero = F::fill(half_value(load_u16(zeros(*r, at) + i / M * 2)));
        store<T>(zero + s * c[i], r->x + i * F::W * kElementBytes<T>);
      }
    }
  }
};

template <DType T, int D>
struct Kivi2Keys {
  static constexpr int N = D / F::W;

  // A channel's tokens are coded at once: `load_token(token, float x[D])` is asked for every token of the page, twice.
  template <typename LoadToken>
  static void encode_page(LoadToken&& load_token, uint8_t* side, int64_t page_size) {
    float x[D], lo[D], hi[D], odd[D];
    for (int i = 0; i < D; ++i) lo[i] = INFINITY, hi[i] = -INFINITY, odd[i] = 0.0f;
    for (int64_t token = 0; token < page_size; ++token) {
      load_token(token, x);
      for (int i = 0; i < D; i += F::W) {
        const F v = F::load(x + i);
        min(F::load(lo + i), v).store(lo + i);
        max(F::load(hi + i), v).store(hi + i);
        (F::load(odd + i) + v * F::zero()).store(odd + i);  // NaN where v is not finite
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
      load_token(token, x);
      F c[N];
      for (int i = 0; i < N; ++i)
        c[i] = kivi2_code(F::load(x + i * F::W), F::load(zero + i * F::W), F::load(inv + i * F::W));
      for (int i = 0; i < N; i += 4) pack_codes<2>(c + i, side + token * (D / 4) + i / 4 * F::W, nullptr);
    }
  }

  static void decode(const Row* rows, int64_t n, const SideLayout& at) {
    for (const Row* r = rows; r < rows + n; ++r) {
      const uint8_t* scales = r->side + kivi2::scale_offset(at.page_size, D);
      const uint8_t* zeros = r->side + kivi2::zero_offset(Side::K, at.page_size, D);
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(r->side + r->token * (D / 4) + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = load<DType::f16>(scales + i * F::W * 2), zero = load<DType::f16>(zeros + i * F::W * 2);
        store<T>(zero + s * c[i], r->x + i * F::W * kElementBytes<T>);
      }
    }
  }
};

// ---- from run-time format, dtype and head_dim to a row function

template <typename Fmt>
inline constexpr bool kCoded = false;
template <>
inline constexpr bool kCoded<u8> = true;
template <>
inline constexpr bool kCoded<u4> = true;
template <>
inline constexpr bool kCoded<u3> = true;
template <>
inline constexpr bool kCoded<u2> = true;

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
          if constexpr (kCoded<Fmt>)
            f = TokenRows<Fmt, T, D.value>::encode;
          else
            fail("this format is not coded on the CPU yet");
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
          if constexpr (kCoded<Fmt>)
            f = TokenRows<Fmt, T, D.value>::decode;
          else
            fail("this format is not coded on the CPU yet");
        } else {
          f = side == Side::K ? Kivi2Keys<T, D.value>::decode : Kivi2Values<T, D.value>::decode;
        }
      });
    }
  });
  return f;
}

// One side of a pool: where the rows of (page, head, token) are and how they are written.
struct PoolSide {
  uint8_t* data;
  int64_t page_stride, head_stride;
  SideLayout layout;
  KeyTransform transform;  // of head 0; null where it does not apply

  PoolSide(const Pool& p, Side side, const KeyTransform& t, int64_t page_size, int64_t head_dim) {
    const bool keys = side == Side::K;
    data = keys ? p.k : p.v;
    page_stride = keys ? p.k_page : p.v_page;
    head_stride = keys ? p.k_head : p.v_head;
    layout = {side, page_size, head_dim, keys ? p.k_token : p.v_token};
    transform = {nullptr, nullptr, nullptr};
    if (keys) with_format(p.k_format, [&](auto tag) { transform = decltype(tag)::rotated ? t : transform; });
  }

  Row row(int64_t page, int64_t head, int64_t token, uint8_t* x) const {
    const int64_t c = head * layout.head_dim;
    return {x,
            data + page * page_stride + head * head_stride,
            token,
            {transform.centre ? transform.centre + c : nullptr, transform.balance ? transform.balance + c : nullptr,
             nullptr}};
  }
};

constexpr int64_t kRowBatch = 32;  // rows named before they are coded; enough to prefetch ahead

KK_END
