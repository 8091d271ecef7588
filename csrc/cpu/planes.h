// Packed codes -> bytes, laid out for 4-way byte dot products.
//
// A dot product instruction multiplies four unsigned bytes of a 32-bit lane with four signed bytes and adds them up. So
//   K: lanes are tokens, the four bytes are four channels
//   V: lanes are channels, the four bytes are four tokens
// and neither needs a horizontal sum. The order of channels is the one that costs nothing to unpack: q is permuted once to
// match it (K), the result is permuted back once (V). A byte holds `per_byte` codes, its fields 0, 1, ...; every kind of plane
// says how a field is taken out of all bytes of a vector, and in which order channels then come.
#pragma once
#include "cpu/simd.h"

#if defined(__AVX2__)

KK_BEGIN

// A vector of I::W 32-bit integers.
#if defined(__AVX512F__)
struct I {
  static constexpr int W = 16;
  __m512i v;
  I() = default;
  I(__m512i x) : v(x) {}
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I fill(int32_t x) { return _mm512_set1_epi32(x); }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
  // the low byte of each
  void store_bytes(uint8_t* p) const { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
  // 128-bit lane L: the 16 bytes at p + (4L) * stride.
  static I load_lanes(const uint8_t* p, int64_t stride) {
    const auto at = [&](int L) { return _mm_loadu_si128((const __m128i*)(p + 4 * L * stride)); };
    const __m256i lo = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i hi = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
  }
  // a, b = 2W neighbours -> the even ones, the odd ones.
  friend void deinterleave(I& a, I& b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const I x = _mm512_permutex2var_epi32(a.v, even, b.v);
    b = _mm512_permutex2var_epi32(a.v, _mm512_or_si512(even, _mm512_set1_epi32(1)), b.v);
    a = x;
  }
  friend I operator+(I a, I b) { return _mm512_add_epi32(a.v, b.v); }
  friend I operator-(I a, I b) { return _mm512_sub_epi32(a.v, b.v); }
  template <int n>
  I sra() const {
    return _mm512_srai_epi32(v, n);
  }
  template <int n>
  I sll() const {
    return _mm512_slli_epi32(v, n);
  }
  friend I unpack_lo32(I a, I b) { return _mm512_unpacklo_epi32(a.v, b.v); }
  friend I unpack_hi32(I a, I b) { return _mm512_unpackhi_epi32(a.v, b.v); }
  friend I unpack_lo64(I a, I b) { return _mm512_unpacklo_epi64(a.v, b.v); }
  friend I unpack_hi64(I a, I b) { return _mm512_unpackhi_epi64(a.v, b.v); }
  // Bits [shift, shift + width) of every byte, moved to bit `pos`. Shifts run in 16-bit lanes; the mask drops what crosses.
  template <int shift, int width, int pos>
  I field() const {
    constexpr int by = shift - pos;
    __m512i x = v;
    if constexpr (by > 0) x = _mm512_srli_epi16(x, by);
    if constexpr (by < 0) x = _mm512_slli_epi16(x, -by);
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(((1 << width) - 1) << pos)));
  }
  // Bytes: three times each, modulo 256. 16-bit lanes: three times the even or the odd byte; the high byte moved to the low
  // one; the low bytes of a (whose high ones are 0) beside the high bytes of b.
  I thrice() const { return _mm512_add_epi8(v, _mm512_add_epi8(v, v)); }
  I thrice_even() const { return _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0003)); }
  I thrice_odd() const { return _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0300)); }
  I high_to_low() const { return _mm512_srli_epi16(v, 8); }
  friend I join_bytes(I a, I b) {
    return _mm512_ternarylogic_epi32(a.v, b.v, _mm512_set1_epi16(static_cast<short>(0xff00)), 0xf8);
  }
  F to_float() const { return _mm512_cvtepi32_ps(v); }
  static I from_float(F x) { return _mm512_cvtps_epi32(x.v); }
  static I dot(I acc, I u8, I s8);  // acc32 += u8 . s8, 4 by 4
  static I dot16(I acc, I u8, I s8) { return _mm512_add_epi16(acc.v, _mm512_maddubs_epi16(u8.v, s8.v)); }
  static I widen(I acc, I acc16) { return _mm512_add_epi32(acc.v, _mm512_madd_epi16(acc16.v, _mm512_set1_epi16(1))); }
};
#if defined(__AVX512VNNI__)
// GCC 12 copies every accumulator twice per step around its own intrinsic (_mm512_dpbusd_epi32): 32 moves for 16 products.
inline I I::dot(I acc, I u8, I s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u8.v), "v"(s8.v));
  return acc;
}
#endif
#else
struct I {
  static constexpr int W = 8;
  __m256i v;
  I() = default;
  I(__m256i x) : v(x) {}
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static I fill(int32_t x) { return _mm256_set1_epi32(x); }
  void store(void* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  void store_bytes(uint8_t* p) const {
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i b = _mm256_shuffle_epi8(v, low);
    _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
  }
  static I load_lanes(const uint8_t* p, int64_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                   _mm_loadu_si128((const __m128i*)(p + 4 * stride)), 1);
  }
  friend void deinterleave(I& a, I& b) {
    const __m256 x = _mm256_castsi256_ps(a.v), y = _mm256_castsi256_ps(b.v);
    a = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)), 0xd8);
    b = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)), 0xd8);
  }
  friend I operator+(I a, I b) { return _mm256_add_epi32(a.v, b.v); }
  friend I operator-(I a, I b) { return _mm256_sub_epi32(a.v, b.v); }
  template <int n>
  I sra() const {
    return _mm256_srai_epi32(v, n);
  }
  template <int n>
  I sll() const {
    return _mm256_slli_epi32(v, n);
  }
  friend I unpack_lo32(I a, I b) { return _mm256_unpacklo_epi32(a.v, b.v); }
  friend I unpack_hi32(I a, I b) { return _mm256_unpackhi_epi32(a.v, b.v); }
  friend I unpack_lo64(I a, I b) { return _mm256_unpacklo_epi64(a.v, b.v); }
  friend I unpack_hi64(I a, I b) { return _mm256_unpackhi_epi64(a.v, b.v); }
  template <int shift, int width, int pos>
  I field() const {
    constexpr int by = shift - pos;
    __m256i x = v;
    if constexpr (by > 0) x = _mm256_srli_epi16(x, by);
    if constexpr (by < 0) x = _mm256_slli_epi16(x, -by);
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(((1 << width) - 1) << pos)));
  }
  // Bytes: three times each, modulo 256. 16-bit lanes: three times the even or the odd byte; the high byte moved to the low
  // one; the low bytes of a (whose high ones are 0) beside the high bytes of b.
  I thrice() const { return _mm256_add_epi8(v, _mm256_add_epi8(v, v)); }
  I thrice_even() const { return _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0003)); }
  I thrice_odd() const { return _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0300)); }
  I high_to_low() const { return _mm256_srli_epi16(v, 8); }
  friend I join_bytes(I a, I b) {
    return _mm256_or_si256(a.v, _mm256_and_si256(b.v, _mm256_set1_epi16(static_cast<short>(0xff00))));
  }
  F to_float() const { return _mm256_cvtepi32_ps(v); }
  static I from_float(F x) { return _mm256_cvtps_epi32(x.v); }
  static I dot16(I acc, I u8, I s8) { return _mm256_add_epi16(acc.v, _mm256_maddubs_epi16(u8.v, s8.v)); }
  static I widen(I acc, I acc16) { return _mm256_add_epi32(acc.v, _mm256_madd_epi16(acc16.v, _mm256_set1_epi16(1))); }
};
#endif

// 16 bytes of 4 tokens, `stride` bytes apart: of each byte the four tokens' one behind the other.
inline void interleave(const uint8_t* rows, int64_t stride, __m256i* half) {
  const auto at = [&](int i) { return _mm_loadu_si128((const __m128i*)(rows + i * stride)); };
  const __m128i a = at(0), b = at(1), c = at(2), d = at(3);
  const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
  const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
  half[0] = _mm256_set_m128i(_mm_unpackhi_epi16(ab0, cd0), _mm_unpacklo_epi16(ab0, cd0));
  half[1] = _mm256_set_m128i(_mm_unpackhi_epi16(ab1, cd1), _mm_unpacklo_epi16(ab1, cd1));
}

template <typename P, int p, int n, typename At>
inline void store_field(I (&x)[n], const At& at) {
  for (int i = 0; i < n; ++i) P::template field<p>(x[i]).store(at(p) + i * I::W * 4);
  if constexpr (p + 1 < P::per_byte) store_field<P, p + 1>(x, at);
}
// Field p of 64 bytes, in two halves, goes to at(p), p = 0, 1, ...
template <typename P, typename At>
inline void store_fields(const __m256i* half, const At& at) {
#if defined(__AVX512F__)
  I x[1] = {_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1)};
#else
  I x[2] = {half[0], half[1]};
#endif
  store_field<P, 0>(x, at);
}

// A plane of B-bit codes whose values stand at bit POS of the full code (u3: 2 bits at 0, 1 bit at 2).
template <int B, int POS>
struct Plane {
  static constexpr int per_byte = 8 / B;
  static constexpr int max_code = ((1 << B) - 1) << POS;
  static constexpr float mean = max_code / 2.0f;
  // Bytes of the shortest row, of 32 channels; others are 8 or a multiple of 16.
  static constexpr int shortest = B * 4;
  static constexpr bool has_rest = false;
  static constexpr int64_t bytes(int64_t n) { return n * B / 8; }  // of n channels

  // Field p of every byte; called for p = 0, 1, ... in turn.
  template <int p>
  static I field(I& x) {
    return x.template field<p * B, B, POS>();
  }

  // ---- K: quad (w, p) = 32-bit word w of the token's row, field p of its bytes; byte j is channel w*32/B + j*8/B + p.
  static constexpr int64_t k_channel(int64_t quad, int j) {
    return quad / per_byte * (32 / B) + j * per_byte + quad % per_byte;
  }

  // n channels of digits (bytes), permuted into the order of the quads: every 4 * per_byte of them are a matrix [4][per_byte]
  // that is transposed.
  static void order_q(const uint8_t* digit, int64_t n, uint8_t* out) {
    const __m128i transpose4 = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i transpose2 = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int64_t i = 0; i < n; i += 16) {
      __m128i x = _mm_loadu_si128((const __m128i*)(digit + i));
      if constexpr (B == 1) {  // a matrix [4][8] in two halves of four columns
        const auto word = [&](int row) {
          int32_t w;
          memcpy(&w, digit + i / 32 * 32 + row * 8 + i % 32 / 4, 4);
          return w;
        };
        x = _mm_setr_epi32(word(0), word(1), word(2), word(3));
      }
      _mm_storeu_si128((__m128i*)(out + i), _mm_shuffle_epi8(x, B == 4 ? transpose2 : transpose4));
    }
  }

  // ---- V: the rows of a group are cut into units of U bytes; unit m, field p gives U lanes. Lane l of a unit is one byte of it.
  template <int64_t n>
  static constexpr int64_t unit = bytes(n) < 32 ? bytes(n) : 32;

  template <int64_t n>
  static constexpr int64_t v_channel(int64_t lane) {
    constexpr int64_t U = unit<n>;
    const int64_t block = lane / U, l = lane % U;
    const int64_t byte = U == 32 ? l / 4 % 2 * 16 + l / 8 * 4 + l % 4 : l;  // 256-bit interleaves work in two halves
    return (block / per_byte * U + byte) * per_byte + block % per_byte;
  }

  // A group of n channels of 4 tokens, `stride` bytes apart -> out [n lanes][4].
  template <int64_t n>
  static void unpack_v(const uint8_t* rows, int64_t stride, uint8_t* out) {
    constexpr int64_t U = unit<n>;
    for (int64_t m = 0; m < bytes(n); m += U, rows += U, out += U * per_byte * 4) {
      if constexpr (U == 32) {
        const auto at = [&](int i) { return _mm256_loadu_si256((const __m256i*)(rows + i * stride)); };
        const __m256i a = at(0), b = at(1), c = at(2), d = at(3);
        const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
        const __m256i lo[2] = {_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0)};
        const __m256i hi[2] = {_mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1)};
        store_fields<Plane>(lo, [&](int p) { return out + p * U * 4; });
        store_fields<Plane>(hi, [&](int p) { return out + 64 + p * U * 4; });
      } else if constexpr (U == 16) {
        __m256i x[2];
        interleave(rows, stride, x);
        store_fields<Plane>(x, [&](int p) { return out + p * U * 4; });
      } else {
        static_assert(U == 8 && B == 1);  // D = 64: 8 lanes a field, so two fields fill a 512-bit store
        const auto at = [&](int i) { return _mm_loadl_epi64((const __m128i*)(rows + i * stride)); };
        const __m128i ab = _mm_unpacklo_epi8(at(0), at(1)), cd = _mm_unpacklo_epi8(at(2), at(3));
        store_bits(_mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)), out);
      }
    }
  }

 private:
  template <int p = 0>
  static void store_bits(__m256i x, uint8_t* out) {
    const __m256i bit = _mm256_set1_epi8(1 << POS);
    const __m256i y =
        p > POS ? _mm256_srli_epi16(x, p > POS ? p - POS : 0) : _mm256_slli_epi16(x, p > POS ? 0 : POS - p);
    _mm256_storeu_si256((__m256i*)(out + p * 32), _mm256_and_si256(y, bit));
    if constexpr (p + 1 < per_byte) store_bits<p + 1>(x, out);
  }
};

// Trits, five to a byte (core/pack.h). The bytes of a group are filled up with zeros, and rows end anywhere: words of K take
// what stands behind them too, digits of q there are 0; lanes of V that no channel has are overwritten by the next field.
struct Trits {
  static constexpr int per_byte = 5;
  static constexpr int max_code = 2;
  static constexpr float mean = 1.0f;
  static constexpr int shortest = 13;
  static constexpr bool has_rest = true;
  static constexpr int64_t bytes(int64_t n) { return (n + 4) / 5; }

  // A byte c is a fraction c / 256: three times it is the next trit and, below the point, what holds the others.
  template <int p>
  static I field(I& x) {
    const I trit = join_bytes(x.thrice_even().high_to_low(), x.thrice_odd());
    if constexpr (p + 1 < per_byte) x = x.thrice();
    return trit;
  }

  // Quad (w, p): channels w * 20 + j * 5 + p.
  static void order_q(const uint8_t* digit, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 20, out += 20) {
      uint8_t in[20] = {};
      memcpy(in, digit + i, n - i < 20 ? n - i : 20);
      for (int p = 0; p < 5; ++p)
        for (int j = 0; j < 4; ++j) out[p * 4 + j] = in[j * 5 + p];
    }
  }

  // Field p stands in lanes first_lane(p), ..., one for each byte that has it.
  static constexpr int64_t first_lane(int64_t n, int p) {
    int64_t lane = 0;
    for (int i = 0; i < p; ++i) lane += (n - i + 4) / 5;
    return lane;
  }
  template <int64_t n>
  static constexpr int64_t v_channel(int64_t lane) {
    int p = 4;
    while (lane < first_lane(n, p)) --p;
    return (lane - first_lane(n, p)) * 5 + p;
  }

  // Up to 4 lanes behind the n are written to.
  template <int64_t n>
  static void unpack_v(const uint8_t* rows, int64_t stride, uint8_t* out) {
    constexpr int64_t last = bytes(n) > 16 ? bytes(n) - 16 : 0;  // two loads of 16 bytes overlap
    static_assert(last <= 16);
    const auto unit = [&](int64_t first) {
      __m256i x[2];
      interleave(rows + first, stride, x);
      store_fields<Trits>(x, [&](int p) { return out + (first_lane(n, p) + first) * 4; });
    };
    if constexpr (last > 0) unit(last);  // first: what it has too much stands where the other's last field begins
    unit(0);
  }
};

KK_END

#endif
