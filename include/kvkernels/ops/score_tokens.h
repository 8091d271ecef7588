#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/score.h"
#include "kvkernels/summary.h"

namespace kk {

// Scores of single tokens: full q.k from pages of any formats, or from some channels in their label cache. Or the best
// token's of each page, per query row, before rows are reduced.
struct ScoreTokensParams : ScoreCommon {  // n = max_pages * page_size, or max_pages with best_of_page
  bool best_of_page;
  // Label cache, where records[0] is not null:
  SummaryLayout layout;
  const uint8_t* records[kMaxPools];
  const int32_t* channels;  // [Hkv, layout.channels] contiguous
  // Else keys. num_pages of the pools bounds page ids in either case.
  Pool pools[kMaxPools];
  int num_pools;
  KeyTransform transform;
  void* workspace;  // score_tokens_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t score_tokens_workspace(const ScoreTokensParams& p, const CpuExec& exec);
void score_tokens(const ScoreTokensParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t score_tokens_workspace(const ScoreTokensParams& p, const CudaExec& exec);
void score_tokens(const ScoreTokensParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
