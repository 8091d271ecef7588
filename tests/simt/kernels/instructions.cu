// Single instructions, registers in and out as they are.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "selftest.h"

namespace selftest {
namespace {

template <bool bf16>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rc[4], rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i], rc[i] = c[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  if constexpr (bf16)
    kk::ptx::mma_m16n8k16_bf16(rd, ra, rb, rc);
  else
    kk::ptx::mma_m16n8k16_f16(rd, ra, rb, rc);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  float ra[4], rb[2], rc[4], rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i], rc[i] = c[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  kk::ptx::mma_m16n8k8_tf32(rd, ra, rb, rc);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}

__global__ void tf32_kernel(const float* in, float* out) { out[threadIdx.x] = kk::ptx::tf32(in[threadIdx.x]); }

template <bool transposed>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  KK_SHARED(uint16_t, rows, [32][8]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane][i] = in[lane * 8 + i];
  __syncthreads();
  uint32_t r[4];
  if constexpr (transposed)
    kk::ptx::ldmatrix_x4_trans(r, kk::ptx::smem_u32(rows[lane]));
  else
    kk::ptx::ldmatrix_x4(r, kk::ptx::smem_u32(rows[lane]));
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

__global__ void movmatrix_kernel(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = kk::ptx::movmatrix_trans(in[threadIdx.x]);
}

}  // namespace

void mma(bool bf16, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  kk::cuda::launch(bf16 ? mma_kernel<true> : mma_kernel<false>, 1, 32, 0, nullptr, a, b, c, d);
}
void mma_tf32(const float* a, const float* b, const float* c, float* d) {
  kk::cuda::launch(mma_tf32_kernel, 1, 32, 0, nullptr, a, b, c, d);
}
void tf32(const float* in, float* out) { kk::cuda::launch(tf32_kernel, 1, 32, 0, nullptr, in, out); }
void ldmatrix(bool transposed, const uint16_t* in, uint32_t* out) {
  kk::cuda::launch(transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, 1, 32, 0, nullptr, in, out);
}
void movmatrix(const uint32_t* in, uint32_t* out) { kk::cuda::launch(movmatrix_kernel, 1, 32, 0, nullptr, in, out); }

}  // namespace selftest
