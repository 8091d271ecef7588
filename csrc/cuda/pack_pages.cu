// Rows (pair, KV head, token) go through fp32 in the user's basis, in registers. Keys that become kivi2 are coded per
// channel over the page: there a block takes a page of one head and reads it twice.
#include "kvkernels/ops/pack_pages.h"

#include "cuda/codec.cuh"

namespace kk::cuda {
namespace {

struct Args {
  PoolSide src[2], dst[2];
  const int32_t* pairs;
  uint32_t pages, heads;  // pages: pairs * heads
};

// Bound as write_kv is.
template <int L>
__global__ __launch_bounds__(kCodecThreads) void pack_pages_kernel(__grid_constant__ const Args a, int first_side) {
  const PoolSide &src = a.src[first_side + blockIdx.y], &dst = a.dst[first_side + blockIdx.y];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCodecThreads / L) + threadIdx.x / L;
  const Slot at = locate(row, src.page_size);  // the "page" counts (pair, head)
  const uint32_t page = static_cast<uint32_t>(at.page), pair = page / a.heads, head = page % a.heads;
  bool active = at.page < a.pages;
  const int from = active ? a.pairs[2 * pair] : -1, to = active ? a.pairs[2 * pair + 1] : -1;
  active = from >= 0 && to >= 0;
  float x[8];
  decode<L>(src, active, active ? from : 0, head, at.token, x);
  encode<L>(dst, x, active, active ? to : 0, head, at.token);
}

// x, alike in a warp, as a number that compilers do not know: the addresses that depend on it are then made in the loop where
// they are used, and not before it for all formats, in registers.
__device__ __forceinline__ int again(int x) { return __shfl_sync(kWholeWarp, x, 0); }

// Keys become kivi2. Bound by decoding them twice; the second time they come from the cache.
template <int L>
__global__ __launch_bounds__(kCodecThreads) void pack_kivi2_keys_kernel(__grid_constant__ const Args a) {
  constexpr int D = kPerLane * L, rows = kCodecThreads / L;  // tokens in flight
  KK_SHARED(float, lows, [rows][D]);
  KK_SHARED(float, highs, [rows][D]);
  KK_SHARED(kivi2::Affine, affine, [D]);
  const PoolSide &src = a.src[0], &dst = a.dst[0];
  const uint32_t pair = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int from = a.pairs[2 * pair], to = a.pairs[2 * pair + 1];
  if (from < 0 || to < 0) return;
  uint8_t* side = dst.page(to, head);
  const int row = threadIdx.x / L, c = threadIdx.x % L * kPerLane;

  float x[8], lo[8], hi[8];  // a channel with NaN or Inf: hi is NaN
#pragma unroll
  for (int i = 0; i < 8; ++i) lo[i] = INFINITY, hi[i] = -INFINITY;
  for (int64_t first = 0; first < src.page_size; first += rows) {
    const bool active = first + row < src.page_size;
    decode<L>(src, active, again(from), head, first + row, x);
    if (!active) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool finite = fabsf(x[i]) <= 3.4028235e38f && hi[i] == hi[i];
      lo[i] = fminf(lo[i], x[i]);
      hi[i] = finite ? fmaxf(hi[i], x[i]) : NAN;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) lows[row][c + i] = lo[i], highs[row][c + i] = hi[i];
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += kCodecThreads) {
    float low = INFINITY, high = -INFINITY;
    bool finite = true;
    for (int r = 0; r < rows; ++r) {
      finite &= highs[r][d] == highs[r][d];
      low = fminf(low, lows[r][d]);
      high = fmaxf(high, highs[r][d]);
    }
    affine[d] = kivi2::affine(low, high, finite);
    reinterpret_cast<uint16_t*>(side + kivi2::scale_offset(dst.page_size, D))[d] = affine[d].scale;
    reinterpret_cast<uint16_t*>(side + kivi2::zero_offset(Side::K, dst.page_size, D))[d] = affine[d].zero;
  }
  __syncthreads();
  kivi2::Affine mine[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) mine[i] = affine[c + i];
  for (int64_t first = 0; first < src.page_size; first += rows) {
    const bool active = first + row < src.page_size;
    decode<L>(src, active, again(from), head, first + row, x);
    if (active) *kivi2_codes<L>(side, first + row) = pack_kivi2([&](int i) { return kivi2::code(x[i], mine[i]); });
  }
}

}  // namespace

void pack_pages(const PackPagesParams& p, const CudaExec& exec) {
  const auto src = [&](Side s) { return pool_side("pack_pages: src", p.src, s, p.transform, p.page_size, p.D); };
  const auto dst = [&](Side s) { return pool_side("pack_pages: dst", p.dst, s, p.transform, p.page_size, p.D); };
  const int64_t pages = p.N * p.Hkv, rows = pages * p.page_size;
  const Args args{{src(Side::K), src(Side::V)},
                  {dst(Side::K), dst(Side::V)},
                  p.pairs,
                  static_cast<uint32_t>(pages),
                  static_cast<uint32_t>(p.Hkv)};
  const bool kivi2_keys = p.dst.k_format == Format::kivi2;
  with_row_lanes(p.D, [&](auto L) {
    constexpr int per_block = kCodecThreads / static_cast<int>(L);
    const int64_t blocks = (rows + per_block - 1) / per_block;
    if (pages >> 31 || blocks >> 31)
      fail("pack_pages: pairs.size(0) * Hkv * page_size is too large for one launch on CUDA");
    if (kivi2_keys)
      launch(pack_kivi2_keys_kernel<L.value>, dim3(static_cast<unsigned>(pages)), dim3(kCodecThreads), 0, exec.stream,
             args);
    launch(pack_pages_kernel<L.value>, dim3(static_cast<unsigned>(blocks), kivi2_keys ? 1 : 2), dim3(kCodecThreads), 0,
           exec.stream, args, kivi2_keys ? 1 : 0);
  });
}

}  // namespace kk::cuda
