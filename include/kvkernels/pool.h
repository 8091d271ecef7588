// Where the pages of one format lie.
#pragma once
#include "kvkernels/format.h"

namespace kk {

constexpr int kMaxPools = 8;                  // a page-table entry has 3 bits for the pool ...
constexpr int32_t kPageMask = (1 << 28) - 1;  // ... and 28 for the page; the sign bit stays clear

// Strides in bytes. Packed records: k_token and v_token describe 16-bit sides and are 0 otherwise (a packed side knows its
// own layout). Two separate 16-bit caches [num_pages, Hkv, page_size, D] of any strides are a pool too.
struct Pool {
  uint8_t* k;  // K side of page 0, KV head 0
  uint8_t* v;  // V side of page 0, KV head 0
  int64_t k_page, k_head, k_token;
  int64_t v_page, v_head, v_token;
  int64_t num_pages;
  Format k_format, v_format;
};

// mu, t and the channel order of the key transform k' = H (diag(t) (k - mu))[order]; applies to formats that rotate, the order
// to those of two parts alone (core/halves.h). Null: mu = 0, t = 1, channels as they come.
struct KeyTransform {
  const float* centre;   // [Hkv, D]
  const float* balance;  // [Hkv, D]
  const int32_t* order;  // [Hkv, D] a permutation of 0 .. D - 1 per head: channel order[j] is stored as number j
};

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

}  // namespace kk
