// Attention over selected tokens: the same two kernels with `Sparse`, and before them one that finds the ends of the lists.
//
// There are fewer variants of attention_kernel than for all pages: the one for packed formats also does 16-bit pages, and
// the one for many rows any number above 8.
#include "cuda/attention_launch.cuh"

namespace kk::cuda {
namespace {

constexpr int kFindThreads = 256;  // a list of 2048 is read in one go

// How many of n items, the first ones, have the property? It is asked of 32 at a time: 512 items take two rounds, 32768
// three. A warp calls it together.
template <typename F>
__device__ __forceinline__ int count_first(int n, F has) {
  const int lane = threadIdx.x % 32;
  int begin = 0, end = n;
  while (begin < end) {
    const int step = (end - begin + 31) / 32, i = begin + (lane + 1) * step - 1;
    begin += step * __popc(__ballot_sync(kWholeWarp, i < end && has(i)));
    end = min(end, begin + step - 1);
  }
  return begin;
}

// A block per list.
__global__ void __launch_bounds__(kFindThreads) find_selected(const __grid_constant__ SparseParams p) {
  const int64_t b = blockIdx.x / p.Hkv;
  const int group = static_cast<int>(blockIdx.x % p.Hkv);
  const Params& dense = p;
  const Node node = node_at(p, b);
  const Span span = span_of(dense, node, group);
  const Selection& s = p.selection;
  const int32_t* index = s.index + b * s.index_batch + group * s.index_head;
  const int of_run = static_cast<int>(s.tokens);
  const auto runs_before = [&](int position) { return position / of_run + (position % of_run > 0); };

  // All of it is read, as anything may stand behind the end; an index past the sequence ends it too.
  const int runs = runs_before(node.end), most = static_cast<int>(min(s.count, int64_t(runs)));
  int length = most;
#pragma unroll 8
  for (int i = threadIdx.x; i < most; i += kFindThreads)
    if (static_cast<uint32_t>(index[i]) >= static_cast<uint32_t>(runs)) length = min(length, i);
#pragma unroll
  for (int h = 1; h < 32; h *= 2) length = min(length, __shfl_xor_sync(kWholeWarp, length, h));
  KK_SHARED(int, lengths, [kFindThreads / 32]);
  if (threadIdx.x % 32 == 0) lengths[threadIdx.x / 32] = length;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int warp = 0; warp < kFindThreads / 32; ++warp) length = min(length, lengths[warp]);

  // Of the first n runs, tokens before a position that lies in the last of them or behind.
  const auto tokens = [&](int n, int position) {
    return n == 0 ? 0 : (n - 1) * of_run + min(of_run, position - index[n - 1] * of_run);
  };
  const auto before = [&](int position) {
    return position > 0 ? tokens(count_first(length, [&](int i) { return index[i] < runs_before(position); }), position)
                        : 0;
  };
  const Selected found{tokens(length, node.end), before(span.sink), before(span.first_token)};
  if (threadIdx.x == 0) p.selected[blockIdx.x] = found;
}

// Calls f(D, NT, Packed, Shared).
template <typename F>
void with_sparse_tile(const AttentionParams& p, F&& f) {
  const bool few = most_rows(p) <= 8;
  one_of<64, 80, 96, 112, 128, 192, 256>("attention: head_dim", p.D, [&](auto d) {
    constexpr int D = decltype(d)::value;
    if constexpr (D == 64 || D == 128 || D == 256) {
      if (few) return f(d, Int<1>{}, std::true_type{}, std::false_type{});
      f(d, Int<D == 256 ? 1 : 2>{}, std::true_type{}, std::true_type{});
    } else {
      f(d, Int<2>{}, std::false_type{}, std::true_type{});
    }
  });
}

}  // namespace

int64_t sparse_attention_workspace(const AttentionParams& p, const CudaExec& exec) {
  int64_t bytes = p.B * p.Hkv * int64_t(sizeof(Selected));
  with_sparse_tile(p, [&](auto d, auto nt, auto, auto shared) {
    const Layout layout = make_layout<decltype(d)::value, decltype(nt)::value, decltype(shared)::value, true>(p, exec);
    bytes += layout.whole * partial_floats(p.Dv) * int64_t(sizeof(float));
  });
  return bytes;
}

void sparse_attention(const AttentionParams& q, const CudaExec& exec) {
  with_sparse_tile(q, [&](auto d, auto nt, auto packed, auto shared) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    constexpr bool Packed = decltype(packed)::value, Shared = decltype(shared)::value;
    SparseParams p = make_params<D, NT, Packed, Shared, true>(q, exec);
    p.selected = reinterpret_cast<Selected*>(p.layout.partials + p.layout.whole * partial_floats(q.Dv));
    launch(find_selected, dim3(static_cast<unsigned>(q.B * q.Hkv)), dim3(kFindThreads), 0, exec.stream, p);
    launch_attention<D, NT, Packed, Shared, true>(p, exec);
  });
}

}  // namespace kk::cuda
