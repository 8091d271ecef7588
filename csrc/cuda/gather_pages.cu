// Two kernels: a block finds the slots of a (sequence, KV head), then several blocks copy what is missing. Host memory is
// pinned and read by its address, so that the list need not come to the host.
#include "kvkernels/ops/gather_pages.h"

#include "cuda/rows.cuh"

namespace kk::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kCopyThreads = 256, kCopyBlocks = 16;  // of a (sequence, KV head)
constexpr int kAhead = 4;                            // loads of a thread under way: PCIe takes 1 to 2 us to answer
constexpr int64_t kMaxSlots = 1 << 18;               // a bit of shared memory each: 32 KB

struct Copy {
  int32_t page;  // of the host
  int32_t slot;  // of the sequence; until that is known, the place in the list
};
// In the workspace, for each (b, h).
struct Copies {
  int32_t* number;
  Copy* copy;  // [count]
  __device__ Copies(const GatherPagesParams& p, int64_t row)
      : number(static_cast<int32_t*>(p.workspace) + p.B * p.Hkv * p.count * 2 + row),
        copy(static_cast<Copy*>(p.workspace) + row * p.count) {}
};

// The number of threads before this one whose flag is set, and `total` of the block. All threads call it.
__device__ __forceinline__ int rank_in_block(int (&sums)[kWarps], bool flag, int& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned votes = __ballot_sync(kWholeWarp, flag);
  if (lane == 0) sums[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1u));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int n = sums[w];
    before += w < warp ? n : 0;
    total += n;
  }
  __syncthreads();
  return before;
}

__global__ __launch_bounds__(kThreads) void assign_slots_kernel(GatherPagesParams p) {
  KK_DYN_SMEM(uint32_t, kept);  // a bit per slot: it holds a page of the list
  KK_SHARED(int, sums, [kWarps]);
  KK_SHARED(int, end, [1]);
  const int64_t row = blockIdx.x, b = row / p.Hkv, h = row % p.Hkv;
  const int32_t* pages = p.pages + b * p.pages_batch + h * p.pages_head;
  const int32_t* table = p.page_table + b * p.table_stride;
  int32_t *slot_of = p.slot_of + row * p.max_pages, *page_of = p.page_of + row * p.slots;
  int32_t* entries = p.entries + row * p.count;
  const Copies copies(p, row);
  const int tid = static_cast<int>(threadIdx.x), count = static_cast<int>(p.count), slots = static_cast<int>(p.slots);
  const auto entry_of = [&](int slot) { return p.pool << 28 | static_cast<int32_t>(b * slots + slot); };

  if (tid == 0) *end = count;
  for (int i = tid; i < (slots + 31) / 32; i += kThreads) kept[i] = 0;
  __syncthreads();
  for (int i = tid; i < count; i += kThreads)
    if (pages[i] < 0) atomicMin(end, i);
  __syncthreads();
  const int listed = *end;
  for (int i = listed + tid; i < count; i += kThreads) entries[i] = -1;

  int misses = 0;
  for (int first = 0; first < listed; first += kThreads) {
    const int i = first + tid;
    bool missing = false;
    int32_t entry = 0;
    if (i < listed) {
      const int32_t page = pages[i], slot = slot_of[page];
      entry = table[page];
      const bool offloaded = entry >> 28 == p.pool;
      missing = offloaded && slot < 0;
      if (slot >= 0) atomicOr(&kept[slot / 32], 1u << slot % 32);
      if (!missing) entries[i] = offloaded ? entry_of(slot) : entry;
    }
    int all;
    const int rank = misses + rank_in_block(sums, missing, all);
    if (missing) copies.copy[rank] = {entry & kPageMask, i};
    misses += all;
  }
  if (tid == 0) *copies.number = misses;
  __syncthreads();

  const int hand = p.hand[row];
  int taken = 0;
  for (int first = 0; first < slots && taken < misses; first += kThreads) {
    const int at = hand + first + tid, slot = at < slots ? at : at - slots;
    const bool unused = first + tid < slots && !(kept[slot / 32] >> slot % 32 & 1u);
    int all;
    const int rank = taken + rank_in_block(sums, unused, all);
    taken += all;
    if (!unused || rank >= misses) continue;
    const int i = copies.copy[rank].slot;
    const int32_t page = pages[i], old = page_of[slot];
    copies.copy[rank].slot = slot;
    if (old >= 0) slot_of[old] = -1;
    slot_of[page] = slot;
    page_of[slot] = page;
    entries[i] = entry_of(slot);
    if (rank == misses - 1) p.hand[row] = slot + 1 < slots ? slot + 1 : 0;
  }
}

__global__ __launch_bounds__(kCopyThreads) void copy_pages_kernel(GatherPagesParams p) {
  const int64_t row = blockIdx.x / kCopyBlocks, b = row / p.Hkv, h = row % p.Hkv, n = p.record_bytes / 16;
  const Copies copies(p, row);
  const int number = *copies.number;
  for (int i = blockIdx.x % kCopyBlocks; i < number; i += kCopyBlocks) {
    const Copy c = copies.copy[i];
    const uint4* from = reinterpret_cast<const uint4*>(p.host + c.page * p.host_page + h * p.host_head);
    uint4* to = reinterpret_cast<uint4*>(p.cache + (b * p.slots + c.slot) * p.cache_page + h * p.cache_head);
    for (int64_t first = threadIdx.x; first < n; first += kCopyThreads * kAhead) {
      uint4 x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + j * kCopyThreads < n) x[j] = from[first + j * kCopyThreads];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + j * kCopyThreads < n) to[first + j * kCopyThreads] = x[j];
    }
  }
}

}  // namespace

int64_t gather_pages_workspace(const GatherPagesParams& p, const CudaExec&) {
  return p.B * p.Hkv * (p.count * static_cast<int64_t>(sizeof(Copy)) + 4);
}

void gather_pages(const GatherPagesParams& p, const CudaExec& exec) {
  if (p.slots > kMaxSlots)
    fail(("gather_pages: at most " + std::to_string(kMaxSlots) + " slots on CUDA, got " + std::to_string(p.slots))
             .c_str());
  const int64_t rows = p.B * p.Hkv;
  if (rows * kCopyBlocks >> 31) fail("gather_pages: B * Hkv is too large for one launch on CUDA");
  const auto kept_bytes = static_cast<size_t>((p.slots + 31) / 32 * 4);
  launch(assign_slots_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), kept_bytes, exec.stream, p);
  launch(copy_pages_kernel, dim3(static_cast<unsigned>(rows * kCopyBlocks)), dim3(kCopyThreads), 0, exec.stream, p);
}

}  // namespace kk::cuda
