// One mechanism per kernel.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "selftest.h"

namespace selftest {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// A warp exchanges numbers through shared memory.
template <Bug bug>
__global__ void reverse_warps_kernel(const float* in, float* out) {
  KK_SHARED(float, s, [4][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * 128 + threadIdx.x;
  s[warp][lane] = in[i];
  if (bug == Bug::split_syncwarp)
    __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  else if (bug != Bug::no_syncwarp)
    __syncwarp();
  out[i] = s[warp][31 - lane];
}

// The block that finishes last adds the sums of all.
template <Bug bug>
__global__ void sum_kernel(const float* in, float* partial, unsigned* counter, float* out, int n) {
  KK_SHARED(float, sums, [4]);
  float x = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) x += in[i];
  for (int o = 16; o > 0; o /= 2) x += __shfl_down_sync(kAll, x, o);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
  __threadfence();
  const bool last =
      bug == Bug::last_by_block_index ? blockIdx.x == gridDim.x - 1 : atomicAdd(counter, 1u) == gridDim.x - 1;
  if (!last) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  out[0] = total;
}

template <Bug bug>
__global__ void histogram_kernel(const int* in, int* out, int n) {
  KK_SHARED(int, bins, [16]);
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (bug == Bug::histogram_without_atomics)
      bins[in[i]] += 1;
    else
      atomicAdd(&bins[in[i]], 1);
  }
  __syncthreads();
  if (threadIdx.x < 16) out[threadIdx.x] = bins[threadIdx.x];
}

template <Bug bug>
__global__ void running_sums_kernel(const float* in, float* out, int n) {
  float local[8], s = 0;
  for (int i = 0; i < 8; ++i) local[i] = in[i] + threadIdx.x;
  for (int i = 0; i < (bug == Bug::local_overrun ? n + 1 : n); ++i) s += local[i];
  out[threadIdx.x] = s;
}

template <Bug bug>
__global__ void rotate_kernel(float* out, int n) {
  KK_SHARED(float, s, [128]);
  KK_SHARED(float, behind, [4]);
  const int i = threadIdx.x;
  if (bug == Bug::early_return && i >= n) return;
  if (i == 0) behind[0] = 7;
  s[i] = i;
  __syncthreads();
  if (i < n) out[i] = s[bug == Bug::shared_overrun ? i + 1 : (i + 1) % n];
}

__global__ void reverse_block_kernel(float* out) {
  KK_DYN_SMEM(float, s);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

__global__ void handshake_kernel(int* flag, int* out) {
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    out[0] = 42;
    __threadfence();
    atomicExch(flag, 1);
  }
  if (blockIdx.x == 0) return;
  if (threadIdx.x == 0)
    while (atomicAdd(flag, 0) == 0) __nanosleep(100);
  __syncthreads();
  if (threadIdx.x == 0) out[1] = out[0] + 1;
}

template <Bug bug>
__global__ void count_up_kernel(float* io, int n) {
  const int i = 2 * threadIdx.x;
  if (i + 1 >= n) return;
  const int at = bug == Bug::misaligned ? i + 1 : i;
  float2 x = *reinterpret_cast<float2*>(io + at);
  x.x += 1;
  x.y += 1;
  *reinterpret_cast<float2*>(io + at) = x;
}

template <Bug bug>
__global__ void lanes_kernel(int* out) {
  const int lane = threadIdx.x;
  if (bug == Bug::exited_lane && lane == 31) return;
  out[0 * 32 + lane] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[1 * 32 + lane] = __any_sync(kAll, lane == 5) + 2 * __all_sync(kAll, lane >= 0) + 4 * __all_sync(kAll, lane < 31);
  out[2 * 32 + lane] = __shfl_sync(kAll, lane * lane, 7);
  out[3 * 32 + lane] = __shfl_sync(kAll, lane * lane, 11, 8);
  out[4 * 32 + lane] = __shfl_up_sync(kAll, lane, 3, 16);
  out[5 * 32 + lane] = __shfl_down_sync(kAll, lane, 3, 16);
  out[6 * 32 + lane] = __shfl_xor_sync(kAll, lane, 5);
  out[7 * 32 + lane] = __reduce_add_sync(kAll, lane) + 1000 * __reduce_max_sync(kAll, -lane - 1);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  // two groups at once
  out[8 * 32 + lane] = __shfl_sync(half, lane, lane < 16 ? 3 : 16 + lane % 4);
}

template <Bug bug>
__global__ void shifts_kernel(const int* in, unsigned* out) {
  out[threadIdx.x] = 1u << (in[threadIdx.x] + (bug == Bug::shift ? 1 : 0));
}

}  // namespace

void reverse_warps(const float* in, float* out, int blocks, Bug bug) {
  plant<Bug::none, Bug::no_syncwarp, Bug::split_syncwarp>(bug, [&](auto planted) {
    kk::cuda::launch(reverse_warps_kernel<planted.bug>, blocks, 128, 0, nullptr, in, out);
  });
}
void sum(const float* in, float* partial, unsigned* counter, float* out, int blocks, int n, Bug bug) {
  plant<Bug::none, Bug::last_by_block_index>(bug, [&](auto planted) {
    kk::cuda::launch(sum_kernel<planted.bug>, blocks, 128, 0, nullptr, in, partial, counter, out, n);
  });
}
void histogram(const int* in, int* out, int n, Bug bug) {
  plant<Bug::none, Bug::histogram_without_atomics>(
      bug, [&](auto planted) { kk::cuda::launch(histogram_kernel<planted.bug>, 1, 64, 0, nullptr, in, out, n); });
}
void running_sums(const float* in, float* out, int n, Bug bug) {
  plant<Bug::none, Bug::local_overrun>(
      bug, [&](auto planted) { kk::cuda::launch(running_sums_kernel<planted.bug>, 1, 32, 0, nullptr, in, out, n); });
}
void rotate(float* out, int n, Bug bug) {
  plant<Bug::none, Bug::early_return, Bug::shared_overrun>(
      bug, [&](auto planted) { kk::cuda::launch(rotate_kernel<planted.bug>, 1, 128, 0, nullptr, out, n); });
}
void reverse_block(float* out, Bug bug) {
  const size_t bytes = bug == Bug::dynamic_too_small ? 256 : 512;
  kk::cuda::launch(reverse_block_kernel, 1, 128, bytes, nullptr, out);
}
void handshake(int* flag, int* out) { kk::cuda::launch(handshake_kernel, 2, 64, 0, nullptr, flag, out); }
void count_up(float* io, int n, Bug bug) {
  plant<Bug::none, Bug::misaligned>(
      bug, [&](auto planted) { kk::cuda::launch(count_up_kernel<planted.bug>, 1, 32, 0, nullptr, io, n); });
}
void lanes(int* out, Bug bug) {
  plant<Bug::none, Bug::exited_lane>(
      bug, [&](auto planted) { kk::cuda::launch(lanes_kernel<planted.bug>, 1, 32, 0, nullptr, out); });
}
void shifts(const int* in, unsigned* out, Bug bug) {
  plant<Bug::none, Bug::shift>(
      bug, [&](auto planted) { kk::cuda::launch(shifts_kernel<planted.bug>, 1, 32, 0, nullptr, in, out); });
}

}  // namespace selftest
