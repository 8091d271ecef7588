// Tokens of the delta rule on their way from tensors to fp32, zero padded to whole vectors, and what is done to one
// alone: l2norm and the rules of beta. Used token by token (delta_token.h) and by chunks (delta_chunk.h).
#pragma once
#include "cpu/row_vectors.h"
#include "kvkernels/delta.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

KK_BEGIN

// Products of decays run into denormals, which cost a hundred cycles each: they are zeros while this lives.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : old_(_mm_getcsr()) { _mm_setcsr(old_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(old_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned old_;
#endif
};

// The first n <= F::W elements, zeros after them; nothing beyond them is read or written.
template <DType T>
KK_INLINE F load_part(const uint8_t* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 some = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (T == DType::f32) return _mm512_maskz_loadu_ps(some, p);
  const __m256i x = _mm256_maskz_loadu_epi16(some, p);
  if constexpr (T == DType::f16) return _mm512_cvtph_ps(x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#else
  alignas(32) uint8_t part[F::W * kElementBytes<T>] = {};
  for (int64_t i = 0; i < n * kElementBytes<T>; i += kElementBytes<T>) memcpy(part + i, p + i, kElementBytes<T>);
  return load<T>(part);
#endif
}
template <DType T>
KK_INLINE void store_part(F x, uint8_t* p, int64_t n) {
  alignas(64) uint8_t part[F::W * kElementBytes<T>];
#if defined(__AVX512F__)
  if constexpr (T == DType::f32) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x.v);
#endif
  store<T>(x, part);
  for (int64_t i = 0; i < n * kElementBytes<T>; i += kElementBytes<T>) memcpy(p + i, part + i, kElementBytes<T>);
}

inline const uint8_t* delta_row(const DeltaRows& r, int64_t b, int64_t t, int64_t head) {
  const int64_t element = r.dtype == DType::f32 ? 4 : 2;
  return static_cast<const uint8_t*>(r.p) + (b * r.batch + t * r.token + head * r.head) * element;
}

template <DType T>
inline void load_row(const uint8_t* row, int64_t n, float* x) {
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) load<T>(row + i * kElementBytes<T>).store(x + i);
  if (i < n) load_part<T>(row + i * kElementBytes<T>, n - i).store(x + i);
}
// Elements [from, to) of a row, and zeros up to the next multiple of F::W.
inline void load_columns(const DeltaRows& r, int64_t b, int64_t t, int64_t head, int64_t from, int64_t to, float* x) {
  const uint8_t* row = delta_row(r, b, t, head);
  with_dtype(r.dtype, [&](auto type) { load_row<type.value>(row + from * kElementBytes<type.value>, to - from, x); });
}
inline void load_row(const DeltaRows& r, int64_t b, int64_t t, int64_t head, int64_t n, float* x) {
  load_columns(r, b, t, head, 0, n, x);
}
inline float load_scalar(const DeltaRows& r, int64_t b, int64_t t, int64_t head) {
  const uint8_t* p = delta_row(r, b, t, head);
  if (r.dtype == DType::f32) return *reinterpret_cast<const float*>(p);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(p);
  return r.dtype == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
}

template <DType T>
inline void store_row(const float* x, int64_t n, uint8_t* row) {
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) store<T>(F::load(x + i), row + i * kElementBytes<T>);
  if (i < n) store_part<T>(F::load(x + i), row + i * kElementBytes<T>, n - i);
}
// Elements [from, from + n) of a contiguous tensor.
inline void store_row(DType type, const float* x, int64_t n, void* tensor, int64_t from) {
  with_dtype(type,
             [&](auto t) { store_row<t.value>(x, n, static_cast<uint8_t*>(tensor) + from * kElementBytes<t.value>); });
}

// exp(g), 2 ulp for any g <= 0; exp(-inf) = 0. exp_neg rounds g * log2(e), which costs |g| ulp: that error is found and
// put right.
inline F exp_gate(F g) {
  const F x = max(F::fill(-150.0f), g);
#if defined(__AVX2__)
  const F log2e = F::fill(1.44269504f), t = x * log2e;
  const F lost = fma(x, F::fill(1.925963e-8f), fma(x, log2e, F::zero() - t));
  const F y = exp_neg(x);
  return fma(y, lost * F::fill(0.693147181f), y);
#else
  return exp_neg(x);
#endif
}

// Of n elements that zeros follow.
inline float dot(const float* x, const float* y, int64_t n) {
  F sum = F::zero();
  for (int64_t i = 0; i < n; i += F::W) sum = fma(F::load(x + i), F::load(y + i), sum);
  return sum.fold_sum();
}
inline void scale_row(float* x, float by, int64_t n) {
  const F f = F::fill(by);
  for (int64_t i = 0; i < n; i += F::W) (F::load(x + i) * f).store(x + i);
}

inline float l2norm_factor(float square) { return 1.0f / ::sqrtf(square + kL2NormEps); }
// In place; returns the factor.
inline float l2norm(float* x, int64_t n) {
  const float factor = l2norm_factor(dot(x, x, n));
  scale_row(x, factor, n);
  return factor;
}

inline float sigmoid(float x) {
  const float z = ::expf(-::fabsf(x));
  return (x >= 0.0f ? 1.0f : z) / (1.0f + z);
}
// beta from what was given; `kk` is the sum of k^2 after its norm, which only kaczmarz looks at.
inline float beta_value(BetaRule rule, float given, float kk) {
  if (rule == BetaRule::sigmoid) return sigmoid(given);
  if (rule == BetaRule::sigmoid2) return 2.0f * sigmoid(given);
  if (rule == BetaRule::kaczmarz) return given / (kk + kKaczmarzEps);
  return given;
}

KK_END
