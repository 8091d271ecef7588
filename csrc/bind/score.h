// What the ops that score pages and tokens have in common.
#pragma once
#include "bind/check.h"
#include "bind/queries.h"
#include "kvkernels/score.h"

namespace kk::bind {

struct ScoreArguments {
  const Tensor& page_table;
  const Tensor& seq_lens;
  int64_t page_size;
  double scale;
  int64_t reduce;
};

// All but n and out. Hkv heads of keys or records, whose number came from `from`.
void fill_score(Check& c, ScoreCommon& p, const Queries& q, int64_t Hkv, const char* from, const ScoreArguments& a);
// n items of each sequence, by what they are called.
void fill_scores_out(Check& c, ScoreCommon& p, int64_t n, const char* name, const Tensor& out);

}  // namespace kk::bind
