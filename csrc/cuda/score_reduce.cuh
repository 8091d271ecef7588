// From the scores of single rows to one number per item, where that takes all items of a row (softmax) or several (the best
// token of a page).
#pragma once
#include <algorithm>

#include "cuda/score_rows.cuh"

namespace kk::cuda {
namespace {

constexpr int kReduceThreads = 256;
constexpr int kChunk = 8 * kReduceThreads;  // items of a row that a block takes

// The items of sequence b are the first count(b) of n, but for segments that are not there.
struct Items {
  const int32_t *seq_lens, *offsets;
  int64_t offsets_stride;
  uint32_t n, item_tokens;

  __device__ uint32_t count(int64_t b) const {
    if (offsets) return n;
    const int32_t len = seq_lens[b];
    return len > 0 ? min(n, (static_cast<uint32_t>(len) + item_tokens - 1) / item_tokens) : 0;
  }
  // Of item i < count(b).
  __device__ bool has(int64_t b, uint32_t i) const {
    if (!offsets) return true;
    const int32_t* offset = offsets + b * offsets_stride + i;
    return offset[0] < offset[1] && offset[1] <= seq_lens[b];
  }
};

// Of a row, or of a chunk of it: the largest score, and the sum of exp(score - top).
struct Mass {
  float top, sum;
};

// Workspace: kept scores of tokens | kept scores of items | mass of each chunk of each row | of each row
struct ReduceLayout {
  int64_t rows, chunks;  // rows of all heads
  int64_t items_at, chunks_at, masses_at, bytes;

  ReduceLayout(const ScoreCommon& p, int64_t tokens) {
    rows = p.Hkv > 0 ? p.B * p.Tq * p.Hq : 0;
    chunks = (p.n + kChunk - 1) / kChunk;
    items_at = rows * tokens * 4;
    chunks_at = items_at + (is_softmax(p.reduce) ? rows * p.n * 4 : 0);
    masses_at = chunks_at + (is_softmax(p.reduce) ? rows * chunks * 8 : 0);
    bytes = masses_at + (is_softmax(p.reduce) ? rows * 8 : 0);
  }
};

template <typename Op>
__device__ __forceinline__ float fold_block(float (&shared)[32], float x, Op op) {
  x = fold_lanes(x, 32, op);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < kReduceThreads / 32; ++i) x = op(x, shared[i]);
  __syncthreads();
  return x;
}

// A block takes a chunk of a row.
__global__ __launch_bounds__(kReduceThreads) void mass_of_chunks_kernel(const float* kept, Items items,
                                                                        uint32_t rows_each, uint32_t chunks,
                                                                        Mass* masses) {
  KK_SHARED(float, shared, [32]);
  const uint32_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk + threadIdx.x;
  const uint32_t count = items.count(row / rows_each);
  float x[kChunk / kReduceThreads], top = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kChunk / kReduceThreads; ++j) {
    const uint32_t i = first + j * kReduceThreads;
    x[j] = i < count ? kept[static_cast<int64_t>(row) * items.n + i] : -INFINITY;
    top = fmaxf(top, x[j]);
  }
  top = fold_block(shared, top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int j = 0; j < kChunk / kReduceThreads; ++j)
    if (x[j] != -INFINITY) sum += expf(x[j] - top);  // NaN if one of them is
  sum = fold_block(shared, sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) masses[blockIdx.x] = {top, sum};
}

// A warp takes a row.
__global__ __launch_bounds__(kReduceThreads) void mass_of_rows_kernel(const Mass* of_chunks, uint32_t rows,
                                                                      uint32_t chunks, Mass* masses) {
  const uint32_t row = blockIdx.x * (kReduceThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  of_chunks += static_cast<int64_t>(row) * chunks;
  float top = -INFINITY, sum = 0.0f;
  for (uint32_t i = threadIdx.x % 32; i < chunks; i += 32) top = fmaxf(top, of_chunks[i].top);
  top = fold_lanes(top, 32, [](float a, float b) { return fmaxf(a, b); });
  for (uint32_t i = threadIdx.x % 32; i < chunks; i += 32) {
    const Mass m = of_chunks[i];
    sum += m.sum == 0.0f ? 0.0f : m.sum * expf(m.top - top);
  }
  sum = fold_lanes(sum, 32, [](float a, float b) { return a + b; });
  if (threadIdx.x % 32 == 0) masses[row] = {top, sum};
}

// A thread takes an item of a head.
__global__ __launch_bounds__(kReduceThreads) void reduce_masses_kernel(ScoreSink sink, Items items, uint32_t heads_each,
                                                                       int rows, const Mass* masses) {
  const uint32_t chunks = (items.n + kReduceThreads - 1) / kReduceThreads;
  const uint32_t head = blockIdx.x / chunks, i = blockIdx.x % chunks * kReduceThreads + threadIdx.x;
  if (i >= items.n) return;
  float y = -INFINITY;
  if (i < items.count(head / heads_each) && items.has(head / heads_each, i)) {
    const float* kept = sink.kept + static_cast<int64_t>(head) * rows * items.n + i;
    masses += static_cast<int64_t>(head) * rows;
    for (int r = 0; r < rows; ++r, kept += items.n) {
      const float mass = expf(*kept - masses[r].top) / masses[r].sum;
      y = r == 0 ? mass : sink.combine(mass, y);
    }
  }
  sink.out[static_cast<int64_t>(head) * items.n + i] = y;
}

inline unsigned blocks_of(const char* op, int64_t blocks) {
  if (blocks >> 31) fail((std::string(op) + ": too many scores for one launch on CUDA").c_str());
  return static_cast<unsigned>(blocks);
}

inline Items items_of(const char* op, const ScoreCommon& p, int64_t n, int64_t item_tokens) {
  if (n >> 31 || item_tokens >> 31) fail((std::string(op) + ": too many tokens in a page table on CUDA").c_str());
  return {p.seq_lens, nullptr, 0, static_cast<uint32_t>(n), static_cast<uint32_t>(item_tokens)};
}

// sink.kept holds the scores of all rows; out is written.
inline void reduce_softmax(const char* op, const ScoreCommon& p, const ScoreSink& sink, const Items& items,
                           const ReduceLayout& layout, void* workspace, const CudaExec& exec) {
  Mass* of_chunks = reinterpret_cast<Mass*>(static_cast<uint8_t*>(workspace) + layout.chunks_at);
  Mass* masses = reinterpret_cast<Mass*>(static_cast<uint8_t*>(workspace) + layout.masses_at);
  const int64_t rows = p.Tq * (p.Hq / p.Hkv);
  launch(mass_of_chunks_kernel, dim3(blocks_of(op, layout.rows * layout.chunks)), dim3(kReduceThreads), 0, exec.stream,
         sink.kept, items, static_cast<uint32_t>(rows * p.Hkv), static_cast<uint32_t>(layout.chunks), of_chunks);
  launch(mass_of_rows_kernel, dim3(blocks_of(op, (layout.rows + kReduceThreads / 32 - 1) / (kReduceThreads / 32))),
         dim3(kReduceThreads), 0, exec.stream, of_chunks, static_cast<uint32_t>(layout.rows),
         static_cast<uint32_t>(layout.chunks), masses);
  const int64_t blocks = (p.n + kReduceThreads - 1) / kReduceThreads;
  launch(reduce_masses_kernel, dim3(blocks_of(op, p.B * p.Hkv * blocks)), dim3(kReduceThreads), 0, exec.stream, sink,
         items, static_cast<uint32_t>(p.Hkv), static_cast<int>(rows), masses);
}

}  // namespace
}  // namespace kk::cuda
