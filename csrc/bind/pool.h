// From the tensors of a pool and its format number to kk::Pool.
#pragma once
#include <vector>

#include "bind/check.h"

namespace kk::bind {

// Format argument of the ops: k_number | v_number << 8 | two_caches << 16 | offloaded << 17.
struct FormatCode {
  Format k, v;
  bool two_caches;
  bool packed;  // on either side
};

// Pages of an offloaded pool stand in main memory; its tensor is a cache, whose slots are not the numbers in page tables.
enum class Offloaded { refused, taken };

// Names of the tensors of one pool in messages.
struct PoolNames {
  const char* record;  // uint8 [num_pages, Hkv, page_bytes]
  const char* k;       // or two 16-bit caches [num_pages, Hkv, page_size, D]
  const char* v;
};
extern const PoolNames kPoolNames[kMaxPools];  // "pool 0", ...

const char* format_name(Format f);
FormatCode format_code(const Check& c, const char* pool, int64_t code, Offloaded offloaded = Offloaded::refused);
// What the format allows: head dims 64 128 256 and multiples of 16 tokens when a side is packed, more when none is.
void check_geometry(const Check& c, const char* pool, const FormatCode& f, int64_t page_size, int64_t head_dim,
                    const char* head_dim_from);
// Of 16-bit rows; `more` is what else the caller takes.
void check_head_dim(const Check& c, int64_t head_dim, const char* from, const char* more = "");

// Binds (or checks) Hkv; D must be bound. `second` is the V cache when f.two_caches, else null.
Pool make_pool(Check& c, const PoolNames& names, const FormatCode& f, const Tensor& first, const Tensor* second,
               int64_t page_size, int64_t head_dim);
// As make_pool, and the pool is going to be written.
Pool make_writable_pool(Check& c, const PoolNames& names, const FormatCode& f, const Tensor& first,
                        const Tensor* second, int64_t page_size, int64_t head_dim);

// All pools of a PagedKV: formats[i] says whether pool i takes one or two of the tensors. Returns how many there are.
int make_pools(Check& c, const std::vector<Tensor>& tensors, const std::vector<int64_t>& formats, int64_t page_size,
               int64_t head_dim, const char* head_dim_from, Pool* pools, Offloaded offloaded = Offloaded::refused);

// As they come from torch.
struct TransformArguments {
  const std::optional<Tensor>& centre;
  const std::optional<Tensor>& balance;
  const std::optional<Tensor>& order;
};
// Hkv and D must be bound.
KeyTransform make_transform(Check& c, const TransformArguments& a);

// Slots of a CPU call are visible, so a write outside the pool is an error and not a corruption. Costs 0.3 ns each.
void check_slots(const Check& c, const View& slots, const char* pool, const Pool& p, int64_t page_size);

}  // namespace kk::bind
