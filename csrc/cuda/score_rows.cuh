// q.k of 16 query rows and 8 records at once, by a warp and mma.m16n8k16: what score_pages and score_tokens have in common.
//
// Rows are the query rows of a KV head, 16 a tile; columns are records or tokens. Lane 4 g + t brings channels of column g
// as pairs of bf16, in runs of 4 S channels:
//   step s of a unit of 16 S channels: lane t of the quad has channels t * 4 S + 4 s ... + 3
// Numbers that are no bf16 are sums of up to three (digits), each multiplied exactly. The tensor cores sum in fp32.
#pragma once
#include "cuda/rows.cuh"
#include "kvkernels/score.h"

namespace kk::cuda {

constexpr int kTileRows = 16, kColumns = 8;
constexpr int kScoreWarps = 4, kScoreThreads = 32 * kScoreWarps;
constexpr int kWarpItems = 32, kBlockItems = kScoreWarps * kWarpItems;

// ---- rows

struct ScoreRows {
  int group, rows;  // query heads of a KV head, rows of it
  bool vector;
  explicit ScoreRows(const ScoreCommon& p)
      : group(static_cast<int>(p.Hq / p.Hkv)),
        rows(static_cast<int>(p.Tq * group)),
        vector(aligned16(p.q, p.q_batch * element_bytes(p.dtype), p.q_token * element_bytes(p.dtype),
                         p.q_head * element_bytes(p.dtype))) {}

  __device__ int64_t at(const ScoreCommon& p, int64_t b, int h, int row) const {
    return b * p.q_batch + row / group * p.q_token + (static_cast<int64_t>(h) * group + row % group) * p.q_head;
  }
  __device__ float element(const ScoreCommon& p, int64_t b, int h, int row, int64_t c) const {
    if (row >= rows) return 0.0f;
    const int64_t i = at(p, b, h, row) + c;
    if (p.dtype == DType::f32) return static_cast<const float*>(p.q)[i];
    const uint16_t x = static_cast<const uint16_t*>(p.q)[i];
    return p.dtype == DType::f16 ? f16_to_float(x) : bf16_to_float(x);
  }
  // Channels c ... c + 7 of a row; zeros for rows that are none.
  __device__ void load(const ScoreCommon& p, int64_t b, int h, int row, int64_t c, float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    if (row >= rows || c >= p.D) return;
    const int64_t at = this->at(p, b, h, row) + c;
    load8(p.dtype, static_cast<const uint8_t*>(p.q) + at * (p.dtype == DType::f32 ? 4 : 2), vector, x);
  }
};

// ---- digits

// The next bf16 of x and of y, which keep the rest: 8 bits are cut off, so that three times takes all of fp32. What is not
// finite leaves NaN for those after the first, which Sums::value() ignores then.
__device__ __forceinline__ uint32_t cut_digits(float& x, float& y) {
  const uint32_t a = float_bits(x), b = float_bits(y);
  x -= bits_float(a & 0xffff0000u);
  y -= bits_float(b & 0xffff0000u);
  return __byte_perm(a, b, 0x7632);
}

// Digits of query rows as they come.
inline int digits_of(DType type) { return type == DType::bf16 ? 1 : type == DType::f16 ? 2 : 3; }

// ---- queries in shared memory, as mma wants them: [digit][step][lane] of four registers

struct QueryTile {
  uint4* data;
  int digits, steps, run;  // run: S

  KK_HD static int64_t bytes(int digits, int steps) { return int64_t{digits} * steps * 32 * 16; }

  // Channels c ... c + 7 of a row of the tile, counted from first_step on; x is overwritten.
  __device__ __forceinline__ void put(int first_step, int row, int c, float (&x)[8]) const {
    uint32_t* words = reinterpret_cast<uint32_t*>(data);
    for (int d = 0; d < digits; ++d) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const int group = (c + i) / 4, step = first_step + group / (4 * run) * run + group % run;
        const int lane = row % 8 * 4 + group / run % 4, at = ((d * steps + step) * 32 + lane) * 4 + row / 8;
        words[at] = cut_digits(x[i], x[i + 1]);
        words[at + 2] = cut_digits(x[i + 2], x[i + 3]);
      }
    }
  }
};

// Products of first digits are summed apart: where they are not finite the others mean nothing (0 * inf).
struct Sums {
  float high[4] = {}, low[4] = {};

  // value(i) belongs to row g + 8 (i / 2) and column 2 t + i % 2.
  __device__ float value(int i) const { return fabsf(high[i]) <= 3.4028235e38f ? high[i] + low[i] : high[i]; }
};

// A step of T times 8 columns; b: their digits.
template <int T, int N>
__device__ __forceinline__ void multiply(const QueryTile& q, int step, const uint32_t (&b)[T][N][2], Sums (&sums)[T]) {
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (d >= q.digits) break;
    const uint4 v = q.data[(d * q.steps + step) * 32 + threadIdx.x % 32];
    const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int t = 0; t < T; ++t) {
        float (&c)[4] = d + n == 0 ? sums[t].high : sums[t].low;
        ptx::mma_m16n8k16_bf16(c, a, b[t][n], c);
      }
  }
}

// ---- codes to pairs of bf16

__device__ __forceinline__ uint32_t add_bf16(uint32_t a, uint32_t b) {
  __nv_bfloat162 x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  const __nv_bfloat162 sum = __hfma2(x, __float2bfloat162_rn(1.0f), y);
  uint32_t w;
  memcpy(&w, &sum, 4);
  return w;
}

// Signed bytes 0 and 2 of w: 128 + the low seven bits, less 128, or 256 of a negative one. bf16 has 8 bits.
__device__ __forceinline__ uint32_t signed_bytes(uint32_t w) {
  return add_bf16((w & 0x007f007fu) | 0x43004300u, (w & 0x00800080u) | 0xc300c300u);
}

// {low half of a, low half of b}, and the high halves.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// ---- results

__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ bool keeps_max(Reduce r) { return r == Reduce::max || r == Reduce::softmax_max; }
inline bool is_softmax(Reduce r) { return r == Reduce::softmax_max || r == Reduce::softmax_sum; }

// Steps of a warp whose items begin at `own`, of `each` items.
__device__ __forceinline__ int steps_of(uint32_t own, uint32_t count, int each) {
  return own < count ? (static_cast<int>(min(uint32_t{kWarpItems}, count - own)) + each - 1) / each : 0;
}

// Where scores go: kept for each row (what a softmax or a page's best token needs), or reduced over the rows.
struct ScoreSink {
  float* kept;  // [B * Hkv * rows][items] or null
  float* out;   // [B * Hkv][items]
  uint32_t items;
  Reduce reduce;

  __device__ float combine(float a, float b) const { return keeps_max(reduce) ? max_or_nan(a, b) : a + b; }

  // Items [first, end) that a sequence does not have.
  __device__ __forceinline__ void fill_behind(int64_t head, uint32_t first, uint32_t end, uint32_t count) const {
    if (kept) return;
    for (uint32_t i = max(first, count) + threadIdx.x; i < min(end, items); i += kScoreThreads)
      out[head * items + i] = -INFINITY;
  }

  // x[i] as Sums::value(i), of rows `tile` ... and items own + at ... + 7, of which those below count are there; by a warp.
  // What is not kept waits in `columns` for put_columns().
  __device__ __forceinline__ void put(int64_t head, int rows, int tile, uint32_t own, int at, uint32_t count,
                                      const float (&x)[4], float (&columns)[8][kWarpItems]) const {
    const int g = threadIdx.x % 32 / 4, row = tile + g, column = threadIdx.x % 4 * 2;
    if (!kept) {
      const float none = keeps_max(reduce) ? -INFINITY : 0.0f;
      float y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) y[i] = combine(row < rows ? x[i] : none, row + 8 < rows ? x[2 + i] : none);
      *reinterpret_cast<float2*>(&columns[g][at + column]) = make_float2(y[0], y[1]);
      return;
    }
    float* to = kept + (head * rows + row) * items + own + at + column;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i / 2 * 8 < rows && own + at + column + i % 2 < count) to[int64_t{i / 2 * 8} * items + i % 2] = x[i];
  }

  // After the steps of a warp.
  __device__ __forceinline__ void put_columns(int64_t head, int tile, uint32_t own, uint32_t count,
                                              const float (&columns)[8][kWarpItems]) const {
    if (kept) return;
    const uint32_t lane = threadIdx.x % 32;
    __syncwarp();
    if (own + lane < count) {
      float y = columns[0][lane];
#pragma unroll
      for (int g = 1; g < 8; ++g) y = combine(y, columns[g][lane]);
      float* to = out + head * items + own + lane;
      *to = tile == 0 ? y : combine(*to, y);
    }
    __syncwarp();
  }
};

}  // namespace kk::cuda
