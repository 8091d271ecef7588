// Packed codes of 1, 2 or 4 bits -> bytes, laid out for 4-way byte dot products, and the digits they are multiplied with.
//
// A dot product instruction multiplies four unsigned bytes of a 32-bit lane with four signed bytes and adds them up. So
//   K: lanes are tokens, the four bytes are four channels
//   V: lanes are channels, the four bytes are four tokens
// and neither needs a horizontal sum. The order of channels is the one that costs nothing to unpack; q is permuted once to
// match it (K), the result is permuted back once (V).
#pragma once
#include "cpu/rows.h"

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
  static I gather(const uint8_t* p, int stride) {  // lane i: the 4 bytes at p + i * stride
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(i, _mm512_set1_epi32(stride)), p, 1);
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
  static I gather(const uint8_t* p, int stride) {
    const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_i32gather_epi32((const int*)p, _mm256_mullo_epi32(i, _mm256_set1_epi32(stride)), 1);
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
  F to_float() const { return _mm256_cvtepi32_ps(v); }
  static I from_float(F x) { return _mm256_cvtps_epi32(x.v); }
  static I dot16(I acc, I u8, I s8) { return _mm256_add_epi16(acc.v, _mm256_maddubs_epi16(u8.v, s8.v)); }
  static I widen(I acc, I acc16) { return _mm256_add_epi32(acc.v, _mm256_madd_epi16(acc16.v, _mm256_set1_epi16(1))); }
};
#endif

// A plane of B-bit codes whose values stand at bit POS of the full code (u3: 2 bits at 0, 1 bit at 2).
template <int B, int POS>
struct Plane {
  static constexpr int per_byte = 8 / B;

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

  // sums[m][t] = (add ? sums[m][t] : 0) + codes of token t . words[m]  for T vectors of tokens: vector i holds the I::W tokens
  // from rows[i], `stride` bytes apart, of which `bytes` (8 or a multiple of 16) count. The codes go from memory to the dot
  // product without being stored: M * T sums and the words of 16 bytes a row stay in registers.
  template <int M, int T>
  static void dot_k(const uint8_t* const* rows, int64_t stride, int64_t bytes, const int32_t* words, int64_t ldw,
                    int32_t* sums, int64_t lds, bool add) {
    I acc[M][T];
    for (int m = 0; m < M; ++m)
      for (int t = 0; t < T; ++t) acc[m][t] = add ? I::load(sums + m * lds + t * I::W) : I::zero();
    for (int64_t b = 0; b < bytes; b += 16, words += 4 * per_byte) {
      I w[4][T];
      const int count = bytes == 8 ? 2 : 4;
      for (int t = 0; t < T; ++t) {
        const uint8_t* r = rows[t] + b;
        if (count == 2) {
          w[0][t] = I::gather(r, static_cast<int>(stride));
          w[1][t] = I::gather(r + 4, static_cast<int>(stride));
          continue;
        }
        // 4x4 transposes of words: lane group L of z_i is token 4L + i, so the result runs through the tokens in order
        const I z0 = I::load_lanes(r, stride), z1 = I::load_lanes(r + stride, stride);
        const I z2 = I::load_lanes(r + 2 * stride, stride), z3 = I::load_lanes(r + 3 * stride, stride);
        const I lo01 = unpack_lo32(z0, z1), hi01 = unpack_hi32(z0, z1), lo23 = unpack_lo32(z2, z3),
                hi23 = unpack_hi32(z2, z3);
        w[0][t] = unpack_lo64(lo01, lo23);
        w[1][t] = unpack_hi64(lo01, lo23);
        w[2][t] = unpack_lo64(hi01, hi23);
        w[3][t] = unpack_hi64(hi01, hi23);
      }
#if defined(__AVX512VNNI__)
      for (int i = 0; i < count; ++i) dot_fields<M, T>(w[i], words + i * per_byte, ldw, acc);
#else
      // Pairs of products are summed in 16 bits; 16 bytes of a row are 32 bits / B quads of at most 2 * 127 * code each:
      // 12192 (2 bits), 30480 (4 bits), 32512 (the 1-bit plane, whose code is 4).
      I part[M][T];
      for (int m = 0; m < M; ++m)
        for (int t = 0; t < T; ++t) part[m][t] = I::zero();
      for (int i = 0; i < count; ++i) dot_fields<M, T>(w[i], words + i * per_byte, ldw, part);
      for (int m = 0; m < M; ++m)
        for (int t = 0; t < T; ++t) acc[m][t] = I::widen(acc[m][t], part[m][t]);
#endif
    }
    for (int m = 0; m < M; ++m)
      for (int t = 0; t < T; ++t) acc[m][t].store(sums + m * lds + t * I::W);
  }

  // ---- V: rows are cut into units of U bytes; unit m, field p gives U lanes. Lane l of a unit is byte v_byte(l) of it.
  static constexpr int64_t unit(
      int64_t D) {  // never wider than a scale group, so that lanes of one group stay together
    const int64_t row = D * B / 8, group = 128 * B / 8, u = row < group ? row : group;
    return u < 32 ? u : 32;
  }
  static constexpr int64_t v_channel(int64_t lane, int64_t D) {
    const int64_t U = unit(D), block = lane / U, l = lane % U;
    const int64_t byte = U == 32 ? l / 4 % 2 * 16 + l / 8 * 4 + l % 4 : l;  // 256-bit interleaves work in two halves
    return (block / per_byte * U + byte) * per_byte + block % per_byte;
  }

  template <int p = 0>
  static void store_v(I x, int64_t step, uint8_t* out) {
    x.template field<p * B, B, POS>().store(out + p * step);
    if constexpr (p + 1 < per_byte) store_v<p + 1>(x, step, out);
  }

  // Rows of 4 tokens, `stride` apart -> out [D lanes][4].
  template <int64_t D>
  static void unpack_v(const uint8_t* rows, int64_t stride, uint8_t* out) {
    constexpr int64_t U = unit(D), row = D * B / 8;
    for (int64_t m = 0; m < row; m += U, rows += U, out += U * per_byte * 4) {
      if constexpr (U == 32) {
        const auto at = [&](int i) { return _mm256_loadu_si256((const __m256i*)(rows + i * stride)); };
        const __m256i a = at(0), b = at(1), c = at(2), d = at(3);
        const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
        store_parts(_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0), U * 4, out);
        store_parts(_mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1), U * 4, out + 64);
      } else if constexpr (U == 16) {
        const auto at = [&](int i) { return _mm_loadu_si128((const __m128i*)(rows + i * stride)); };
        const __m128i a = at(0), b = at(1), c = at(2), d = at(3);
        const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
        const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
        store_parts(_mm256_set_m128i(_mm_unpackhi_epi16(ab0, cd0), _mm_unpacklo_epi16(ab0, cd0)),
                    _mm256_set_m128i(_mm_unpackhi_epi16(ab1, cd1), _mm_unpacklo_epi16(ab1, cd1)), U * 4, out);
      } else {
        static_assert(U == 8 && B == 1);  // u3 at D = 64: 8 lanes a field, so two fields fill a 512-bit store
        const auto at = [&](int i) { return _mm_loadl_epi64((const __m128i*)(rows + i * stride)); };
        const __m128i ab = _mm_unpacklo_epi8(at(0), at(1)), cd = _mm_unpacklo_epi8(at(2), at(3));
        store_bits(_mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)), out);
      }
    }
  }

 private:
  template <int M, int T, int p = 0>
  __attribute__((always_inline)) static inline void dot_fields(const I* w, const int32_t* words, int64_t ldw,
                                                               I (*acc)[T]) {
    I c[T];
    for (int t = 0; t < T; ++t) c[t] = w[t].template field<p * B, B, POS>();
    for (int m = 0; m < M; ++m) {
      const I q = I::fill(words[m * ldw + p]);
#if defined(__AVX512VNNI__)
      for (int t = 0; t < T; ++t) acc[m][t] = I::dot(acc[m][t], c[t], q);
#else
      for (int t = 0; t < T; ++t) acc[m][t] = I::dot16(acc[m][t], c[t], q);
#endif
    }
    if constexpr (p + 1 < per_byte) dot_fields<M, T, p + 1>(w, words, ldw, acc);
  }

  // 64 bytes as two halves, every field of them `step` bytes after the last.
  static void store_parts(__m256i lo, __m256i hi, int64_t step, uint8_t* out) {
#if defined(__AVX512F__)
    store_v(I(_mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1)), step, out);
#else
    store_v(I(lo), step, out);
    store_v(I(hi), step, out + 32);
#endif
  }
  template <int p = 0>
  static void store_bits(__m256i x, uint8_t* out) {
    const __m256i bit = _mm256_set1_epi8(1 << POS);
    const __m256i y =
        p > POS ? _mm256_srli_epi16(x, p > POS ? p - POS : 0) : _mm256_slli_epi16(x, p > POS ? 0 : POS - p);
    _mm256_storeu_si256((__m256i*)(out + p * 32), _mm256_and_si256(y, bit));
    if constexpr (p + 1 < per_byte) store_bits<p + 1>(x, out);
  }
};

// out[m][lane] = sum over k of the 4-way dot of codes[k][lane] and words[m][k]. The instructions take one unsigned and one
// signed factor; codes fit either, so words may be signed digits or (UNSIGNED) bytes up to 255.
// Without VNNI, products are summed in 16 bits first: pairs of at most 2 * MAXCODE * 255, widened before they can overflow.
template <int MAXCODE, int M, int NV, bool UNSIGNED>
inline void dot4_block(const uint8_t* codes, int64_t ldc, int64_t nk, const int32_t* words, int64_t ldw, int32_t* out,
                       int64_t ldo) {
  I acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j] = I::zero();
#if defined(__AVX512VNNI__)
  for (int64_t k = 0; k < nk; ++k, codes += ldc) {
    I c[NV];
    for (int j = 0; j < NV; ++j) c[j] = I::load(codes + j * I::W * 4);
    for (int m = 0; m < M; ++m) {
      const I w = I::fill(words[m * ldw + k]);
      for (int j = 0; j < NV; ++j) acc[m][j] = UNSIGNED ? I::dot(acc[m][j], w, c[j]) : I::dot(acc[m][j], c[j], w);
    }
  }
#else
  constexpr int64_t safe = 32767 / (2 * MAXCODE * (UNSIGNED ? 255 : 127));
  for (int64_t k0 = 0; k0 < nk; k0 += safe) {
    I part[M][NV];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) part[m][j] = I::zero();
    const int64_t k1 = k0 + safe < nk ? k0 + safe : nk;
    for (int64_t k = k0; k < k1; ++k, codes += ldc) {
      I c[NV];
      for (int j = 0; j < NV; ++j) c[j] = I::load(codes + j * I::W * 4);
      for (int m = 0; m < M; ++m) {
        const I w = I::fill(words[m * ldw + k]);
        for (int j = 0; j < NV; ++j)
          part[m][j] = UNSIGNED ? I::dot16(part[m][j], w, c[j]) : I::dot16(part[m][j], c[j], w);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) acc[m][j] = I::widen(acc[m][j], part[m][j]);
  }
#endif
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j].store(out + m * ldo + j * I::W);
}

// lanes: a multiple of 16.
template <int MAXCODE, int M, bool UNSIGNED>
inline void dot4(const uint8_t* codes, int64_t ldc, int64_t lanes, int64_t nk, const int32_t* words, int64_t ldw,
                 int32_t* out, int64_t ldo) {
  // M * NV sums of the inner loop fill half of the 32 (AVX-512) or 16 (AVX2) registers; the rest holds codes and words.
  constexpr int NV = I::W / 4;
  int64_t l = 0;
  for (; l + NV * I::W <= lanes; l += NV * I::W)
    dot4_block<MAXCODE, M, NV, UNSIGNED>(codes + l * 4, ldc, nk, words, ldw, out + l, ldo);
  for (; l < lanes; l += I::W) dot4_block<MAXCODE, M, 1, UNSIGNED>(codes + l * 4, ldc, nk, words, ldw, out + l, ldo);
}

// x = step * (128^(n-1) d_0 + ... + d_(n-1)) with signed 7-bit digits: two carry 15 bits (enough for 16-bit queries, whose
// own rounding is larger), three carry 22 (fp32 queries). One digit is an unsigned byte: 8 bits, for x >= 0.
template <int N>
struct Digits {
  static constexpr float top = N == 1 ? 255.0f : N == 2 ? 127.0f * 128 : 127.0f * 128 * 128;
  // Sums of digit * code are joined to one number per lane. Of two digits as integers: below 2^24 for codes of 2 and 3 bits,
  // so exact in fp32, and off by less than a digit's own rounding for 4. Of three apart, each less its share of the offset.

  // x / step, |x / step| <= top
  static void split(F scaled, I* d) {
    I rest = I::from_float(scaled);
    for (int i = N - 1; i > 0; --i) {
      const I up = (rest + I::fill(64)).template sra<7>();
      d[i] = rest - up.template sll<7>();
      rest = up;
    }
    d[0] = rest;
  }
  // Sums of the digits, joined as far as `join` joins them. What it subtracts is the mean code times this.
  static void add_up(const I* d, float* mass) {
    if constexpr (N == 2)
      mass[0] = (d[0].template sll<7>() + d[1]).to_float().fold_sum();
    else
      for (int i = 0; i < N; ++i) mass[i] = d[i].to_float().fold_sum();
  }
  static F join(const int32_t* sums, int64_t ld, const float* offset) {
    if constexpr (N == 2) {
      return (I::load(sums).template sll<7>() + I::load(sums + ld)).to_float() - F::fill(offset[0]);
    } else {
      F v = I::load(sums).to_float() - F::fill(offset[0]);
      for (int i = 1; i < N; ++i) v = fma(v, F::fill(128.0f), I::load(sums + i * ld).to_float() - F::fill(offset[i]));
      return v;
    }
  }
};

KK_END

#endif
