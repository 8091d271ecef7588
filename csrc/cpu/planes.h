// Packed codes -> bytes, laid out for 4-way byte dot products.
//
// A dot product instruction multiplies four unsigned bytes of a 32-bit lane with four signed bytes and adds them up. So
//   K: lanes are tokens, the four bytes are four channels
//   V: lanes are channels, the four bytes are four tokens
// and neither needs a horizontal sum. The order of channels is the one that costs nothing to unpack: q is permuted once to
// match it (K), the result is permuted back once (V). A byte holds `per_byte` codes, its fields 0, 1, ...; every kind of code
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
  // 16-bit lanes, downwards: what crosses from byte to byte, a mask drops.
  template <int by>
  I shift() const {
    if constexpr (by > 0) return _mm512_srli_epi16(v, by);
    if constexpr (by < 0) return _mm512_slli_epi16(v, -by);
    return v;
  }
  friend I operator|(I a, I b) { return _mm512_or_si512(a.v, b.v); }
  friend I operator&(I a, I b) { return _mm512_and_si512(a.v, b.v); }
  friend I or_and(I a, I b, I mask) { return _mm512_ternarylogic_epi32(a.v, b.v, mask.v, 0xf8); }
  static I fill16(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
  // Of every word byte `first` in the low 16 bits, byte first + 1 in the high ones.
  template <int first>
  I two_bytes() const {
    return _mm512_shuffle_epi8(
        v, _mm512_broadcast_i32x4(_mm_setr_epi8(first, -1, first + 1, -1, first + 4, -1, first + 5, -1,  //
                                                first + 8, -1, first + 9, -1, first + 12, -1, first + 13, -1)));
  }
  // Bytes: three times each, modulo 256. 16-bit lanes: three times the even or the odd byte; the high byte moved to the low
  // one; the low bytes of a (whose high ones are 0) beside the high bytes of b.
  I thrice() const { return _mm512_add_epi8(v, _mm512_add_epi8(v, v)); }
  I thrice_even() const { return _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0003)); }
  I thrice_odd() const { return _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0300)); }
  I high_to_low() const { return _mm512_srli_epi16(v, 8); }
  friend I join_bytes(I a, I b) { return or_and(a, b, fill16(0xff00)); }
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
  template <int by>
  I shift() const {
    if constexpr (by > 0) return _mm256_srli_epi16(v, by);
    if constexpr (by < 0) return _mm256_slli_epi16(v, -by);
    return v;
  }
  friend I operator|(I a, I b) { return _mm256_or_si256(a.v, b.v); }
  friend I operator&(I a, I b) { return _mm256_and_si256(a.v, b.v); }
  friend I or_and(I a, I b, I mask) { return a | (b & mask); }
  static I fill16(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
  template <int first>
  I two_bytes() const {
    return _mm256_shuffle_epi8(
        v, _mm256_broadcastsi128_si256(_mm_setr_epi8(first, -1, first + 1, -1, first + 4, -1, first + 5, -1,  //
                                                     first + 8, -1, first + 9, -1, first + 12, -1, first + 13, -1)));
  }
  // Bytes: three times each, modulo 256. 16-bit lanes: three times the even or the odd byte; the high byte moved to the low
  // one; the low bytes of a (whose high ones are 0) beside the high bytes of b.
  I thrice() const { return _mm256_add_epi8(v, _mm256_add_epi8(v, v)); }
  I thrice_even() const { return _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0003)); }
  I thrice_odd() const { return _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0300)); }
  I high_to_low() const { return _mm256_srli_epi16(v, 8); }
  friend I join_bytes(I a, I b) { return or_and(a, b, fill16(0xff00)); }
  F to_float() const { return _mm256_cvtepi32_ps(v); }
  static I from_float(F x) { return _mm256_cvtps_epi32(x.v); }
  static I dot16(I acc, I u8, I s8) { return _mm256_add_epi16(acc.v, _mm256_maddubs_epi16(u8.v, s8.v)); }
  static I widen(I acc, I acc16) { return _mm256_add_epi32(acc.v, _mm256_madd_epi16(acc16.v, _mm256_set1_epi16(1))); }
};
#endif

// Codes of B bits.
template <int B>
struct Plane {
  using Word = I;
  static constexpr int per_byte = 8 / B;
  static constexpr int max_code = (1 << B) - 1;
  static constexpr float mean = max_code / 2.0f;
  // Bytes of the shortest row, of 32 channels; others are 8 or a multiple of 16.
  static constexpr int shortest = B * 4;
  static constexpr bool has_rest = false, two_rows = false;
  static constexpr int64_t bytes(int64_t n) { return n * B / 8; }  // of n channels

  // Field p of every byte; called for p = 0, 1, ... in turn.
  template <int p>
  static I field(I& x) {
    return x.template shift<p * B>() & I::fill16(max_code * 0x0101);
  }

  // n channels of digits (bytes) in the order of K's quads: quad (w, p) is field p of 32-bit word w of a row, its byte j channel
  // w*32/B + j*8/B + p. Every 4 * per_byte digits are a matrix [4][per_byte] that is transposed.
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

  template <int p>
  static I from_field(I x) {
    return x;
  }
  static constexpr int64_t v_channel(int64_t byte, int p) { return byte * per_byte + p; }
};

// Codes of 3 bits: a row of their low 2 bits, and one of their high bits, half as long. Fields have both, a product for each.
struct ThreeBits {
  struct Word {
    I low, high;  // high: bit p of a byte belongs to field p of that byte of low
  };
  static constexpr int per_byte = 4;
  static constexpr int max_code = 7;
  static constexpr float mean = 3.5f;
  static constexpr int shortest = 8;
  static constexpr bool has_rest = false, two_rows = true;
  static constexpr int64_t bytes(int64_t n) { return n / 4; }  // of the low row

  template <int p>
  static I field(Word& x) {
    return or_and(Plane<2>::field<p>(x.low), x.high.template shift<p - 2>(), I::fill16(0x0404));
  }
  // The high bits of low words 2 w + half, from word w of the high row.
  template <int half>
  static I high_bits(I word) {
    const I x = word.template two_bytes<2 * half>();
    return x | x.template shift<-4>();
  }
  static void order_q(const uint8_t* digit, int64_t n, uint8_t* out) { Plane<2>::order_q(digit, n, out); }
  template <int p>
  static Word from_field(const Word& x) {
    return x;
  }
  static constexpr int64_t v_channel(int64_t byte, int p) { return byte * 4 + p; }
};

// Trits, five to a byte (core/pack.h). The bytes of a group are filled up with zeros, and rows end anywhere: words of K take
// what stands behind them too, digits of q there are 0; no channel takes the lanes of V that follow.
struct Trits {
  using Word = I;
  static constexpr int per_byte = 5;
  static constexpr int max_code = 2;
  static constexpr float mean = 1.0f;
  static constexpr int shortest = 13;
  static constexpr bool has_rest = true, two_rows = false;
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

  // x as field p wants it.
  template <int p>
  static I from_field(I x) {
    for (int i = 0; i < p; ++i) x = x.thrice();
    return x;
  }
  static constexpr int64_t v_channel(int64_t byte, int p) { return byte * 5 + p; }
};

// ---- V: lanes are words, each a byte of four tokens' rows. A group's rows are cut into vectors of I::W of them, a field of a
// vector is I::W lanes.

// Rows of half a vector: the other half holds them too, one field further.
template <typename P>
struct Doubled : P {
  static constexpr int per_byte = P::per_byte / 2;
  template <int p>
  static I field(I& x) {
    return P::template field<2 * p>(x);
  }
};

template <typename P>
struct VRows {
  using Fields = P;
  static constexpr int64_t vectors(int64_t n) { return (P::bytes(n) + I::W - 1) / I::W; }
  static constexpr int64_t lanes(int64_t n) { return vectors(n) * P::per_byte * I::W; }

  // Which channel a lane holds; n and more: none. Rows of 32 bytes are interleaved in two halves.
  static constexpr int64_t channel(int64_t n, int64_t lane) {
    const int64_t word = lane / I::W / P::per_byte * I::W + lane % I::W, w = word % 32;
    const int64_t byte = P::bytes(n) > 16 ? word - w + w / 4 % 2 * 16 + w / 8 * 4 + w % 4 : word;
    const int64_t c = P::v_channel(byte, static_cast<int>(lane / I::W % P::per_byte));
    return byte < P::bytes(n) ? c : n;
  }

  // The rows of 4 tokens, `bytes` long, `stride` bytes apart, and what stands behind them up to the next 16 bytes. Half a
  // vector of 512 bits goes to at(0), at(1), ... Where `nibbles`, a byte stands for two: its halves.
  template <int64_t bytes, bool nibbles, typename At>
  [[gnu::always_inline]] static void interleave(const uint8_t* rows, int64_t stride, const At& at) {
    if constexpr (bytes <= 16) {
      const auto row = [&](int i) {
        const auto* from = reinterpret_cast<const __m128i*>(rows + i * stride);
        if (!nibbles) return _mm_loadu_si128(from);
        const __m128i y = _mm_cvtepu8_epi16(_mm_loadl_epi64(from));
        return _mm_or_si128(y, _mm_slli_epi16(y, 4));
      };
      const __m128i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
      const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
      const auto store = [&](uint8_t* to, __m128i lo, __m128i hi) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), lo);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), hi);
      };
      store(at(0), _mm_unpacklo_epi16(ab0, cd0), _mm_unpackhi_epi16(ab0, cd0));
      if (bytes > 8) store(at(1), _mm_unpacklo_epi16(ab1, cd1), _mm_unpackhi_epi16(ab1, cd1));
      return;
    }
    for (int64_t i = 0; i < bytes / 8; i += 4, rows += 32) {
      const auto row = [&](int j) {
        if (!nibbles) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + j * stride));
        const __m256i y = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + j * stride)));
        return _mm256_or_si256(y, _mm256_slli_epi16(y, 4));
      };
      const __m256i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
      const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
      const auto store = [&](int64_t j, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(i + j)), x); };
      store(0, _mm256_unpacklo_epi16(ab0, cd0));
      store(1, _mm256_unpackhi_epi16(ab0, cd0));
      store(2, _mm256_unpacklo_epi16(ab1, cd1));
      store(3, _mm256_unpackhi_epi16(ab1, cd1));
    }
  }
};

// Rows of 8 bytes, which are half a vector of 512 bits.
template <typename P>
struct VHalfRows {
  using Fields = Doubled<P>;
  static constexpr int64_t vectors(int64_t) { return 1; }
  static constexpr int64_t lanes(int64_t) { return Fields::per_byte * I::W; }
  static constexpr int64_t channel(int64_t, int64_t lane) {
    const int64_t l = lane % I::W;
    return P::v_channel(l % 8, static_cast<int>(2 * (lane / I::W) + l / 8));
  }
  template <int64_t, bool, typename At>
  [[gnu::always_inline]] static void interleave(const uint8_t* rows, int64_t stride, const At& at) {
    const auto row = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + i * stride)); };
    const __m128i ab = _mm_unpacklo_epi8(row(0), row(1)), cd = _mm_unpacklo_epi8(row(2), row(3));
    const __m128i lo = _mm_unpacklo_epi16(ab, cd), hi = _mm_unpackhi_epi16(ab, cd);
    const auto store = [&](uint8_t* to, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x); };
    constexpr int bits = 8 / P::per_byte;
    store(at(0), lo);
    store(at(0) + 16, hi);
    store(at(1), _mm_srli_epi16(lo, bits));
    store(at(1) + 16, _mm_srli_epi16(hi, bits));
  }
};

KK_END

#endif
