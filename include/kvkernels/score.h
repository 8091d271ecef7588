// What the ops that score pages and tokens have in common.
#pragma once
#include "kvkernels/pool.h"

namespace kk {

// From the scores of the query rows of a KV head (its query heads, of all Tq tokens) to one number. The softmax of a row
// runs over all items of the sequence; its maximum or sum over the rows is a probability mass.
enum class Reduce : int32_t { max = 0, sum = 1, softmax_max = 2, softmax_sum = 3 };

// Query rows and where their scores go. No mask: which tokens a query may see is attention's business.
struct ScoreCommon {
  const void* q;  // [B, Tq, Hq, D] dtype, strides in elements
  int64_t q_batch, q_token, q_head;
  DType dtype;  // f32 f16 bf16
  int64_t B, Tq, Hq, D, Hkv;
  float scale;  // scores are scale * what stands for q.k
  Reduce reduce;
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart
  int64_t max_pages, table_stride, page_size;
  const int32_t* seq_lens;  // [B]
  float* out;               // [B, Hkv, n] contiguous; -inf for items past the end of a sequence
  int64_t n;
};

}  // namespace kk
