// Rows of numbers across the lanes of a warp. A lane holds 8 neighbours: 16-bit numbers move 16 bytes at a time.
//   lane i of a row: channels 8 i .. 8 i + 7       a row of 8 L channels takes L lanes, a warp holds 32 / L rows
#pragma once
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "kvkernels/core/half.h"
#include "kvkernels/pool.h"

namespace kk::cuda {

constexpr int kPerLane = 8;
constexpr unsigned kWholeWarp = 0xffffffffu;

inline int64_t element_bytes(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// May 16 bytes be read at once at p and any multiples of the strides (in bytes) from it?
template <typename... Strides>
inline bool aligned16(const void* p, Strides... strides) {
  return ((reinterpret_cast<uintptr_t>(p) | ... | static_cast<uintptr_t>(strides)) % 16) == 0;
}

// Pages are read and written 16 bytes at a time. Strides in bytes.
inline void require_aligned16(const std::string& name, const uint8_t* data, int64_t page, int64_t head, int64_t token) {
  if (aligned16(data, page, head, token)) return;
  const auto text = [](int64_t x) { return std::to_string(x); };
  fail((name + ": on CUDA the address and all strides must be multiples of 16 bytes; got an address of 16 n + " +
        text(reinterpret_cast<uintptr_t>(data) % 16) + " and strides of " + text(page) + ", " + text(head) + " and " +
        text(token) + " bytes")
           .c_str());
}

// ---- 8 numbers of a tensor <-> fp32

// The hardware converts 16-bit numbers, but its NaN has bits of its own: where there is one, core/half.h decides.
template <DType T>
__device__ __forceinline__ void widen(const uint32_t (&w)[4], float (&x)[8]) {
  if constexpr (T == DType::bf16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = bits_float(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
  } else {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)))));
      nan |= x[i] != x[i];
    }
    if (nan) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = f16_to_float(static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2))));
    }
  }
}

template <DType T>
__device__ __forceinline__ void narrow(const float (&x)[8], uint32_t (&w)[4]) {
  bool nan = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) nan |= x[i] != x[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    if constexpr (T == DType::bf16) {
      const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
      memcpy(&w[i], &h, 4);
      if (nan) w[i] = float_to_bf16(a) | static_cast<uint32_t>(float_to_bf16(b)) << 16;
    } else {
      const __half2 h = __floats2half2_rn(a, b);
      memcpy(&w[i], &h, 4);
      if (nan) w[i] = float_to_f16(a) | static_cast<uint32_t>(float_to_f16(b)) << 16;
    }
  }
}

// `vector`: p is 16-byte aligned and there are 8 numbers; else there are n of them, and zeros are loaded for the rest.
template <DType T>
__device__ __forceinline__ void load8(const void* p, bool vector, float (&x)[8], int64_t n = 8) {
  if constexpr (T == DType::f32) {
    const float* f = static_cast<const float*>(p);
    if (vector) {
      const float4 a = *reinterpret_cast<const float4*>(f), b = *reinterpret_cast<const float4*>(f + 4);
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i < n ? f[i] : 0.0f;
    }
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p);
    uint32_t w[4];
    if (vector) {
      const uint4 v = *reinterpret_cast<const uint4*>(h);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t half = i < n ? h[i] : 0;
        w[i / 2] = i % 2 ? w[i / 2] | half << 16 : half;
      }
    }
    widen<T>(w, x);
  }
}

template <DType T>
__device__ __forceinline__ void store8(const float (&x)[8], bool vector, void* p, int64_t n = 8) {
  if constexpr (T == DType::f32) {
    float* f = static_cast<float*>(p);
    if (vector) {
      *reinterpret_cast<float4*>(f) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(f + 4) = make_float4(x[4], x[5], x[6], x[7]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < n) f[i] = x[i];
    }
  } else {
    uint16_t* h = static_cast<uint16_t*>(p);
    uint32_t w[4];
    narrow<T>(x, w);
    if (vector) {
      *reinterpret_cast<uint4*>(h) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < n) h[i] = static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)));
    }
  }
}

// The same with the type at run time: one branch, alike for all lanes.
__device__ __forceinline__ void load8(DType type, const void* p, bool vector, float (&x)[8]) {
  if (type == DType::f32) return load8<DType::f32>(p, vector, x);
  if (type == DType::f16) return load8<DType::f16>(p, vector, x);
  load8<DType::bf16>(p, vector, x);
}
__device__ __forceinline__ void store8(DType type, const float (&x)[8], bool vector, void* p) {
  if (type == DType::f32) return store8<DType::f32>(x, vector, p);
  if (type == DType::f16) return store8<DType::f16>(x, vector, p);
  store8<DType::bf16>(x, vector, p);
}

// ---- across lanes

// The stage of H whose pairs are h lanes apart.
template <typename Real>
__device__ __forceinline__ void hadamard_stage(Real (&x)[8], int h) {
  const Real sign = threadIdx.x & h ? Real(-1) : Real(1);  // the upper lane of a pair keeps a - b
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = sign * x[i] + __shfl_xor_sync(kWholeWarp, x[i], h);  // exact, fused or not
}

// H_n within every n channels, n a power of two up to 256. Stages from stride 1 upwards, as core/fwht.h has it: the
// same additions, hence the same bits. A warp calls it together.
template <typename Real>
__device__ __forceinline__ void hadamard(Real (&x)[8], int n) {
#pragma unroll
  for (int h = 1; h < 8; h *= 2)
    if (h < n) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (!(i & h)) {
          const Real a = x[i], b = x[i + h];
          x[i] = a + b;
          x[i + h] = a - b;
        }
    }
#pragma unroll
  for (int h = 1; h < 32; h *= 2)
    if (kPerLane * h < n) hadamard_stage(x, h);
}

// fold_sum of core/fwht.h over the 8 G numbers of G = 4, 8 or 16 neighbouring lanes; x is overwritten, all G lanes get the
// sum. Strides from half the row downwards, so lane bits come first. Of two lanes that add eight numbers to eight, each
// takes four, then two, then one: 7 shuffles for 3 lane bits, not 24. Lanes G/2, G/4 and G/8 apart then hold what
// registers 4, 2 and 1 apart held.
template <int G>
__device__ __forceinline__ float fold_sum(float (&x)[8]) {
  static_assert(G == 4 || G == 8 || G == 16);
  constexpr int kept =
      G == 4 ? 2 : 1;  // numbers of a lane, after as many exchanges as there are lane bits, up to three
#pragma unroll
  for (int n = 4, h = G / 2; n >= kept; n /= 2, h /= 2) {
    const bool upper = threadIdx.x & h;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? x[i] : x[i + n], keep = upper ? x[i + n] : x[i];
      x[i] = keep + __shfl_xor_sync(kWholeWarp, give, h);
    }
  }
  if constexpr (G == 16) x[0] += __shfl_xor_sync(kWholeWarp, x[0], 1);
#pragma unroll
  for (int h = G / 2; h > 0 && h >= G / 8; h /= 2)
#pragma unroll
    for (int i = 0; i < kept; ++i) x[i] += __shfl_xor_sync(kWholeWarp, x[i], h);
  if constexpr (G == 4) x[0] += x[1];
  return x[0];
}

// op over the values of G neighbouring lanes, in an order that must not matter.
template <typename Op>
__device__ __forceinline__ float fold_lanes(float x, int G, Op op) {
  for (int h = 1; h < G; h *= 2) x = op(x, __shfl_xor_sync(kWholeWarp, x, h));
  return x;
}

// Is `flag` set in any of the G < 32 neighbouring lanes that this one belongs to?
template <int G>
__device__ __forceinline__ bool any_lane(bool flag) {
  return __ballot_sync(kWholeWarp, flag) >> (threadIdx.x % 32 / G * G) & ((1u << G) - 1u);
}

}  // namespace kk::cuda
