// Rows of the delta rule's inputs, one number or eight, and which tokens a sequence has.
#pragma once
#include "cuda/rows.cuh"
#include "kvkernels/delta.h"

namespace kk::cuda {

__device__ __forceinline__ float read_number(DType type, const void* p, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == DType::bf16 ? bf16_to_float(h) : __half2float(__ushort_as_half(h));
}
__device__ __forceinline__ void write_number(DType type, void* p, int64_t i, float x) {
  if (type == DType::f32) {
    static_cast<float*>(p)[i] = x;
  } else {
    static_cast<uint16_t*>(p)[i] = type == DType::bf16 ? float_to_bf16(x) : __half_as_ushort(__float2half_rn(x));
  }
}

struct DeltaRow {
  const void* p;
  DType type;
  __device__ __forceinline__ float operator[](int64_t i) const { return read_number(type, p, i); }
};
// Not to be asked of rows that were not given.
__device__ __forceinline__ DeltaRow row_of(const DeltaRows& r, int64_t b, int64_t t, int64_t head) {
  const int64_t at = b * r.batch + t * r.token + head * r.head;
  return {static_cast<const uint8_t*>(r.p) + at * (r.dtype == DType::f32 ? 4 : 2), r.dtype};
}

// 8 neighbours of a row from channel c on, zeros past `width`.
__device__ __forceinline__ void read8(const DeltaRow& row, int c, int width, float (&x)[8]) {
  const int bytes = row.type == DType::f32 ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(row.p) + static_cast<int64_t>(c) * bytes;
  if (c + 8 <= width && reinterpret_cast<uintptr_t>(from) % 16 == 0) return load8(row.type, from, true, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = c + i < width ? row[c + i] : 0.0f;
}

// Two neighbours of a row, read at once where they are a unit of memory; zero past `width`.
__device__ __forceinline__ float2 read2(const DeltaRow& row, int c, int width) {
  const int bytes = row.type == DType::f32 ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(row.p) + static_cast<int64_t>(c) * bytes;
  if (c + 2 > width || reinterpret_cast<uintptr_t>(from) % (2 * bytes) != 0)
    return make_float2(c < width ? row[c] : 0.0f, c + 1 < width ? row[c + 1] : 0.0f);
  if (row.type == DType::f32) return *reinterpret_cast<const float2*>(from);
  const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
  const uint16_t halves[2] = {static_cast<uint16_t>(both), static_cast<uint16_t>(both >> 16)};
  return make_float2(read_number(row.type, halves, 0), read_number(row.type, halves, 1));
}
// The same for writing numbers i and i + 1 of an array; the second one only if `both`.
__device__ __forceinline__ void write2(DType type, void* p, int64_t i, float x, float y, bool both) {
  const int bytes = type == DType::f32 ? 4 : 2;
  uint8_t* to = static_cast<uint8_t*>(p) + i * bytes;
  if (!both || reinterpret_cast<uintptr_t>(to) % (2 * bytes) != 0) {
    write_number(type, p, i, x);
    if (both) write_number(type, p, i + 1, y);
  } else if (type == DType::f32) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
  } else {
    uint16_t halves[2];
    write_number(type, halves, 0, x);
    write_number(type, halves, 1, y);
    *reinterpret_cast<uint32_t*>(to) = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

// Tokens [begin, end) of batch row b.
struct DeltaSequence {
  int64_t b, begin, end;
};
__device__ __forceinline__ DeltaSequence sequence_of(const DeltaInputs& p, int64_t n) {
  if (p.cu_seqlens) return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1]};
  return {n, 0, p.T};
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(kWholeWarp, x, h);
  return x;
}
__device__ __forceinline__ float row_squares(const DeltaRow& row, int width) {
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < width; c += 32) sum = fmaf(row[c], row[c], sum);
  return sum_of_warp(sum);
}

// 1 / norm of a row, from the sum of its squares.
__device__ __forceinline__ float l2norm_factor(float sum) { return 1.0f / sqrtf(sum + kL2NormEps); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// beta as the formulas have it, from beta as it was given and the sum of the squares of k after its norm.
__device__ __forceinline__ float beta_value(BetaRule rule, float given, float k_squares) {
  if (rule == BetaRule::raw) return given;
  if (rule == BetaRule::kaczmarz) return given / (k_squares + kKaczmarzEps);
  return (rule == BetaRule::sigmoid2 ? 2.0f : 1.0f) * sigmoid(given);
}

}  // namespace kk::cuda
