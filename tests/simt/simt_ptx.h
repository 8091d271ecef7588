// The functions of csrc/cuda/ptx.cuh, on the host: the same names, the same arguments.
#pragma once
#include "simt.h"

namespace simt {
// r[i] of every lane: its part of matrix i.
void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t address, Site);
uint32_t movmatrix(uint32_t a, Site);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site);
void mma_tf32(float* d, const float* a, const float* b, const float* c, Site);
// bytes go to dst: the first src_bytes from src, then zeros.
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, Site);
void cp_async_commit();
void cp_async_wait(int groups_left);
}  // namespace simt

namespace kk::ptx {

inline uint32_t smem_u32(const void* p) { return simt::smem_addr(p); }

template <int N>
inline void cp_async(uint32_t dst, const void* src, bool pred = true, SIMT_SITE) {
  static_assert(N == 4 || N == 8 || N == 16);
  simt::cp_async(dst, src, N, pred ? N : 0, site);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  simt::cp_async_wait(N);
}

inline void prefetch_l2(const void*) {}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, SIMT_SITE) { simt::ldmatrix(r, 4, false, address, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, SIMT_SITE) {
  simt::ldmatrix(r, 4, true, address, site);
}
inline uint32_t movmatrix_trans(uint32_t a, SIMT_SITE) { return simt::movmatrix(a, site); }
inline int opaque(int x) { return x; }

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             SIMT_SITE) {
  simt::mma_f16(d, a, b, c, site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                              SIMT_SITE) {
  simt::mma_bf16(d, a, b, c, site);
}

inline float tf32(float x) {
  // Infinities and NaN: the low bits of a NaN may be all that it has, so nothing is added or taken away.
  const uint32_t u = simt::bits<uint32_t>(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : simt::bits<float>((u + 0x1000u) & ~0x1fffu);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], const float (&c)[4], SIMT_SITE) {
  simt::mma_tf32(d, a, b, c, site);
}

inline float ex2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz
}

}  // namespace kk::ptx
