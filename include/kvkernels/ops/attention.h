#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/plan_node.h"
#include "kvkernels/pool.h"

namespace kk {

// Which query heads read which KV head. A group is the query heads that share a K head and a V head; the kernels read K and
// V once per group. Regular: group g has heads g * Hq / groups ... ; else `mapped` and the lists below.
constexpr int kMaxMappedHeads = 256;
struct HeadMap {
  bool mapped;
  uint8_t order[kMaxMappedHeads];      // query heads, those of one group together
  int16_t first[kMaxMappedHeads + 1];  // of group g in order
};

// Shared nodes end before the sequences' own queries, so causal and tree masks never cut them.
struct SharingPlan {
  const PlanNode* nodes;  // [num_nodes], parents before children; null: every sequence is a node of its own
  const int32_t* order;   // [B]
  const int32_t* leaf;    // [B] or -1 for an empty sequence
  int64_t num_nodes;      // 2 B
};

// One more key and value per sequence and KV head, whose score is scale * q.k + bias: what stands for tokens that were
// dropped (bias = ln of their number). Softcap applies before the bias, ALiBi does not. bias -inf: none.
struct ExtraToken {
  const void* k;      // [B, Hkv, D] dtype of q, contiguous in the last dim; null: no such token
  const void* v;      // [B, Hkv, Dv]
  const float* bias;  // [B, Hkv]
  int64_t k_batch, k_head, v_batch, v_head, bias_batch, bias_head;  // strides in elements; 0 where broadcast
};

// What sparse attention reads of each sequence and KV head: runs of `tokens` tokens, run i from position index[i] * tokens
// to the end of the run or of the sequence. Rows see of them what they would see anyway, and nothing else.
struct Selection {
  const int32_t* index;  // [B, Hkv, count] ascending, ends at the first negative one; null: everything is read
  int64_t count, index_batch, index_head;  // strides in elements, 0 where sequences or heads have one list
  int64_t tokens;                          // page_size, or 1
  // [B, Hkv, count] or null: the page-table entries of the runs, instead of page_table, which is then not read. Only with
  // tokens == page_size.
  const int32_t* entries;
  int64_t entries_batch, entries_head;
};

// Decode attention directly on pages of any mix of formats. Query i of Tq sees keys j <= L - Tq + i (causal, aligned at the
// end) and, with a window, j >= L - Tq + i - window_left.
struct AttentionParams {
  const void* q;  // [B, Tq, Hq, D] dtype, strides in elements
  void* out;      // [B, Tq, Hq, Dv] dtype
  float* lse;     // [B, Tq, Hq] contiguous, natural log, or null
  int64_t q_batch, q_token, q_head, out_batch, out_token, out_head;
  DType dtype;  // f32 f16 bf16
  int64_t B, Tq, Hq, D;
  int64_t Dv;   // D, or 512 with D 576
  int64_t Hkv;  // groups; K head of group g: g / k_share, V head: g / v_share
  int64_t k_share, v_share;
  HeadMap heads;
  Pool pools[kMaxPools];  // V may lie inside K (MLA: v == k, same strides, Dv < D)
  int num_pools;
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart; entry = pool << 28 | page
  int64_t max_pages, table_stride, page_size;
  const int32_t* seq_lens;  // [B]  tokens; 0 gives out = 0, lse = -inf
  KeyTransform transform;
  float scale;          // scores are scale * q.k
  int64_t window_left;  // < 0: no window
  const int32_t*
      head_windows;           // [Hkv, 2] contiguous (sink, window) or null: query at position i sees keys j < sink and
                              // j >= i - window, window < 0: all. Not together with window_left.
  float softcap;              // 0: none; else cap * tanh(score / cap)
  const float* sinks;         // [Hq] logits that join the softmax denominator (and lse), or null
  const float* alibi_slopes;  // [B or 1, Hq] rows alibi_stride apart, or null: adds -slope * (query - key position)
  int64_t alibi_stride;
  // [B, Tq] rows tree_stride apart, or null: bit j says whether query i sees token L - Tq + j, instead of the causal rule.
  // The position of such a token is then L - Tq + (number of bits it has) - 1, its depth in the tree: windows and ALiBi
  // count along a branch.
  const int32_t* tree_mask;
  int64_t tree_stride;
  ExtraToken extra;
  SharingPlan plan;  // not together with window_left, head_windows, split_tokens, selection
  Selection selection;
  int64_t split_tokens;  // > 0: partial results cover the intervals [n, n + split_tokens), whatever the threads and
                         // batch, so that results are bit-identical; 0: chosen from the work at hand. Multiple of 16.
                         // With a selection intervals are counted along its tokens.
  void* workspace;       // attention_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t attention_workspace(const AttentionParams& p, const CpuExec& exec);
void attention(const AttentionParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t attention_workspace(const AttentionParams& p, const CudaExec& exec);
void attention(const AttentionParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
