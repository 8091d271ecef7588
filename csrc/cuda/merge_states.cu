// A group of lanes takes a row, 8 channels a lane. Bound by reading `outs` once: S * D numbers per row.
#include "kvkernels/ops/merge_states.h"

#include "cuda/rows.cuh"

namespace kk::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 4;  // states whose loads are under way at once

template <DType T>
__global__ __launch_bounds__(kThreads) void merge_states_kernel(MergeStatesParams p, int lanes, bool vector) {
  using Element = std::conditional_t<T == DType::f32, float, uint16_t>;
  const int lane = threadIdx.x % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const bool active = row < p.N;  // all lanes of a warp fold
  const auto lse_of = [&](int64_t s) {
    const float lse = !active ? -INFINITY : p.num_parts ? p.lses[s][row] : p.lses[0][s * p.N + row];
    if (lse == -INFINITY) return lse;  // not 0 * -inf
    return lse * (p.scale ? p.scale[s] : 1.0f) * (p.temperature ? p.temperature[s] : 1.0f);
  };

  float top = -INFINITY;
  bool nan = false;
  for (int64_t s = lane; s < p.S; s += lanes) {
    const float lse = lse_of(s);
    nan |= lse != lse;
    top = fmaxf(top, lse);
  }
  top = fold_lanes(top, lanes, [](float a, float b) { return fmaxf(a, b); });
  nan = fold_lanes(nan, lanes, [](float a, float b) { return a + b; }) != 0.0f;
  // All states empty: (-inf) - (-inf) is NaN, so say plainly that none of them weighs anything.
  const bool empty = top == -INFINITY && !nan;
  float sum = 0.0f;
  if (!empty)
    for (int64_t s = lane; s < p.S; s += lanes) sum += expf(lse_of(s) - top);
  sum = fold_lanes(sum, lanes, [](float a, float b) { return a + b; });
  if (!active) return;
  if (lane == 0) p.lse[row] = empty ? -INFINITY : top + logf(sum);
  const float inv = 1.0f / sum;

  const auto out_of = [&](int64_t s) {
    const void* part = p.num_parts ? p.outs[s] : p.outs[0];
    return static_cast<const Element*>(part) + ((p.num_parts ? 0 : s * p.N) + row) * p.D;
  };
  Element* out = static_cast<Element*>(p.out) + row * p.D;
  for (int64_t c = lane * kPerLane; c < p.D; c += lanes * kPerLane) {
    float acc[8] = {};
    for (int64_t first = 0; first < p.S && !empty; first += kBatch) {
      float weight[kBatch], x[kBatch][8];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) weight[i] = first + i < p.S ? expf(lse_of(first + i) - top) * inv : 0.0f;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i][j] = 0.0f;
        if (weight[i] == 0.0f) continue;  // not 0 * out: an empty state's out may be NaN
        load8<T>(out_of(first + i) + c, vector, x[i], p.D - c);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[j] = fmaf(weight[i], x[i][j], acc[j]);
    }
    store8<T>(acc, vector, out + c, p.D - c);
  }
}

}  // namespace

void merge_states(const MergeStatesParams& p, const CudaExec& exec) {
  int lanes = 1;
  while (lanes < 32 && lanes * kPerLane < p.D) lanes *= 2;
  bool vector = p.D % kPerLane == 0 && aligned16(p.out) && aligned16(p.outs[0]);
  for (int s = 1; s < p.num_parts; ++s) vector &= aligned16(p.outs[s]);
  const int64_t rows = kThreads / lanes, blocks = (p.N + rows - 1) / rows;
  if (blocks >> 31) fail("merge_states: too many rows for one launch on CUDA");
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, exec.stream, p, lanes, vector);
  };
  if (p.dtype == DType::f32) return run(merge_states_kernel<DType::f32>);
  if (p.dtype == DType::f16) return run(merge_states_kernel<DType::f16>);
  run(merge_states_kernel<DType::bf16>);
}

}  // namespace kk::cuda
