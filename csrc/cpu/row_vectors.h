// A row of a tensor in vectors: loads and stores of any dtype, and the Walsh-Hadamard transform in registers.
#pragma once
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"
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

KK_END
