// What sparse attention reads: lists of pages or of tokens.
#pragma once
#include <optional>

#include "bind/check.h"
#include "bind/page_table.h"
#include "kvkernels/ops/attention.h"

namespace kk::bind {

// B, Hkv and page_size of p are known, and bound.
Selection make_selection(Check& c, const AttentionParams& p, const std::optional<Tensor>& pages,
                         const std::optional<Tensor>& tokens, const std::optional<Tensor>& entries);

// Values: ascending, within the sequence, of pages that exist.
void check_selection(const Check& c, const AttentionParams& p, const PageTable& table);

}  // namespace kk::bind
