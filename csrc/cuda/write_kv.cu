// A block: 8 warps of rows, a row = (token, KV head) of K or V. One read of k and v, one write of their codes.
#include "kvkernels/ops/write_kv.h"

#include "cuda/codec.cuh"

namespace kk::cuda {
namespace {

struct Source {
  const uint8_t* x;
  int64_t token, head;  // strides in bytes
  bool vector;
};

struct Args {
  Source source[2];
  PoolSide side[2];
  DType dtype;
  const int64_t* slots;
  uint32_t rows, heads;
};

// Two rows of D = 128 in a warp: 512 bytes of bf16 in, 68 of u2 out. Instructions bound packed pages, bytes 16-bit ones.
template <int L>
__global__ __launch_bounds__(kCodecThreads) void write_kv_kernel(__grid_constant__ const Args a) {
  const Source& source = a.source[blockIdx.y];
  const PoolSide& side = a.side[blockIdx.y];
  const uint32_t row = blockIdx.x * (kCodecThreads / L) + threadIdx.x / L, token = row / a.heads, head = row % a.heads;
  const int c = threadIdx.x % L * kPerLane;
  const int64_t slot = row < a.rows ? a.slots[token] : -1;
  const bool active = slot >= 0;
  const Slot at = locate(active ? slot : 0, side.page_size);
  float x[8] = {};
  if (active && c < side.head_dim)
    load8(a.dtype, source.x + token * source.token + head * source.head + c * (a.dtype == DType::f32 ? 4 : 2),
          source.vector, x);
  encode<L>(side, x, active, at.page, head, at.token);
}

}  // namespace

void write_kv(const WriteKvParams& p, const CudaExec& exec) {
  const int64_t element = element_bytes(p.dtype), rows = p.T * p.Hkv;
  if (rows >> 31) fail("write_kv: k.size(0) * k.size(1) must be below 2^31 on CUDA");
  const auto source = [&](const void* x, int64_t token, int64_t head) {
    return Source{static_cast<const uint8_t*>(x), token * element, head * element,
                  aligned16(x, token * element, head * element)};
  };
  const auto side = [&](Side s) { return pool_side("write_kv: pool", p.pool, s, p.transform, p.page_size, p.D); };
  const Args args{{source(p.k, p.k_token, p.k_head), source(p.v, p.v_token, p.v_head)},
                  {side(Side::K), side(Side::V)},
                  p.dtype,
                  p.slots,
                  static_cast<uint32_t>(rows),
                  static_cast<uint32_t>(p.Hkv)};
  with_row_lanes(p.D, [&](auto L) {
    constexpr int per_block = kCodecThreads / static_cast<int>(L);
    const auto blocks = static_cast<unsigned>((rows + per_block - 1) / per_block);
    launch(write_kv_kernel<L.value>, dim3(blocks, 2), dim3(kCodecThreads), 0, exec.stream, args);
  });
}

}  // namespace kk::cuda
