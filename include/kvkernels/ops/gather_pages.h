#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Brings selected pages from a pool in host memory into a cache of `slots` pages per sequence, and only those that are not
// there. Every KV head has its own pages in the slots: the record of (sequence b, head h, slot s) is page b * slots + s, head
// h of the cache.
//   for every (b, h), in the order of the list: a page of another pool than `pool` keeps its page-table entry; one that has a
//   slot keeps that; any other takes the next slot, from hand[b, h] on and round about, that holds no page of this list.
struct GatherPagesParams {
  const uint8_t* host;  // page 0, head 0
  uint8_t* cache;
  int64_t host_page, host_head, host_pages;  // strides in bytes, number of pages
  int64_t cache_page, cache_head;
  int64_t record_bytes;       // multiple of 16
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart
  int64_t max_pages, table_stride;
  int32_t pool;
  const int32_t* pages;  // [B, Hkv, count] logical pages, ascending, ends at the first negative one
  int64_t pages_batch, pages_head;
  int64_t B, Hkv, count, slots;  // count <= slots
  int32_t* slot_of;              // [B, Hkv, max_pages] slot of a logical page, or -1
  int32_t* page_of;              // [B, Hkv, slots] logical page in a slot, or -1
  int32_t* hand;                 // [B, Hkv]
  int32_t* entries;              // [B, Hkv, count] page-table entries for attention; -1 behind the list
  void* workspace;               // gather_pages_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t gather_pages_workspace(const GatherPagesParams& p, const CpuExec& exec);
void gather_pages(const GatherPagesParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t gather_pages_workspace(const GatherPagesParams& p, const CudaExec& exec);
void gather_pages(const GatherPagesParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
