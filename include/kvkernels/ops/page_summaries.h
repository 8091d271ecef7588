#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"
#include "kvkernels/summary.h"

namespace kk {

// Records of runs of tokens (summary.h) from their keys, as read_kv gives them in fp32. Runs are the pages of each sequence
// as far as seq_lens, or the segments [offsets[s], offsets[s + 1]) of its tokens. Means are sums in the order of the tokens
// divided by their number. Labels of tokens past seq_lens in a page are zeros.
struct PageSummariesParams {
  Pool pools[kMaxPools];
  int num_pools;
  KeyTransform transform;
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart
  int64_t max_pages, table_stride, page_size;
  const int32_t* seq_lens;  // [B]
  // [B] or null: runs that end at or before start[b] stay as they are
  const int32_t* start;
  int64_t B, Hkv, D;
  SummaryLayout layout;
  const int32_t* channels;  // [Hkv, layout.channels] of a label cache, contiguous; else null
  // [B, num_segments + 1] ascending, rows offsets_stride apart, or null: pages. Not with channels. A segment that is empty
  // or ends past seq_lens stays as it is.
  const int32_t* offsets;
  int64_t num_segments, offsets_stride;
  // Of pages: one for each pool, [num_pages, Hkv, summary_bytes]. Of segments: records[0] [B * num_segments, Hkv, ...].
  // Contiguous, 16-byte aligned.
  uint8_t* records[kMaxPools];
};

namespace cpu {
void page_summaries(const PageSummariesParams& p, const CpuExec& exec);
}
namespace cuda {
void page_summaries(const PageSummariesParams& p, const CudaExec& exec);
}

}  // namespace kk
