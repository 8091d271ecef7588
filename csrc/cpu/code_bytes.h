// Codes of a row <-> its bytes (core/pack.h), as vectors of whole numbers.
#pragma once
#include "cpu/row_vectors.h"
#include "kvkernels/core/grid.h"

KK_BEGIN

// floor(x) of lanes that an int holds.
KK_INLINE F floor_small(F x) {
#if defined(__AVX2__)
  return floor(x);
#else  // ::floorf is a call here, and numbers this small go through integers
  const F::Vec whole = __builtin_convertvector(__builtin_convertvector(x.v, F::Mask), F::Vec);  // towards zero
  return whole + __builtin_convertvector(whole > x.v, F::Vec);                                  // a true lane is -1
#endif
}

// ---- bits, 4 W codes at a time

#if defined(__AVX512F__)
using Bytes = __m512i;
#elif defined(__AVX2__)
using Bytes = __m256i;
#endif

#if defined(__AVX2__)
// floor(c[4]) clamped to [least, most], minus least: 4 W bytes. |c| < 2^31. The packs to bytes saturate, which is clamping to
// the range of 8 bits.
template <int least, int most>
KK_INLINE Bytes floor_bytes(const F* c) {
#if defined(__AVX512F__)
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512i ab = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[0].v, down), _mm512_cvt_roundps_epi32(c[1].v, down));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(c[2].v, down), _mm512_cvt_roundps_epi32(c[3].v, down));
  // The packs work inside 128-bit lanes: 32-bit word 4 l + j holds codes 4 l .. 4 l + 3 of c[j].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Bytes code = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
  if constexpr (least > -128) {
    code = _mm512_max_epi8(code, _mm512_set1_epi8(least));
    code = _mm512_min_epi8(code, _mm512_set1_epi8(most));
  }
  return _mm512_add_epi8(code, _mm512_set1_epi8(static_cast<char>(-least)));
#else
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(floor(c[0]).v), _mm256_cvtps_epi32(floor(c[1]).v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(floor(c[2]).v), _mm256_cvtps_epi32(floor(c[3]).v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  Bytes code = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  if constexpr (least > -128) {
    code = _mm256_max_epi8(code, _mm256_set1_epi8(least));
    code = _mm256_min_epi8(code, _mm256_set1_epi8(most));
  }
  return _mm256_add_epi8(code, _mm256_set1_epi8(static_cast<char>(-least)));
#endif
}
#endif

// Codes floor(c[4]) clamped to [-2^(B-1), 2^(B-1) - 1], plus 2^(B-1): packed into 4 W low_bits / 8 bytes of `low` and (B == 3)
// 4 W / 8 of `high`. |c| < 2^31.
template <int B>
KK_INLINE void pack_codes(const F* c, uint8_t* low, uint8_t* high) {
  constexpr int half_levels = MidRise<B>::half_levels;
#if defined(__AVX512F__)
  if constexpr (B == 1) {
    each<4>([&](auto i) {
      const auto bits = static_cast<uint16_t>(_mm512_cmp_ps_mask(c[i].v, _mm512_setzero_ps(), _CMP_GE_OQ));
      memcpy(low + 2 * i, &bits, 2);
    });
    return;
  }
  const Bytes code = floor_bytes<-half_levels, half_levels - 1>(c);
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
  if constexpr (B == 1) {
    each<4>([&](auto i) {
      const __m256 positive = _mm256_cmp_ps(c[i].v, _mm256_setzero_ps(), _CMP_GE_OQ);
      low[i] = static_cast<uint8_t>(_mm256_movemask_ps(positive));
    });
    return;
  }
  const Bytes code = floor_bytes<-half_levels, half_levels - 1>(c);
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
  for (int i = 0; i < 4; ++i) {
    const F inside =
        min(max(c[i], F::fill(-half_levels)), F::fill(half_levels - 1.0f));  // whole numbers: floor may follow
    (floor_small(inside) + F::fill(half_levels)).store_u8(code + i * F::W);
  }
  MidRise<B>::pack(code, 4 * F::W, low, high);
#endif
}

// The way back: c[4] = 4 W codes, whole numbers in [0, 2^B).
template <int B>
KK_INLINE void unpack_codes(const uint8_t* low, const uint8_t* high, F* c) {
  alignas(64) uint8_t code[4 * F::W];
#if defined(__AVX512F__)
  Bytes all;
  if constexpr (B == 8) all = _mm512_loadu_si512(low);
  if constexpr (B == 4) {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    all = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
  }
  if constexpr (B == 2 || B == 3) {
    // a byte dcba becomes the four bytes a, b, c, d: shifts by 0, 6, 12, 18 bits, then the low two of each
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i ab = _mm512_or_si512(w, _mm512_slli_epi32(w, 6));
    all = _mm512_and_si512(_mm512_or_si512(ab, _mm512_slli_epi32(ab, 12)), _mm512_set1_epi8(3));
  }
  if constexpr (B == 1 || B == 3) {
    uint64_t bits;
    memcpy(&bits, B == 1 ? low : high, 8);
    const Bytes top = _mm512_maskz_set1_epi8(bits, B == 1 ? 1 : 4);
    if constexpr (B == 1)
      all = top;
    else
      all = _mm512_or_si512(all, top);
  }
  _mm512_store_si512(code, all);
#elif defined(__AVX2__)
  Bytes all;
  if constexpr (B == 8) all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  if constexpr (B == 4) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    all = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), _mm256_set1_epi8(15));
  }
  if constexpr (B == 2 || B == 3) {
    const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
    const __m256i ab = _mm256_or_si256(w, _mm256_slli_epi32(w, 6));
    all = _mm256_and_si256(_mm256_or_si256(ab, _mm256_slli_epi32(ab, 12)), _mm256_set1_epi8(3));
  }
  if constexpr (B == 1 || B == 3) {
    int bits;
    memcpy(&bits, B == 1 ? low : high, 4);
    const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                             2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const __m256i hit = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    const Bytes top = _mm256_and_si256(_mm256_cmpeq_epi8(hit, bit_of), _mm256_set1_epi8(B == 1 ? 1 : 4));
    if constexpr (B == 1)
      all = top;
    else
      all = _mm256_or_si256(all, top);
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(code), all);
#else
  MidRise<B>::unpack(low, high, 4 * F::W, code);
#endif
  each<4>([&](auto i) { c[i] = F::load_u8(code + i * F::W); });
}

// ---- trits

// n codes, and 24 zeros behind them.
template <int n>
KK_INLINE void pack_trit_bytes(const uint8_t* code, uint8_t* low) {
#if defined(__AVX2__)
  constexpr int total = (n + 4) / 5, steps = (total + 3) / 4;  // byte q steps + m is byte m of number q
  const __m256i weight = _mm256_set1_epi64x(0x0103091b51);     // 81 27 9 3 1, and 0 for what follows
  __m256i bytes = _mm256_setzero_si256();
  each<steps>([&](auto m) {
    const auto five = [&](int q) {
      int64_t w;
      memcpy(&w, code + 5 * (q * steps + m), 8);
      return w;
    };
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set_epi64x(five(3), five(2), five(1), five(0)), weight);
    const __m256i v = _mm256_sad_epu8(pairs, _mm256_setzero_si256());
    // b >> 16 is ceil(256 v / 243) for v up to 242
    const __m256i b = _mm256_add_epi64(_mm256_mul_epu32(v, _mm256_set1_epi64x(69043)), _mm256_set1_epi64x(65535));
    bytes = _mm256_or_si256(bytes, _mm256_slli_epi64(_mm256_srli_epi64(b, 16), 8 * m));
  });
  alignas(32) uint64_t number[4];
  uint8_t all[3 * steps + 8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(number), bytes);
  for (int q = 0; q < 4; ++q) memcpy(all + q * steps, &number[q], 8);
  memcpy(low, all, total);
#else
  pack_trits(code, n, low);
#endif
}

#if defined(__AVX2__)
// Lane i of W codes that begin at trit r of a byte: which byte, counted from the first, and the power of 3 that brings its
// trit to the top. In 16-bit lanes with the byte on top.
struct TritLanes {
  alignas(64) uint8_t byte[5][2 * F::W];
  alignas(64) uint16_t power[5][F::W];
};
constexpr TritLanes make_trit_lanes() {
  TritLanes t{};
  for (int r = 0; r < 5; ++r)
    for (int i = 0; i < F::W; ++i) {
      t.byte[r][2 * i] = 0x80;  // zero
      t.byte[r][2 * i + 1] = static_cast<uint8_t>((r + i) / 5);
      t.power[r][i] = 1;
      for (int j = 0; j < (r + i) % 5; ++j) t.power[r][i] = static_cast<uint16_t>(t.power[r][i] * 3);
    }
  return t;
}
inline constexpr TritLanes kTritLanes = make_trit_lanes();

// Codes i .. i + W - 1 of a row.
KK_INLINE F load_trits(const uint8_t* low, int64_t i) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i / 5));
  const int64_t r = i % 5;
#if defined(__AVX512F__)
  const __m256i top = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes),
                                          _mm256_load_si256(reinterpret_cast<const __m256i*>(kTritLanes.byte[r])));
  const __m256i x = _mm256_mullo_epi16(top, _mm256_load_si256(reinterpret_cast<const __m256i*>(kTritLanes.power[r])));
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_mulhi_epu16(x, _mm256_set1_epi16(3))));
#else
  const __m128i top = _mm_shuffle_epi8(bytes, _mm_load_si128(reinterpret_cast<const __m128i*>(kTritLanes.byte[r])));
  const __m128i x = _mm_mullo_epi16(top, _mm_load_si128(reinterpret_cast<const __m128i*>(kTritLanes.power[r])));
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_mulhi_epu16(x, _mm_set1_epi16(3))));
#endif
}
#endif

// ---- a group of N vectors

// N W codes: floor(c) + half_levels, of trits floor(c + 1/2) + 1, clamped to the grid. |c| < 2^31.
template <typename Grid, int N>
KK_INLINE void pack_row(const F* c, uint8_t* low, uint8_t* high) {
  constexpr int unit = F::W / 2;  // bytes that 4 W codes take, per bit of a code
  if constexpr (Grid::bits == 0) {
    static_assert(N % 4 == 0);
    alignas(64) uint8_t code[N * F::W + 24];
    memset(code + N * F::W, 0, 24);
#if defined(__AVX2__)
    each<N / 4>([&](auto j) {
      F y[4];
      each<4>([&](auto i) { y[i] = c[j * 4 + i] + F::fill(0.5f); });
      const Bytes bytes = floor_bytes<-1, 1>(y);
      memcpy(code + j * 4 * F::W, &bytes, sizeof(bytes));
    });
#else
    for (int i = 0; i < N; ++i) {
      const F inside = min(max(c[i] + F::fill(0.5f), F::fill(-1.0f)), F::fill(1.0f));
      (floor_small(inside) + F::fill(1.0f)).store_u8(code + i * F::W);
    }
#endif
    pack_trit_bytes<N * F::W>(code, low);
  } else if constexpr (N < 4) {
    F padded[4];
    uint8_t low_bytes[unit * Grid::low_bits], high_bytes[unit];
    each<4>([&](auto i) { padded[i] = i < N ? c[i < N ? i : 0] : F::zero(); });
    pack_codes<Grid::bits>(padded, low_bytes, high_bytes);
    memcpy(low, low_bytes, Grid::low_bytes(N * F::W));
    memcpy(high, high_bytes, Grid::high_bytes(N * F::W));
  } else {
    each<N / 4>([&](auto j) { pack_codes<Grid::bits>(c + j * 4, low + j * unit * Grid::low_bits, high + j * unit); });
  }
}

// The way back: whole numbers from 0 up. Reads up to 16 bytes behind the row: a page goes on there, if only by its scales.
template <typename Grid, int N>
KK_INLINE void unpack_row(const uint8_t* low, const uint8_t* high, F* c) {
  constexpr int unit = F::W / 2;
  if constexpr (Grid::bits == 0) {
#if defined(__AVX2__)
    each<N>([&](auto i) { c[i] = load_trits(low, i * F::W); });
#else
    uint8_t code[N * F::W];
    unpack_trits(low, N * F::W, code);
    for (int i = 0; i < N; ++i) c[i] = F::load_u8(code + i * F::W);
#endif
  } else if constexpr (N < 4) {
    F padded[4];
    unpack_codes<Grid::bits>(low, high, padded);
    each<N>([&](auto i) { c[i] = padded[i]; });
  } else {
    each<N / 4>([&](auto j) { unpack_codes<Grid::bits>(low + j * unit * Grid::low_bits, high + j * unit, c + j * 4); });
  }
}

KK_END
