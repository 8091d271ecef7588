#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/score.h"
#include "kvkernels/summary.h"

namespace kk {

// Scores of runs of tokens from their minmax or mean records. With q+ = max(q, 0) and q- = min(q, 0) both are dot products:
// minmax is q+.max + q-.min, mean is q.mean.
struct ScorePagesParams : ScoreCommon {  // n = max_pages, or num_segments
  SummaryLayout layout;
  // As in PageSummariesParams; num_pages of each for bounds of page ids.
  const uint8_t* records[kMaxPools];
  int64_t num_pages[kMaxPools];
  int num_pools;
  // [B, num_segments + 1] or null: pages. Segments that are empty or end past seq_lens score -inf; page_table is not read.
  const int32_t* offsets;
  int64_t offsets_stride;
  void* workspace;  // score_pages_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t score_pages_workspace(const ScorePagesParams& p, const CpuExec& exec);
void score_pages(const ScorePagesParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t score_pages_workspace(const ScorePagesParams& p, const CudaExec& exec);
void score_pages(const ScorePagesParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
