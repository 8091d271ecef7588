// A 64x64 tile of q k^T per block on the tensor cores, rows of 64 halves swizzled in shared memory.
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "selftest.h"

namespace selftest {
namespace {

// Chunks of 16 bytes; the exclusive or spreads a column of chunks over all banks.
__device__ int chunk_at(int row, int chunk) { return row * 64 + (chunk ^ (row & 7)) * 8; }

template <Bug bug>
__global__ void __launch_bounds__(128) scores_kernel(const uint16_t* q, const uint16_t* k, float* s, int m, int n) {
  KK_SHARED(uint16_t, tile_q, [64 * 64]);
  KK_SHARED(uint16_t, tile_k, [64 * 64]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    const int row = i / 8, chunk = i % 8;
    const bool valid_q = m0 + row < m, valid_k = n0 + row < n;
    kk::ptx::cp_async<16>(kk::ptx::smem_u32(&tile_q[chunk_at(row, chunk)]),
                          q + (valid_q ? m0 + row : 0) * 64 + chunk * 8, valid_q);
    kk::ptx::cp_async<16>(kk::ptx::smem_u32(&tile_k[chunk_at(row, chunk)]),
                          k + (valid_k ? n0 + row : 0) * 64 + chunk * 8, valid_k);
  }
  kk::ptx::cp_async_commit();
  if (bug != Bug::mma_no_wait) kk::ptx::cp_async_wait<0>();
  if (bug != Bug::mma_no_barrier) __syncthreads();

  float acc[8][4] = {};
  for (int step = 0; step < 4; ++step) {  // 16 channels
    uint32_t a[4];
    const bool swapped = bug == Bug::ldmatrix_order;
    const int row_a = warp * 16 + lane % 8 + (swapped ? lane / 16 : lane / 8 % 2) * 8;
    const int chunk_a = step * 2 + (swapped ? lane / 8 % 2 : lane / 16);
    kk::ptx::ldmatrix_x4(a, kk::ptx::smem_u32(&tile_q[chunk_at(row_a, chunk_a)]));
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      const int row_b = j * 16 + lane % 8 + lane / 16 * 8, chunk_b = step * 2 + lane / 8 % 2;
      kk::ptx::ldmatrix_x4(b, kk::ptx::smem_u32(&tile_k[chunk_at(row_b, chunk_b)]));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      kk::ptx::mma_m16n8k16_f16(acc[2 * j], a, b0, acc[2 * j]);
      kk::ptx::mma_m16n8k16_f16(acc[2 * j + 1], a, b1, acc[2 * j + 1]);
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const bool wrong = bug == Bug::accumulator_layout;
      const int row = m0 + warp * 16 + lane / 4 + 8 * (wrong ? i % 2 : i / 2);
      const int column = n0 + j * 8 + lane % 4 * 2 + (wrong ? i / 2 : i % 2);
      const int rows = bug == Bug::row_past_end ? m + 1 : m;
      if (row < rows && column < n) s[static_cast<size_t>(row) * n + column] = acc[j][i];
    }
}

}  // namespace

void scores(const uint16_t* q, const uint16_t* k, float* s, int m, int n, Bug bug) {
  plant<Bug::none, Bug::mma_no_barrier, Bug::ldmatrix_order, Bug::mma_no_wait, Bug::accumulator_layout,
        Bug::row_past_end>(bug, [&](auto planted) {
    kk::cuda::launch(scores_kernel<planted.bug>, dim3((n + 63) / 64, (m + 63) / 64), 128, 0, nullptr, q, k, s, m, n);
  });
}

}  // namespace selftest
