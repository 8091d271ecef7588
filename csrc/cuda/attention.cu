// Decode attention on pages of any mix of formats: the entries, and the kernels of calls that read all pages, all of
// 16-bit numbers.
#include "cuda/attention_launch.cuh"

namespace kk::cuda {

int64_t attention_workspace(const AttentionParams& p, const CudaExec& exec) {
  if (p.selection.index) return sparse_attention_workspace(p, exec);
  int64_t rows = p.plan.nodes ? kMaxPlanDepth * p.B * p.Tq * p.Hq : 0;
  with_dense_tile(p, [&](auto d, auto nt, auto shared) {
    rows += make_layout<decltype(d)::value, decltype(nt)::value, decltype(shared)::value, false>(p, exec).whole;
  });
  return rows * partial_floats(p.Dv) * int64_t(sizeof(float));
}

void attention(const AttentionParams& p, const CudaExec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  check_pools(p);
  if (p.selection.index) return sparse_attention(p, exec);
  if (any_packed(p)) return packed_attention(p, exec);
  with_dense_tile(p, [&](auto d, auto nt, auto shared) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    constexpr bool Shared = decltype(shared)::value;
    if constexpr (!Shared || NT == 2 || D == 576) launch_dense<D, NT, false, Shared>(p, exec);
  });
}

}  // namespace kk::cuda
