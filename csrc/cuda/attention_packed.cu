// Attention where pages of packed formats are among those that are read, and all are.
#include "cuda/attention_launch.cuh"

namespace kk::cuda {

void packed_attention(const AttentionParams& p, const CudaExec& exec) {
  with_dense_tile(p, [&](auto d, auto nt, auto shared) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    if constexpr (D == 64 || D == 128 || (D == 256 && NT == 1))
      launch_dense<D, NT, true, decltype(shared)::value>(p, exec);
  });
}

}  // namespace kk::cuda
