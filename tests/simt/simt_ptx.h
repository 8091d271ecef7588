// simt_ptx.h - host implementations of the functions that ptx.cuh wraps (same names, same arguments).
#pragma once
#include "simt.h"
namespace simt {
enum MmaKind { MMA_F16_16816, MMA_BF16_16816, MMA_TF32_1688, MMA_F16_1688, MMA_S8_16832, MMA_E4M3_16832 };
void ldmatrix(uint32_t* r, int n, bool trans, uint32_t addr, Site);
void stmatrix(const uint32_t* r, int n, bool trans, uint32_t addr, Site);
void mma(MmaKind, void* d, const uint32_t* a, const uint32_t* b, const void* c, Site);
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, Site);
void cp_async_commit(Site); void cp_async_wait(int n, Site);
enum WgmmaKind { WG_F16, WG_BF16 };
struct TensorMap { const void* base; int rank, esize, swizzle; uint64_t dim[5], stride[5]; uint32_t box[5]; };   // stands in for CUtensorMap
void mbar_init(uint32_t, int, Site); void mbar_arrive(uint32_t, int tx, Site); bool mbar_try_wait(uint32_t, int parity, Site);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, const TensorMap*, const int* crd, uint32_t mbar, Site);
void wgmma(WgmmaKind, int N, float* d, const uint32_t* a, uint64_t da, uint64_t db, bool scale, bool ta, bool tb, Site); void wgmma_commit(Site); void wgmma_wait(int n, Site);
}
namespace kk { namespace ptx {
using simt::Site;
inline uint32_t smem_u32(const void* p) { return simt::smem_addr(p); }
template <int N> inline void cp_async(uint32_t dst, const void* src, bool pred = true, Site s = Site::here()) { static_assert(N == 4 || N == 8 || N == 16, ""); simt::cp_async(dst, src, N, pred ? N : 0, s); }
inline void cp_async_commit(Site s = Site::here()) { simt::cp_async_commit(s); }
template <int N> inline void cp_async_wait(Site s = Site::here()) { simt::cp_async_wait(N, s); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, Site s = Site::here()) { simt::ldmatrix(r, 4, false, a, s); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t a, Site s = Site::here()) { simt::ldmatrix(r, 2, false, a, s); }
inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t a, Site s = Site::here()) { simt::ldmatrix(r, 1, false, a, s); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, Site s = Site::here()) { simt::ldmatrix(r, 4, true, a, s); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t a, Site s = Site::here()) { simt::ldmatrix(r, 2, true, a, s); }
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], Site s = Site::here()) { simt::mma(simt::MMA_F16_16816, d, a, b, c, s); }
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], Site s = Site::here()) { simt::mma(simt::MMA_BF16_16816, d, a, b, c, s); }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], Site s = Site::here()) { simt::mma(simt::MMA_TF32_1688, d, a, b, c, s); }
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4], Site s = Site::here()) { simt::mma(simt::MMA_S8_16832, d, a, b, c, s); }
inline float ex2(float x) { return exp2f(x); }
inline uint32_t cvt_tf32(float x) { uint32_t u = __float_as_uint(x); return (u + 0x1000u) & 0xffffe000u; }   // rna
template <uint32_t LUT> inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0; for (int i = 0; i < 8; i++) if (LUT >> i & 1) r |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c); return r; }
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) { return __byte_perm(a, b, s); }
inline uint32_t movmatrix_trans(uint32_t a, Site s = Site::here()) {   // lane 4g+c: elements 2c, 2c+1 of row g of the transpose = src[2c][g], src[2c+1][g]
  const unsigned lane = simt::lane_id(), g = lane / 4, c = lane % 4; uint32_t lo = a, hi = a;
  simt::shfl(simt::SHFL_IDX, 0xffffffffu, &lo, 4, (2 * c) * 4 + g / 2, 32, s); simt::shfl(simt::SHFL_IDX, 0xffffffffu, &hi, 4, (2 * c + 1) * 4 + g / 2, 32, s);
  const unsigned sh = 16 * (g % 2); return ((lo >> sh) & 0xffffu) | (((hi >> sh) & 0xffffu) << 16); }
inline void bar_sync(int id, int n, Site s = Site::here()) { simt::named_barrier(id, n, false, s); }
inline void bar_arrive(int id, int n, Site s = Site::here()) { simt::named_barrier(id, n, true, s); }
inline uint4 ld_global_nc_v4(const void* p, Site s = Site::here()) { return __ldg(static_cast<const uint4*>(p), s); }
inline int ld_acquire(const int* p, Site s = Site::here()) { return simt_rmw(const_cast<int*>(p), [](int o) { return o; }, s); }
// ---- Hopper
using TensorMap = simt::TensorMap;
inline void mbar_init(uint32_t a, int n, Site s = Site::here()) { simt::mbar_init(a, n, s); }
inline void mbar_fence_init() {} inline void fence_proxy_async() {} inline void wgmma_fence() {}
inline void mbar_expect_tx(uint32_t a, uint32_t bytes, Site s = Site::here()) { simt::mbar_arrive(a, (int)bytes, s); }
inline void mbar_arrive(uint32_t a, Site s = Site::here()) { simt::mbar_arrive(a, 0, s); }
inline void mbar_wait(uint32_t a, int parity, Site s = Site::here()) { while (!simt::mbar_try_wait(a, parity, s)) {} }
inline void tma_load_2d(uint32_t dst, const TensorMap* tm, int c0, int c1, uint32_t mbar, Site s = Site::here()) { int c[2] = {c0, c1}; simt::bulk_load(dst, nullptr, 0, tm, c, mbar, s); }
inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar, Site s = Site::here()) { simt::bulk_load(dst, src, bytes, nullptr, nullptr, mbar, s); }
inline void wgmma_m64n64k16_f16(float (&d)[32], uint64_t da, uint64_t db, int scale_d, Site s = Site::here()) { simt::wgmma(simt::WG_F16, 64, d, nullptr, da, db, scale_d != 0, false, false, s); }
inline void wgmma_commit(Site s = Site::here()) { simt::wgmma_commit(s); }
template <int N> inline void wgmma_wait(Site s = Site::here()) { simt::wgmma_wait(N, s); }
}}
