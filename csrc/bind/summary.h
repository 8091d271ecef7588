// Summaries of pages and segments: their layout and the tensors that hold their records.
#pragma once
#include <vector>

#include "bind/check.h"
#include "kvkernels/summary.h"

namespace kk::bind {

SummaryLayout make_layout(const Check& c, SummaryKind kind, int64_t bits, int64_t head_dim, int64_t channels,
                          int64_t page_size);

// uint8 [num_pages, Hkv, record_bytes] contiguous, pool by pool; binds or checks Hkv.
std::vector<View> check_records(Check& c, const std::vector<Tensor>& records, const SummaryLayout& layout);

// int32 [Hkv, r] contiguous; binds r. On CPU every one is below D.
View check_channels(Check& c, const Tensor& channels, int64_t head_dim);

// int32 [B, num_segments + 1]; ascending, seen on CPU.
View check_segments(Check& c, const Tensor& segments);

}  // namespace kk::bind
