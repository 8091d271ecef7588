// A block takes a row, a thread neighbouring items of it. The key of rank k comes from three histograms of key bits, the
// highest first; then one pass writes the items above it, and the first of those that equal it, in the order of the items.
// Atomics only count.
#include "kvkernels/ops/select_pages.h"

#include "cuda/rows.cuh"

namespace kk::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kItems = 16;   // of a thread in registers; of longer rows every piece is read again for each pass
constexpr int kBins = 2048;  // of 11 key bits

// The order of scores as that of integers. NaN is above everything, -0 equals 0, and no score is 0.
__device__ __forceinline__ uint32_t sortable(float x) {
  const uint32_t u = float_bits(x + 0.0f);
  return x != x ? 0xffffffffu : u ^ (static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 0x80000000u);
}

// Keys with key & mask == prefix are a bin, and the key looked for is the rank-th of its `count` from above.
struct Threshold {
  uint32_t mask, prefix;
  int rank, count;
};

struct Shared {
  int bins[kBins];
  int sums[2][kWarps];
  Threshold threshold;
};

// The sum of x over the threads before this one. Between two calls with the same `sums` the threads must meet.
__device__ __forceinline__ int scan_block(int (&sums)[kWarps], int x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int inclusive = x;
#pragma unroll
  for (int h = 1; h < 32; h *= 2) {
    const int y = __shfl_up_sync(kWholeWarp, inclusive, h);
    if (lane >= h) inclusive += y;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  const int before = __reduce_add_sync(kWholeWarp, lane < warp ? sums[lane] : 0);
  return before + inclusive - x;
}

// s.bins counts the keys of the bin by `bits` more bits, from `shift` on; they are zeros afterwards.
__device__ __forceinline__ Threshold divide(Shared& s, const Threshold& t, int shift, int bits) {
  static_assert(kBins == 4 * kThreads);
  const int first =
      kBins - 4 - 4 * static_cast<int>(threadIdx.x);  // a thread has four bins, the first thread the highest
  const int4 four = *reinterpret_cast<const int4*>(s.bins + first);
  *reinterpret_cast<int4*>(s.bins + first) = make_int4(0, 0, 0, 0);
  const int count[4] = {four.w, four.z, four.y, four.x}, sum = four.x + four.y + four.z + four.w;
  int rank = t.rank - scan_block(s.sums[0], sum);
  if (0 < rank && rank <= sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bin = first + 3 - i;
      if (0 < rank && rank <= count[i])
        s.threshold = {t.mask | ((1u << bits) - 1u) << shift, t.prefix | bin << shift, rank, count[i]};
      rank -= count[i];
    }
  }
  __syncthreads();
  return s.threshold;
}

// The items from `first` on, `each` for a thread; those outside of [begin, end) have key 0.
struct Keys {
  uint32_t key[kItems];

  __device__ __forceinline__ void load(const float* scores, bool vector, int first, int each, int begin, int end) {
    const int own = first + static_cast<int>(threadIdx.x) * each;
#pragma unroll
    for (int j = 0; j < kItems; j += 4) {
      if (j >= each) break;
      const int i = own + j;
      float x[4] = {};
      if (vector && i + 4 <= end) {
        const float4 four = *reinterpret_cast<const float4*>(scores + i);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      } else {
#pragma unroll
        for (int l = 0; l < 4; ++l)
          if (i + l < end) x[l] = scores[i + l];
      }
#pragma unroll
      for (int l = 0; l < 4; ++l) key[j + l] = begin <= i + l && i + l < end ? sortable(x[l]) : 0;
    }
  }
};

__global__ __launch_bounds__(kThreads, 1) void select_pages_kernel(SelectPagesParams p, bool vector) {
  KK_SHARED(Shared, s, );
  const uint32_t b = blockIdx.x / static_cast<uint32_t>(p.H), h = blockIdx.x % static_cast<uint32_t>(p.H);
  const int tid = static_cast<int>(threadIdx.x), sink = static_cast<int>(p.sink), recent = static_cast<int>(p.recent);
  int32_t* out = p.out + blockIdx.x * p.k;
  const uint32_t len = max(p.seq_lens[b], 0), item_tokens = static_cast<uint32_t>(p.item_tokens);
  const int m = static_cast<int>(min(static_cast<uint32_t>(p.n), (len + item_tokens - 1) / item_tokens));
  int k = static_cast<int>(p.k);
  if (p.row_k) k = min(max(p.row_k[b * p.row_k_batch + h * p.row_k_head], sink + recent), k);
  const bool all = m <= k;
  for (int i = tid; i < p.k; i += kThreads)
    if (all || i < sink || i >= k - recent) out[i] = i >= min(m, k) ? -1 : all || i < sink ? i : m - k + i;
  const int need = k - sink - recent, end = m - recent;
  if (all || need == 0) return;

  const float* scores = p.scores + b * p.score_batch + h * p.score_head;
  const int each = min(kItems, (m + 4 * kThreads - 1) / (4 * kThreads) * 4), piece = each * kThreads;
  Keys keys;
  keys.load(scores, vector, 0, each, sink, end);
  // f(first) for the pieces of the row, whose keys are then in registers.
  const auto pieces = [&](auto&& f) {
    for (int first = 0; first < end; first += piece) {
      if (end > piece) keys.load(scores, vector, first, each, sink, end);
      f(first);
    }
  };

  for (int i = tid; i < kBins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
  Threshold t{0, 0, need, end - sink};
  for (int pass = 0; pass < 3 && t.rank < t.count; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    pieces([&](int) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (j >= each) break;
        const uint32_t key = keys.key[j];
        if ((key & t.mask) == t.prefix) atomicAdd(&s.bins[key >> shift & ((1u << bits) - 1u)], 1);
      }
    });
    __syncthreads();
    t = divide(s, t, shift, bits);
  }

  // Keys above `top` are chosen, and the first t.rank of those from t.prefix on.
  const uint32_t top = t.prefix | ~t.mask;
  int above = 0, equal = 0, parity = 0;  // before the piece
  pieces([&](int first) {
    int counts = 0;  // of keys above top << 16 | from t.prefix on
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j >= each) break;
      counts += (keys.key[j] > top) << 16 | (keys.key[j] >= t.prefix);
    }
    parity ^= 1;
    const int before = scan_block(s.sums[parity], counts);
    int a = above + (before >> 16), e = equal + (before & 0xffff) - (before >> 16);
    const int own = first + tid * each;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j >= each) break;
      if (keys.key[j] < t.prefix) continue;
      const bool is_above = keys.key[j] > top;
      if (is_above || e < t.rank) out[sink + a + min(e, t.rank)] = own + j;
      a += is_above, e += !is_above;
    }
    if (end <= piece) return;
    int total = 0;
    for (int w = 0; w < kWarps; ++w) total += s.sums[parity][w];
    above += total >> 16;
    equal += (total & 0xffff) - (total >> 16);
  });
}

}  // namespace

int64_t select_pages_workspace(const SelectPagesParams&, const CudaExec&) { return 0; }

void select_pages(const SelectPagesParams& p, const CudaExec& exec) {
  const int64_t rows = p.B * p.H;
  if (rows >> 31 || p.n >> 30 || p.item_tokens >> 31)
    fail("select_pages: B * H must be below 2^31 and n below 2^30 on CUDA");
  if (rows == 0 || p.k == 0) return;
  const bool vector = aligned16(p.scores, p.score_batch * 4, p.score_head * 4);
  launch(select_pages_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, exec.stream, p, vector);
}

}  // namespace kk::cuda
