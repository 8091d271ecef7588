// Pairs of rows of a chunk, with a gate for each channel: their part in the gradients of e, q, k and g, by a thread for a
// channel and 8 rows j. D_ij are running products, exact whatever the gates are. All sums of dg are sums over pairs, rows
// or columns that hold the gate: nothing is taken away again, so that strong gates do not drown in what weak ones leave.
#pragma once
#include "cuda/launch.cuh"

namespace kk::cuda {

constexpr int kPairRows = 8;

__device__ __forceinline__ void read_pairs(const float* from, float (&x)[kPairRows]) {
#pragma unroll
  for (int j = 0; j < kPairRows; j += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + j);
    x[j] = v.x, x[j + 1] = v.y, x[j + 2] = v.z, x[j + 3] = v.w;
  }
}

// Rows j of a channel and what rows i add to them, i ascending. dl, dp: dL_ij and dP_ij.
struct ChannelPairs {
  float k[kPairRows], dk[kPairRows];
  float decay[kPairRows];   // D_ij
  float column[kPairRows];  // sum over i of y_ij = (dL_ij e_i + dP_ij q_i) k_j D_ij, what alpha in D_ij has as gradient

  // A row of a later block. Returns the sum of y_ij over j.
  __device__ __forceinline__ float add(const float (&dl)[kPairRows], const float (&dp)[kPairRows], float alpha, float e,
                                       float q, float& de, float& dq) {
    float sum_e = 0.0f, sum_q = 0.0f;
#pragma unroll
    for (int j = 0; j < kPairRows; ++j) {
      decay[j] *= alpha;
      const float w = decay[j] * k[j], x = fmaf(dl[j], e, dp[j] * q);
      sum_e = fmaf(dl[j], w, sum_e);
      sum_q = fmaf(dp[j], w, sum_q);
      dk[j] = fmaf(x, decay[j], dk[j]);
      column[j] = fmaf(x, w, column[j]);
    }
    de += sum_e, dq += sum_q;
    return fmaf(e, sum_e, q * sum_q);
  }

  // Row i of these rows themselves; dl = 0 from j = i on, dp after it. dg[t] takes the pairs i >= t > j.
  __device__ __forceinline__ void add_own(int i, const float (&dl)[kPairRows], const float (&dp)[kPairRows],
                                          float alpha, float e, float q, float& de, float& dq, float (&dg)[kPairRows]) {
    float before = 0.0f;
#pragma unroll
    for (int j = 0; j < kPairRows; ++j) {
      if (j <= i) dg[j] += before;
      if (j < i) decay[j] *= alpha;
      const float w = decay[j] * k[j], x = fmaf(dl[j], e, dp[j] * q);
      de = fmaf(dl[j], w, de);
      dq = fmaf(dp[j], w, dq);
      dk[j] = fmaf(x, decay[j], dk[j]);
      if (j < i) before = fmaf(x, w, before);
    }
  }
};

}  // namespace kk::cuda
