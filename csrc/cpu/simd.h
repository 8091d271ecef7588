// F: a vector of F::W floats (4, 8 or 16 lanes by ISA), one name for what the kernels need of it. fma() is the only fused
// operation; everything else rounds once per operation, so code written with F gives the same bits at every width.
#pragma once
#include <cmath>

#include "kvkernels/core/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

KK_BEGIN

#if defined(__AVX512F__)

struct F {
  static constexpr int W = 16;
  __m512 v;
  F() = default;
  F(__m512 x) : v(x) {}
  static F zero() { return _mm512_setzero_ps(); }
  static F fill(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F load_e5m3(const uint8_t* p) {  // core/scale.h
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7));
  }
  static F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static F load_i8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static F load_u4(const uint8_t* p) {  // W codes of 4 bits
    const __m128i x = _mm_loadl_epi64((const __m128i*)p);
    const __m128i both = _mm_unpacklo_epi8(x, _mm_srli_epi16(x, 4));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(both, _mm_set1_epi8(15))));
  }
  static F load_u2(const uint8_t* p) {  // W codes of 2 bits
    int32_t x;
    memcpy(&x, p, 4);
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(x), shift), _mm512_set1_epi32(3)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
  void store_bf16(uint16_t* p) const {
    const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0))));
  }
  // Lanes hold whole numbers in [0, 255].
  void store_u8(uint8_t* p) const { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }
  friend F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
  friend F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
  friend F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
  friend F operator/(F a, F b) { return _mm512_div_ps(a.v, b.v); }
  friend F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a * b + c
  friend F max(F a, F b) { return _mm512_max_ps(a.v, b.v); }              // b where either is NaN
  friend F min(F a, F b) { return _mm512_min_ps(a.v, b.v); }              // b where either is NaN
  friend F sqrt(F a) { return _mm512_sqrt_ps(a.v); }
  friend F floor(F a) { return _mm512_roundscale_ps(a.v, 9); }
  friend F rint(F a) { return _mm512_roundscale_ps(a.v, 8); }
  friend F abs(F a) { return _mm512_abs_ps(a.v); }
  friend F where_positive(F a, F b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v);
  }
  friend bool all_finite(F a) { return _mm512_fpclass_ps_mask(a.v, 0x99) == 0; }  // no QNaN, +inf, -inf, SNaN
  // a where lane index < n, else b; where_positive: b where a > 0, else 0
  friend F first(int n, F a, F b) { return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1u), b.v, a.v); }
  // Lane i pairs with lane i ^ h: the lower of the two gets a + b, the upper a - b (h = 1, 2, 4, 8).
  template <int h>
  F butterfly() const {
    __m512 other;
    if constexpr (h == 1) other = _mm512_permute_ps(v, 0xb1);
    if constexpr (h == 2) other = _mm512_permute_ps(v, 0x4e);
    if constexpr (h == 4) other = _mm512_shuffle_f32x4(v, v, 0xb1);
    if constexpr (h == 8) other = _mm512_shuffle_f32x4(v, v, 0x4e);
    constexpr unsigned upper = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
    return _mm512_mask_sub_ps(_mm512_add_ps(other, v), upper, other, v);
  }
  // Halves onto halves: lane i + lane i + W/2, and so on (core/fwht.h fold_sum).
  float fold_sum() const {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  float fold_max() const { return _mm512_reduce_max_ps(v); }
};

// exp(x) for x <= 0 (and NaN), 2 ulp; exp(-inf) = 0.
inline F exp_neg(F x) {
  const F t = max(F::fill(-200.0f), x * F::fill(1.44269504f)), n = rint(t), f = t - n;
  F p = F::fill(1.5353362e-4f);
  p = fma(p, f, F::fill(1.3398874e-3f));
  p = fma(p, f, F::fill(9.6184373e-3f));
  p = fma(p, f, F::fill(5.5503325e-2f));
  p = fma(p, f, F::fill(2.4022651e-1f));
  p = fma(p, f, F::fill(6.9314718e-1f));
  p = fma(p, f, F::fill(1.0f));
  return _mm512_scalef_ps(p.v, n.v);
}

// Horizontal sums of W vectors, for the price of about three, in two steps: `fold` takes kFold vectors to one as soon as
// they are there, `sum_folded` W / kFold of those to the vector whose lane i is the sum of vector i.
constexpr int kFold = 4;
inline F fold(const F* v) {
  const auto pair = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d ab = pair(v[0].v, v[1].v), cd = pair(v[2].v, v[3].v);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
inline F sum_folded(const F* r) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(r[0].v, r[1].v), halves(r[2].v, r[3].v));
}

#elif defined(__AVX2__)

struct F {
  static constexpr int W = 8;
  __m256 v;
  F() = default;
  F(__m256 x) : v(x) {}
  static F zero() { return _mm256_setzero_ps(); }
  static F fill(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F load_e5m3(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7));
  }
  static F load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static F load_i8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static F load_u4(const uint8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(x), shift), _mm256_set1_epi32(15)));
  }
  static F load_u2(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(x), shift), _mm256_set1_epi32(3)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_f16(uint16_t* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
  void store_bf16(uint16_t* p) const {
    const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
  }
  void store_u8(uint8_t* p) const {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(w, w));
  }
  friend F operator+(F a, F b) { return _mm256_add_ps(a.v, b.v); }
  friend F operator-(F a, F b) { return _mm256_sub_ps(a.v, b.v); }
  friend F operator*(F a, F b) { return _mm256_mul_ps(a.v, b.v); }
  friend F operator/(F a, F b) { return _mm256_div_ps(a.v, b.v); }
  friend F fma(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend F max(F a, F b) { return _mm256_max_ps(a.v, b.v); }
  friend F min(F a, F b) { return _mm256_min_ps(a.v, b.v); }
  friend F sqrt(F a) { return _mm256_sqrt_ps(a.v); }
  friend F floor(F a) { return _mm256_round_ps(a.v, 9); }
  friend F rint(F a) { return _mm256_round_ps(a.v, 8); }
  friend F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
  friend F where_positive(F a, F b) { return _mm256_and_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ), b.v); }
  friend bool all_finite(F a) {
    return _mm256_movemask_ps(_mm256_cmp_ps(abs(a).v, _mm256_set1_ps(3.4028235e38f), _CMP_LE_OQ)) == 0xff;
  }
  friend F first(int n, F a, F b) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
  }
  template <int h>
  F butterfly() const {
    __m256 other;
    if constexpr (h == 1) other = _mm256_permute_ps(v, 0xb1);
    if constexpr (h == 2) other = _mm256_permute_ps(v, 0x4e);
    if constexpr (h == 4) other = _mm256_permute2f128_ps(v, v, 0x01);
    constexpr int upper = h == 1 ? 0xaa : h == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_add_ps(other, v), _mm256_sub_ps(other, v), upper);
  }
  float fold_sum() const {
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  float fold_max() const {
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
};

inline F exp_neg(F x) {
  const F t = max(F::fill(-200.0f), x * F::fill(1.44269504f)), n = rint(t), f = t - n;
  F p = F::fill(1.5353362e-4f);
  p = fma(p, f, F::fill(1.3398874e-3f));
  p = fma(p, f, F::fill(9.6184373e-3f));
  p = fma(p, f, F::fill(5.5503325e-2f));
  p = fma(p, f, F::fill(2.4022651e-1f));
  p = fma(p, f, F::fill(6.9314718e-1f));
  p = fma(p, f, F::fill(1.0f));
  // 2^n through the exponent field; below 2^-126 the result is flushed to 0. NaN comes through p.
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const __m256 small = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  const __m256 nan = _mm256_cmp_ps(t.v, t.v, _CMP_UNORD_Q);
  return _mm256_or_ps(_mm256_andnot_ps(small, _mm256_mul_ps(p.v, _mm256_castsi256_ps(e))), nan);
}

constexpr int kFold = 2;
inline F fold(const F* v) { return _mm256_hadd_ps(v[0].v, v[1].v); }
inline F sum_folded(const F* r) {
  const __m256 a = _mm256_hadd_ps(r[0].v, r[1].v), b = _mm256_hadd_ps(r[2].v, r[3].v);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#else  // base: four lanes in the compiler's own vectors, any processor

struct F {
  static constexpr int W = 4;
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  Vec v;
  F() = default;
  F(Vec x) : v(x) {}
  template <typename G>
  static F each(G&& g) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = g(i);
    return r;
  }
  static F zero() { return fill(0.0f); }
  static F fill(float x) { return Vec{x, x, x, x}; }
  static F load(const float* p) {
    F r;
    memcpy(&r.v, p, 16);
    return r;
  }
  static F load_bf16(const uint16_t* p) {
    return each([&](int i) { return bf16_to_float(p[i]); });
  }
  static F load_f16(const uint16_t* p) {
    return each([&](int i) { return f16_to_float(p[i]); });
  }
  static F load_e5m3(const uint8_t* p) {
    return each([&](int i) { return f16_to_float(static_cast<uint16_t>(p[i] << 7)); });
  }
  static F load_u8(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  static F load_i8(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
  }
  static F load_u4(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i / 2] >> (4 * (i % 2)) & 15); });
  }
  static F load_u2(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(*p >> (2 * i) & 3); });
  }
  void store(float* p) const { memcpy(p, &v, 16); }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < W; ++i) p[i] = float_to_f16(v[i]);
  }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(v[i]);
  }
  void store_u8(uint8_t* p) const {
    for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(static_cast<int>(v[i]));
  }
  friend F operator+(F a, F b) { return a.v + b.v; }
  friend F operator-(F a, F b) { return a.v - b.v; }
  friend F operator*(F a, F b) { return a.v * b.v; }
  friend F operator/(F a, F b) { return a.v / b.v; }
  friend F fma(F a, F b, F c) { return a.v * b.v + c.v; }  // no fused unit is promised here
  friend F max(F a, F b) { return a.v > b.v ? a.v : b.v; }
  friend F min(F a, F b) { return a.v < b.v ? a.v : b.v; }
  friend F sqrt(F a) {
    return each([&](int i) { return ::sqrtf(a.v[i]); });
  }
  friend F floor(F a) {
    return each([&](int i) { return ::floorf(a.v[i]); });
  }
  friend F rint(F a) {
    return each([&](int i) { return ::rintf(a.v[i]); });
  }
  friend F abs(F a) {
    return each([&](int i) { return ::fabsf(a.v[i]); });
  }
  friend F where_positive(F a, F b) {
    return each([&](int i) { return a.v[i] > 0.0f ? b.v[i] : 0.0f; });
  }
  friend bool all_finite(F a) {
    bool ok = true;
    for (int i = 0; i < W; ++i) ok &= ::fabsf(a.v[i]) <= 3.4028235e38f;
    return ok;
  }
  friend F first(int n, F a, F b) {
    return each([&](int i) { return i < n ? a.v[i] : b.v[i]; });
  }
  template <int h>
  F butterfly() const {
    return each([&](int i) { return i & h ? v[i ^ h] - v[i] : v[i] + v[i ^ h]; });
  }
  float fold_sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float fold_max() const {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
};

inline F exp_neg(F x) {
  return F::each([&](int i) { return ::expf(x.v[i]); });
}

constexpr int kFold = 2;
inline F fold(const F* v) {
  return F::Vec{v[0].v[0] + v[0].v[2], v[0].v[1] + v[0].v[3], v[1].v[0] + v[1].v[2], v[1].v[1] + v[1].v[3]};
}
inline F sum_folded(const F* r) {
  return F::Vec{r[0].v[0] + r[0].v[1], r[0].v[2] + r[0].v[3], r[1].v[0] + r[1].v[1], r[1].v[2] + r[1].v[3]};
}

#endif

KK_END
