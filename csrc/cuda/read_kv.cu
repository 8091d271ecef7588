// A block: 8 warps of rows, a row = (token, KV head) of K or V. One read of the codes, one write of k and v.
#include "kvkernels/ops/read_kv.h"

#include "cuda/codec.cuh"

namespace kk::cuda {
namespace {

struct Args {
  uint8_t* out[2];  // [rows, head_dim]
  PoolSide side[2];
  DType dtype;
  bool vector;  // both are 16-byte aligned
  const int64_t* slots;
  uint32_t rows, heads;
};

// Two rows of D = 128 in a warp: 68 bytes of u2 in, 512 of bf16 out. Instructions bound packed pages, bytes 16-bit ones.
template <int L>
__global__ __launch_bounds__(kCodecThreads) void read_kv_kernel(__grid_constant__ const Args a) {
  const PoolSide& side = a.side[blockIdx.y];
  const uint32_t row = blockIdx.x * (kCodecThreads / L) + threadIdx.x / L, token = row / a.heads, head = row % a.heads;
  const int c = threadIdx.x % L * kPerLane;
  const int64_t slot = row < a.rows ? a.slots[token] : -1;
  const bool active = slot >= 0;
  const Slot at = locate(active ? slot : 0, side.page_size);
  float x[8];
  decode<L>(side, active, at.page, head, at.token, x);
  if (row >= a.rows || c >= side.head_dim) return;
  if (!active) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;  // and not mu
  }
  const int64_t i = static_cast<int64_t>(row) * side.head_dim + c;
  store8(a.dtype, x, a.vector, a.out[blockIdx.y] + i * (a.dtype == DType::f32 ? 4 : 2));
}

}  // namespace

void read_kv(const ReadKvParams& p, const CudaExec& exec) {
  const int64_t rows = p.T * p.Hkv;
  if (rows >> 31) fail("read_kv: k.size(0) * k.size(1) must be below 2^31 on CUDA");
  const auto side = [&](Side s) { return pool_side("read_kv: pool", p.pool, s, p.transform, p.page_size, p.D); };
  const Args args{{static_cast<uint8_t*>(p.k), static_cast<uint8_t*>(p.v)},
                  {side(Side::K), side(Side::V)},
                  p.dtype,
                  aligned16(p.k) && aligned16(p.v),
                  p.slots,
                  static_cast<uint32_t>(rows),
                  static_cast<uint32_t>(p.Hkv)};
  with_row_lanes(p.D, [&](auto L) {
    constexpr int per_block = kCodecThreads / static_cast<int>(L);
    const auto blocks = static_cast<unsigned>((rows + per_block - 1) / per_block);
    launch(read_kv_kernel<L.value>, dim3(blocks, 2), dim3(kCodecThreads), 0, exec.stream, args);
  });
}

}  // namespace kk::cuda
