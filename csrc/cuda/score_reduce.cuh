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
  int64_t offsets_stride, n, item_tokens;

  __device__ int64_t count(int64_t b) const {
    if (offsets) return n;
    const int64_t len = max(int64_t(seq_lens[b]), int64_t(0));
    return min(n, (len + item_tokens - 1) / item_tokens);
  }
  __device__ bool has(int64_t b, int64_t i) const {
    if (!offsets) return i < count(b);
    const int32_t* offset = offsets + b * offsets_stride + i;
    return i < n && offset[0] < offset[1] && offset[1] <= seq_lens[b];
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

  ReduceLayout(const ScoreCommon& p, int64_t tokens, bool keeps_items) {
    rows = p.Hkv > 0 ? p.B * p.Tq * p.Hq : 0;
    chunks = (p.n + kChunk - 1) / kChunk;
    items_at = rows * tokens * 4;
    chunks_at = items_at + (keeps_items ? rows * p.n * 4 : 0);
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
                                                                        int64_t rows_each, int64_t chunks,
                                                                        Mass* masses) {
  KK_SHARED(float, shared, [32]);
  const int64_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  const int64_t count = items.count(row / rows_each);
  float x[kChunk / kReduceThreads], top = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kChunk / kReduceThreads; ++j) {
    const int64_t i = first + j * kReduceThreads + threadIdx.x;
    x[j] = i < count ? kept[row * items.n + i] : -INFINITY;
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
__global__ __launch_bounds__(kReduceThreads) void mass_of_rows_kernel(const Mass* of_chunks, int64_t rows,
                                                                      int64_t chunks, Mass* masses) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kReduceThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float top = -INFINITY, sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) top = fmaxf(top, of_chunks[row * chunks + i].top);
  top = fold_lanes(top, 32, [](float a, float b) { return fmaxf(a, b); });
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) {
    const Mass m = of_chunks[row * chunks + i];
    sum += m.sum == 0.0f ? 0.0f : m.sum * expf(m.top - top);
  }
  sum = fold_lanes(sum, 32, [](float a, float b) { return a + b; });
  if (threadIdx.x % 32 == 0) masses[row] = {top, sum};
}

// A thread takes an item of a head.
__global__ __launch_bounds__(kReduceThreads) void reduce_masses_kernel(ScoreSink sink, Items items, int64_t heads_each,
                                                                       int64_t rows, int64_t chunks,
                                                                       const Mass* masses) {
  const int64_t head = blockIdx.x / chunks;
  for (int64_t i = blockIdx.x % chunks * kChunk + threadIdx.x, j = 0; j < kChunk / kReduceThreads;
       ++j, i += kReduceThreads) {
    if (i >= items.n) break;
    float y = keeps_max(sink.reduce) ? -INFINITY : 0.0f;
    if (items.has(head / heads_each, i)) {
      for (int64_t r = head * rows; r < (head + 1) * rows; ++r)
        y = sink.combine(expf(sink.kept[r * items.n + i] - masses[r].top) / masses[r].sum, y);
    } else {
      y = -INFINITY;
    }
    sink.out[head * items.n + i] = y;
  }
}

inline unsigned blocks_of(const char* op, int64_t blocks) {
  if (blocks >> 31) fail((std::string(op) + ": too many scores for one launch on CUDA").c_str());
  return static_cast<unsigned>(blocks);
}

// sink.kept holds the scores of all rows; out is written.
inline void reduce_softmax(const char* op, const ScoreCommon& p, const ScoreSink& sink, const Items& items,
                           const ReduceLayout& layout, void* workspace, const CudaExec& exec) {
  Mass* of_chunks = reinterpret_cast<Mass*>(static_cast<uint8_t*>(workspace) + layout.chunks_at);
  Mass* masses = reinterpret_cast<Mass*>(static_cast<uint8_t*>(workspace) + layout.masses_at);
  const int64_t rows = p.Tq * (p.Hq / p.Hkv);
  launch(mass_of_chunks_kernel, dim3(blocks_of(op, layout.rows * layout.chunks)), dim3(kReduceThreads), 0, exec.stream,
         sink.kept, items, rows * p.Hkv, layout.chunks, of_chunks);
  launch(mass_of_rows_kernel, dim3(blocks_of(op, (layout.rows + kReduceThreads / 32 - 1) / (kReduceThreads / 32))),
         dim3(kReduceThreads), 0, exec.stream, of_chunks, layout.rows, layout.chunks, masses);
  launch(reduce_masses_kernel, dim3(blocks_of(op, p.B * p.Hkv * layout.chunks)), dim3(kReduceThreads), 0, exec.stream,
         sink, items, p.Hkv, rows, layout.chunks, masses);
}

}  // namespace
}  // namespace kk::cuda
