// Decode attention on pages of any mix of formats: the entries, and the kernels of calls that read all pages.
#include <type_traits>

#include "cuda/attention_launch.cuh"

namespace kk::cuda {
namespace {

// Calls f(D, NT, Shared). Kernels without Shared have no plan and one row tile per group.
template <typename F>
void with_tile(const AttentionParams& p, F&& f) {
  const int64_t rows = most_rows(p);
  const bool several = p.plan.nodes || rows > 16, packed = any_packed(p);
  one_of<64, 80, 96, 112, 128, 192, 256, 576>("attention: head_dim", p.D, [&](auto d) {
    constexpr int D = decltype(d)::value;
    if constexpr (D == 576) {
      f(d, Int<1>{}, std::true_type{});
    } else {
      if (rows <= 8 && !several) return f(d, Int<1>{}, std::false_type{});
      // Packed formats at 256: two tiles take more registers than there are.
      if constexpr (D == 256)
        if (packed) return f(d, Int<1>{}, std::true_type{});
      if (several) return f(d, Int<2>{}, std::true_type{});
      f(d, Int<2>{}, std::false_type{});
    }
  });
}

template <int D, int NT, bool Packed, bool Shared>
void launch_dense(const AttentionParams& p, const CudaExec& exec) {
  launch_attention<D, NT, Packed, Shared, false>(make_params<D, NT, Packed, Shared, false>(p, exec), exec);
}

}  // namespace

int64_t attention_workspace(const AttentionParams& p, const CudaExec& exec) {
  if (p.selection.index) return sparse_attention_workspace(p, exec);
  int64_t rows = p.plan.nodes ? kMaxPlanDepth * p.B * p.Tq * p.Hq : 0;
  with_tile(p, [&](auto d, auto nt, auto shared) {
    rows += make_layout<decltype(d)::value, decltype(nt)::value, decltype(shared)::value, false>(p, exec).whole;
  });
  return rows * partial_floats(p.Dv) * int64_t(sizeof(float));
}

void attention(const AttentionParams& p, const CudaExec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  check_pools(p);
  if (p.selection.index) return sparse_attention(p, exec);
  with_tile(p, [&](auto d, auto nt, auto shared) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    constexpr bool Shared = decltype(shared)::value;
    if constexpr (!Shared || NT == 2 || D == 576) {
      if (!any_packed(p)) return launch_dense<D, NT, false, Shared>(p, exec);
    }
    if constexpr (D == 64 || D == 128 || (D == 256 && NT == 1)) {
      launch_dense<D, NT, true, Shared>(p, exec);
    }
  });
}

}  // namespace kk::cuda
