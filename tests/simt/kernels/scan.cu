// The delta rule, token by token: a block per head, a thread per value channel with its row of the state in registers.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "selftest.h"

namespace selftest {
namespace {

constexpr int D = 64, kChunk = 16;

template <Bug bug>
__global__ void __launch_bounds__(D)
    scan_kernel(const float* q, const float* k, const float* v, const float* beta, float* o, int tokens) {
  KK_SHARED(float, chunk_q, [kChunk][D]);
  KK_SHARED(float, chunk_k, [kChunk][D]);
  KK_SHARED(float, chunk_beta, [kChunk]);
  const size_t first = static_cast<size_t>(blockIdx.x) * tokens;
  const int d = threadIdx.x;
  float state[D] = {};
  for (int t0 = 0; t0 < tokens; t0 += kChunk) {
    const int n = min(kChunk, tokens - t0);
    for (int i = d; i < n * D / 4; i += D) {
      reinterpret_cast<float4*>(chunk_q)[i] = __ldg(reinterpret_cast<const float4*>(q + (first + t0) * D) + i);
      reinterpret_cast<float4*>(chunk_k)[i] = __ldg(reinterpret_cast<const float4*>(k + (first + t0) * D) + i);
    }
    if (d < n) chunk_beta[d] = beta[first + t0 + d];
    __syncthreads();
    for (int t = 0; t < n; ++t) {
      const size_t at = (first + t0 + t) * D + d;
      float known = 0, out = 0;
      for (int i = 0; i < D; ++i) known += state[i] * chunk_k[t][i];
      const float u = chunk_beta[t] * (v[at] - known);
      for (int i = 0; i < D; ++i) {
        state[i] += u * chunk_k[t][i];
        out += state[i] * chunk_q[t][i];
      }
      o[at] = out;
    }
    if (bug != Bug::scan_no_barrier) __syncthreads();
  }
}

}  // namespace

void scan(const float* q, const float* k, const float* v, const float* beta, float* o, int heads, int tokens, Bug bug) {
  plant<Bug::none, Bug::scan_no_barrier>(bug, [&](auto planted) {
    kk::cuda::launch(scan_kernel<planted.bug>, heads, D, 0, nullptr, q, k, v, beta, o, tokens);
  });
}

}  // namespace selftest
