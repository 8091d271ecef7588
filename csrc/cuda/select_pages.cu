// A block takes a row. The key of rank k comes from three histograms of key bits, the highest first; then one pass writes
// the items above it, and the first of those that equal it, in the order of the items. Atomics only count.
#include "kvkernels/ops/select_pages.h"

#include "cuda/launch.cuh"
#include "kvkernels/core/half.h"

namespace kk::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of 11 key bits
constexpr int kItems = 16;   // of a thread in registers; longer rows are read again for each pass
constexpr unsigned kWholeWarp = 0xffffffffu;
static_assert(2 * kItems * kWarps == kThreads, "a thread scans one count");

// The order of scores as that of integers. NaN is above everything, -0 equals 0.
__device__ __forceinline__ uint32_t sortable(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t u = float_bits(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// What a thread has of a piece of kThreads * kItems candidates: those at first + j * kThreads + threadIdx.x.
struct Keys {
  uint32_t key[kItems];
  int left;  // candidates from `first` on

  __device__ void load(const float* scores, int n) {
    left = n;
    each([&](int j, bool valid) {
      key[j] = valid ? sortable(scores[j * kThreads + static_cast<int>(threadIdx.x)]) : 0;
    });
  }
  // f(j, valid) for all j of the piece, by whole warps.
  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j * kThreads >= left) break;
      f(j, j * kThreads + static_cast<int>(threadIdx.x) < left);
    }
  }
};

// Keys with key & mask == prefix are a bin, and the key looked for is the rank-th of its `count` from above.
struct Threshold {
  uint32_t mask, prefix;
  int rank, count;
};

struct Shared {
  int bins[kBins];
  int sums[kWarps];
  Threshold threshold;
  int counts[2 * kItems * kWarps];  // above the threshold | equal to it: of each j, of each warp
  int totals[2];
};

// Inclusive, over `width` lanes.
__device__ __forceinline__ int scan_lanes(int x, int width) {
#pragma unroll
  for (int h = 1; h < width; h *= 2) {
    const int y = __shfl_up_sync(kWholeWarp, x, h, width);
    if (static_cast<int>(threadIdx.x) % width >= h) x += y;
  }
  return x;
}

// The sum of x over the threads before this one, of the block or, if `halves`, of its half.
__device__ __forceinline__ int scan_block(Shared& s, int x, bool halves) {
  const int warp = threadIdx.x / 32, inclusive = scan_lanes(x, 32);
  if (threadIdx.x % 32 == 31) s.sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const int sum = s.sums[threadIdx.x];
    s.sums[threadIdx.x] = (halves ? scan_lanes(sum, kWarps / 2) : scan_lanes(sum, kWarps)) - sum;
  }
  __syncthreads();
  return s.sums[warp] + inclusive - x;
}

// s.bins counts the keys of the bin by `bits` more bits, from `shift` on; they are zeros afterwards.
__device__ __forceinline__ Threshold divide(Shared& s, const Threshold& t, int shift, int bits) {
  const int top = kBins - 1 - 2 * static_cast<int>(threadIdx.x);  // a thread has two bins, the first the highest
  const int first = s.bins[top], second = s.bins[top - 1];
  s.bins[top] = s.bins[top - 1] = 0;
  const int above = scan_block(s, first + second, false);
  const uint32_t mask = t.mask | ((1u << bits) - 1u) << shift, bin = static_cast<uint32_t>(top);
  if (above < t.rank && t.rank <= above + first)
    s.threshold = {mask, t.prefix | bin << shift, t.rank - above, first};
  else if (above + first < t.rank && t.rank <= above + first + second)
    s.threshold = {mask, t.prefix | (bin - 1) << shift, t.rank - above - first, second};
  __syncthreads();
  return s.threshold;
}

__global__ __launch_bounds__(kThreads, 1) void select_pages_kernel(SelectPagesParams p) {
  KK_SHARED(Shared, s, );
  const int64_t b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  int32_t* out = p.out + blockIdx.x * p.k;
  const int64_t len = max(int64_t(p.seq_lens[b]), int64_t(0));
  const int m = static_cast<int>(min(p.n, (len + p.item_tokens - 1) / p.item_tokens));
  const int sink = static_cast<int>(p.sink), recent = static_cast<int>(p.recent);
  int k = static_cast<int>(p.k);
  if (p.row_k) k = min(max(p.row_k[b * p.row_k_batch + h * p.row_k_head], sink + recent), k);
  const int tid = static_cast<int>(threadIdx.x);
  const bool all = m <= k;
  for (int i = tid; i < p.k; i += kThreads)
    if (all || i < sink || i >= k - recent) out[i] = i >= min(m, k) ? -1 : all || i < sink ? i : m - k + i;
  const int need = k - sink - recent;
  if (all || need == 0) return;

  const float* scores = p.scores + b * p.score_batch + h * p.score_head + sink;
  const int n = m - sink - recent;
  constexpr int kPiece = kThreads * kItems;
  Keys keys;
  keys.load(scores, n);
  const auto pieces = [&](auto&& f) {
    for (int first = 0; first < n; first += kPiece) {
      if (n > kPiece) keys.load(scores + first, n - first);
      f(first);
    }
  };

  for (int i = tid; i < kBins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
  Threshold t{0, 0, need, n};
  for (int pass = 0; pass < 3 && t.rank < t.count; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    pieces([&](int) {
      keys.each([&](int j, bool valid) {
        if (valid && (keys.key[j] & t.mask) == t.prefix)
          atomicAdd(&s.bins[keys.key[j] >> shift & ((1u << bits) - 1u)], 1);
      });
    });
    __syncthreads();
    t = divide(s, t, shift, bits);
  }

  int above = 0, equal = 0;  // before the piece
  const unsigned lanes_below = (1u << tid % 32) - 1u;
  pieces([&](int first) {
    for (int i = tid; i < 2 * kItems * kWarps; i += kThreads) s.counts[i] = 0;
    __syncthreads();
    keys.each([&](int j, bool valid) {
      const uint32_t key = keys.key[j] & t.mask;
      const unsigned a = __ballot_sync(kWholeWarp, valid && key > t.prefix);
      const unsigned e = __ballot_sync(kWholeWarp, valid && key == t.prefix);
      if (tid % 32 == 0)
        s.counts[j * kWarps + tid / 32] = __popc(a), s.counts[(kItems + j) * kWarps + tid / 32] = __popc(e);
    });
    __syncthreads();
    const int count = s.counts[tid], before = scan_block(s, count, true);
    s.counts[tid] = before;
    if (tid % (kThreads / 2) == kThreads / 2 - 1) s.totals[tid / (kThreads / 2)] = before + count;
    __syncthreads();
    keys.each([&](int j, bool valid) {
      const uint32_t key = keys.key[j] & t.mask;
      const bool is_above = valid && key > t.prefix, is_equal = valid && key == t.prefix;
      const unsigned a = __ballot_sync(kWholeWarp, is_above);
      const unsigned e = __ballot_sync(kWholeWarp, is_equal);
      const int at = j * kWarps + tid / 32;
      const int above_it = above + s.counts[at] + __popc(a & lanes_below);
      const int equal_it = equal + s.counts[kItems * kWarps + at] + __popc(e & lanes_below);
      if (is_above || (is_equal && equal_it < t.rank))
        out[sink + above_it + min(equal_it, t.rank)] = sink + first + j * kThreads + tid;
    });
    above += s.totals[0];
    equal += s.totals[1];
    __syncthreads();
  });
}

}  // namespace

int64_t select_pages_workspace(const SelectPagesParams&, const CudaExec&) { return 0; }

void select_pages(const SelectPagesParams& p, const CudaExec& exec) {
  const int64_t rows = p.B * p.H;
  if (rows >> 31 || p.n >> 31) fail("select_pages: B * H and n must be below 2^31 on CUDA");
  if (rows == 0 || p.k == 0) return;
  launch(select_pages_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, exec.stream, p);
}

}  // namespace kk::cuda
