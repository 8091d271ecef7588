#pragma once
#include "kvkernels/exec.h"

namespace kk {

// The items (pages, or tokens) of the k highest scores of every row, in ascending order, -1 behind them. A sequence has
// m = ceil(seq_lens / item_tokens) items, at most n. Its first `sink` and last `recent` items are always among the k. Of
// equal scores the lower item wins; NaN is above everything; -0 equals 0. The same on every device.
struct SelectPagesParams {
  const float* scores;  // [B, H, n]
  int64_t score_batch, score_head;
  const int32_t* seq_lens;  // [B]
  // [B, H] or null: items of each row, instead of k. Brought into [min(sink + recent, k), k].
  const int32_t* row_k;
  int64_t row_k_batch, row_k_head;
  int64_t B, H, n, k;
  int64_t item_tokens;
  int64_t sink, recent;  // sink + recent <= k
  int32_t* out;          // [B, H, k] contiguous
  void* workspace;       // select_pages_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t select_pages_workspace(const SelectPagesParams& p, const CpuExec& exec);
void select_pages(const SelectPagesParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t select_pages_workspace(const SelectPagesParams& p, const CudaExec& exec);
void select_pages(const SelectPagesParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
