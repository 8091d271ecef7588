// Rows of numbers against query rows in fp32: scores and weighted sums of a chunk of tokens, for formats whose elements
// turn into floats in one or two instructions. K and V are read once for a block of query rows.
#pragma once
#include "cpu/simd.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

constexpr int kChunk = 128;  // most tokens between two softmax updates: packed formats, whose chunk is 8 KB at 2 bits
constexpr int kRowChunk =
    64;  // formats read as rows: a chunk of 16-bit K or V is 16 KB, and the next one is on its way too
constexpr int kTile = 16;  // packed formats are read by tiles; pages of them are multiples of it

// load(c, i): the F::W channels from i of token c. load.ahead(c, i): asks for the same place one chunk later, once per kLine
// channels. The page table says where that is; the processor's own prefetcher does not, and stops at every 4 KB besides.
struct LoadBf16 {
  static constexpr int kLine = 32;
  const uint8_t* const* rows;
  const uint8_t* const* next;
  F operator()(int c, int64_t i) const { return F::load_bf16(reinterpret_cast<const uint16_t*>(rows[c]) + i); }
  void ahead(int c, int64_t i) const { __builtin_prefetch(next[c] + i * 2, 0, 3); }
};
struct LoadF16 {
  static constexpr int kLine = 32;
  const uint8_t* const* rows;
  const uint8_t* const* next;
  F operator()(int c, int64_t i) const { return F::load_f16(reinterpret_cast<const uint16_t*>(rows[c]) + i); }
  void ahead(int c, int64_t i) const { __builtin_prefetch(next[c] + i * 2, 0, 3); }
};
struct LoadU8 {  // levels in units of the scale
  static constexpr int kLine = 64;
  const uint8_t* const* rows;
  const uint8_t* const* next;
  F operator()(int c, int64_t i) const { return F::load_u8(rows[c] + i) - F::fill(127.5f); }
  void ahead(int c, int64_t i) const { __builtin_prefetch(next[c] + i, 0, 3); }
};
struct LoadCode2 {  // codes of kivi2 keys, whose scale and zero point are of the channel: they go to the query
  static constexpr int kLine = 256;
  const uint8_t* rows;
  int64_t stride;
  F operator()(int c, int64_t i) const { return F::load_u2(rows + c * stride + i / 4); }
  void ahead(int, int64_t) const {}  // 32 bytes a token at D = 128: left to the processor
};
struct LoadAffine2 {  // kivi2 values: zero + scale * code, both of the token and 32 channels
  static constexpr int kLine = 256;
  const uint8_t* const* rows;
  const float *scale, *zero;  // [token][groups]
  int64_t groups;
  F operator()(int c, int64_t i) const {
    const int64_t g = c * groups + i / 32;
    return fma(F::load_u2(rows[c] + i / 4), F::fill(scale[g]), F::fill(zero[g]));
  }
  void ahead(int, int64_t) const {}
};
struct LoadF32 {  // a buffer in L1
  static constexpr int kLine = 16;
  const float* rows;
  int64_t ld;
  F operator()(int c, int64_t i) const { return F::load(rows + c * ld + i); }
  void ahead(int, int64_t) const {}
};

// s[r][c0 + c] = q[r] . row c0 + c for c < F::W; what stands at tokens >= n means nothing.
template <int R, int64_t N, typename Load>
inline void row_scores_block(const Load& load, int c0, int n, const float* q, int64_t ldq, float* s) {
  constexpr int TG = kFold;  // R * TG accumulators
  F part[R][F::W / kFold];
  for (int r = 0; r < R; ++r)
    for (F& x : part[r]) x = F::zero();
  for (int c = 0; c < F::W && c0 + c < n; c += TG) {
    int token[TG];
    for (int t = 0; t < TG; ++t) token[t] = c0 + c + t < n ? c0 + c + t : n - 1;
    F acc[R][TG];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < TG; ++t) acc[r][t] = F::zero();
    for (int64_t i = 0; i < N; i += F::W) {
      F k[TG];
      for (int t = 0; t < TG; ++t) {
        k[t] = load(token[t], i);
        if (i % Load::kLine == 0) load.ahead(token[t], i);
      }
      for (int r = 0; r < R; ++r) {
        const F x = F::load(q + r * ldq + i);
        for (int t = 0; t < TG; ++t) acc[r][t] = fma(k[t], x, acc[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) part[r][c / TG] = fold(acc[r]);
  }
  for (int r = 0; r < R; ++r) sum_folded(part[r]).store(s + r * kChunk + c0);
}

// s [rows][kChunk]
template <int64_t N, typename Load>
inline void row_scores(const Load& load, int n, const float* q, int64_t ldq, int rows, float* s) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int c = 0; c < n; c += F::W) row_scores_block<4, N>(load, c, n, q + r * ldq, ldq, s + r * kChunk);
  for (; r < rows; ++r)
    for (int c = 0; c < n; c += F::W) row_scores_block<1, N>(load, c, n, q + r * ldq, ldq, s + r * kChunk);
}

#if defined(__AVX512F__)
// The same for bf16 keys and bf16 queries with the instruction made for it: products in pairs, summed in fp32. No object is
// compiled for processors that have it; being one instruction, it stands here by name, and callers ask has_avx512bf16().
template <int R, int64_t N>
inline void bf16_scores_block(const LoadBf16& load, int c0, int n, const uint16_t* q, F scale, float* s) {
  constexpr int TG = kFold;
  F part[R][F::W / kFold];
  for (int r = 0; r < R; ++r)
    for (F& x : part[r]) x = F::zero();
  for (int c = 0; c < F::W && c0 + c < n; c += TG) {
    int token[TG];
    for (int t = 0; t < TG; ++t) token[t] = c0 + c + t < n ? c0 + c + t : n - 1;
    __m512 acc[R][TG];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < TG; ++t) acc[r][t] = _mm512_setzero_ps();
    for (int64_t i = 0; i < N; i += 32) {
      const __mmask32 some = N - i >= 32 ? 0xffffffffu : 0xffffu;  // head dims are multiples of 16
      __m512i k[TG];
      for (int t = 0; t < TG; ++t) {
        k[t] = _mm512_maskz_loadu_epi16(some, load.rows[token[t]] + i * 2);
        load.ahead(token[t], i);
      }
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_maskz_loadu_epi16(some, q + r * N + i);
        for (int t = 0; t < TG; ++t) asm("vdpbf16ps %2, %1, %0" : "+v"(acc[r][t]) : "v"(k[t]), "v"(x));
      }
    }
    for (int r = 0; r < R; ++r) {
      const F sums[TG] = {acc[r][0], acc[r][1], acc[r][2], acc[r][3]};
      part[r][c / TG] = fold(sums);
    }
  }
  for (int r = 0; r < R; ++r) (sum_folded(part[r]) * scale).store(s + r * kChunk + c0);
}

// s[r][c] = scale * q[r] . row c, q bf16 [rows][N]
template <int64_t N>
inline void bf16_scores(const LoadBf16& load, int n, const uint16_t* q, float scale, int rows, float* s) {
  const F f = F::fill(scale);
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int c = 0; c < n; c += F::W) bf16_scores_block<4, N>(load, c, n, q + r * N, f, s + r * kChunk);
  for (; r < rows; ++r)
    for (int c = 0; c < n; c += F::W) bf16_scores_block<1, N>(load, c, n, q + r * N, f, s + r * kChunk);
}
#endif

template <int R, int NV, typename Load>
inline void row_accumulate_block(const Load& load, int n, int64_t i, const float* p, float* acc, int64_t lda) {
  F a[R][NV];  // a chunk's sum is made apart and added once: the rounding error grows with chunks, not with tokens
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) a[r][j] = F::zero();
  for (int c = 0; c < n; ++c) {
    F v[NV];
    for (int j = 0; j < NV; ++j) {
      v[j] = load(c, i + j * F::W);
      if (j * F::W % Load::kLine == 0) load.ahead(c, i + j * F::W);
    }
    for (int r = 0; r < R; ++r) {
      const F w = F::fill(p[r * kChunk + c]);
      for (int j = 0; j < NV; ++j) a[r][j] = fma(w, v[j], a[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) {
      float* o = acc + r * lda + i + j * F::W;
      (F::load(o) + a[r][j]).store(o);
    }
}

// acc[r][i] += sum over c < n of p[r][c] * row c [i], i < N
template <int64_t N, typename Load>
inline void row_accumulate(const Load& load, int n, const float* p, int rows, float* acc, int64_t lda) {
  constexpr int NV = F::W == 16 ? 4 : 2;
  constexpr int64_t wide = N / (NV * F::W) * (NV * F::W);
  const auto block = [&](auto R, int r) {
    constexpr int kR = decltype(R)::value;
    for (int64_t i = 0; i < wide; i += NV * F::W)
      row_accumulate_block<kR, NV>(load, n, i, p + r * kChunk, acc + r * lda, lda);
    for (int64_t i = wide; i < N; i += F::W)
      row_accumulate_block<kR, 1>(load, n, i, p + r * kChunk, acc + r * lda, lda);
  };
  int r = 0;
  for (; r + 4 <= rows; r += 4) block(Int<4>{}, r);
  for (; r < rows; ++r) block(Int<1>{}, r);
}

KK_END
