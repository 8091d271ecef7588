#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Decode attention directly on pages of any mix of formats. Query i of Tq sees keys j <= L - Tq + i (causal, aligned at the
// end) and, with a window, j >= L - Tq + i - window_left.
struct QuantAttentionParams {
  const void* q;  // [B, Tq, Hq, D] dtype, strides in elements
  void* out;      // [B, Tq, Hq, D] dtype
  float* lse;     // [B, Tq, Hq] contiguous, natural log, or null
  int64_t q_batch, q_token, q_head, out_batch, out_token, out_head;
  DType dtype;  // f32 f16 bf16
  int64_t B, Tq, Hq, Hkv, D;
  Pool pools[kMaxPools];
  int num_pools;
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart; entry = pool << 28 | page
  int64_t max_pages, table_stride, page_size;
  const int32_t* seq_lens;  // [B]  tokens; 0 gives out = 0, lse = -inf
  KeyTransform transform;
  float scale;                // scores are scale * q.k
  int64_t window_left;        // < 0: no window
  float softcap;              // 0: none; else cap * tanh(score / cap)
  const float* sinks;         // [Hq] logits that join the softmax denominator (and lse), or null
  const float* alibi_slopes;  // [B or 1, Hq] rows alibi_stride apart, or null: adds -slope * (L - Tq + i - j)
  int64_t alibi_stride;
  int64_t split_tokens;  // > 0: partial results cover the intervals [n, n + split_tokens), whatever the threads and
                         // batch, so that results are bit-identical; 0: chosen from the work at hand. Multiple of 16.
  void* workspace;       // quant_attention_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t quant_attention_workspace(const QuantAttentionParams& p, const CpuExec& exec);
void quant_attention(const QuantAttentionParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t quant_attention_workspace(const QuantAttentionParams& p, const CudaExec& exec);
void quant_attention(const QuantAttentionParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
