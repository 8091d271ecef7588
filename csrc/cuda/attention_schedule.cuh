// How an attention launch shares its work: units (up to 64 tokens of one page), segments (a range of units of one
// sequence, KV head and row tile), and the places of partial results. Host and both kernels see the same Plan.
//
// Blocks take equal shares of all units, so that at most two segments of a block are parts of a (sequence, KV head, row
// tile); those go to the workspace and a second kernel merges them. Both kernels find the shares by the same arithmetic
// from seq_lens: no plan on the host, no atomics. With split_tokens segments are fixed intervals, whatever the batch.
// Source: equal shares as in FlashMLA's get_decoding_sched_meta; Dao 2023, Flash-Decoding (split over tokens, merge).
#pragma once
#include "cuda/rows.cuh"
#include "kvkernels/ops/attention.h"

namespace kk::cuda {

constexpr int kMaxWarps = 4;
constexpr int kUnitsPerBlock = kMaxWarps;  // a smaller share would leave warps idle and make more parts to merge

// The queries that the K side of a format is multiplied with. Each kind that the pools need is made once per segment.
enum Queries : int { kQueriesF16, kQueriesBf16, kQueriesRotated, kQueriesRotatedRest, kQueriesPlain, kQueryKinds };

// One side of a page of packed format is up to three arrays. In a stage they lie behind each other.
struct SideArray {
  int offset;  // in the side
  int stride;  // bytes of a token
  int fixed;   // bytes that belong to no token (channel scales of kivi2)
};
struct SideArrays {
  SideArray array[3];
};
struct PoolPlan {
  SideArrays k, v;  // k may be the whole page, which has both sides in one piece; v is empty then
  int tokens;       // of a stage: 16 where a side has 16-bit rows, else a unit
  int v_offset;     // of the V side in a stage
};

struct Plan {
  int group, rows, row_tiles;  // rows = Tq * group, in tiles of 8 NT
  int unit;                    // tokens; divides page_size and split_tokens, or is 16
  int64_t splits;              // of a sequence, at most; 0: equal shares
  int blocks, warps, stages;
  // Shared memory: queries of each kind | per warp: scores of a stage, stages, sums (over the stages if they may)
  int queries[kQueryKinds];  // offset; < 0: not needed
  int warps_offset, warp_bytes, stages_offset, stage_bytes, sums_offset;
  uint32_t page_magic;  // x / page_size = x * page_magic >> page_shift for 0 <= x < 2^31
  int page_shift;
  PoolPlan pools[kMaxPools];
  int64_t smem;
  bool mixed_basis;    // the pools' V sums have different bases
  bool rotate_at_end;  // all of them are rotated
  bool q_vector, out_vector;
  float row_factor;  // on the weights of 16-bit values: kWeightFactor, or 1 where bf16 is among them and might overflow
  uint32_t bias;     // kBias
  float* partials;   // [2 blocks] or [B, Hkv, row_tiles, splits] slots: sums [8 NT][D], then State [8 NT]
};

struct Params : AttentionParams {
  Plan plan;
};

struct State {
  float m, l;  // running maximum in units of log 2, sum of exp2(score - m)
};

KK_HD int64_t slot_floats(int64_t D, int tile_rows) { return tile_rows * (D + 2); }

// ---- geometry, the same in both kernels

struct Visible {
  int len, begin;         // tokens that a query may see: [begin, len)
  int first_unit, units;  // units from first_unit on
};

__device__ __forceinline__ Visible visible(const Params& p, int64_t b) {
  const int64_t room = p.max_pages * p.page_size;
  const int64_t len = p.seq_lens[b] < 0 ? 0 : p.seq_lens[b] > room ? room : p.seq_lens[b];
  const int64_t first = len - p.Tq - p.window_left;
  Visible v;
  v.len = static_cast<int>(len);
  v.begin = p.window_left >= 0 && first > 0 ? static_cast<int>(first) : 0;
  v.first_unit = v.begin / p.plan.unit;
  v.units = len > 0 ? (v.len - 1) / p.plan.unit + 1 - v.first_unit : 0;
  return v;
}

// Fixed intervals of split_tokens. begin(i): first unit of the i-th, counted from the sequence's first visible unit.
struct Splits {
  int64_t first, count;
  int units_each;
  Visible v;
  __device__ Splits(const Params& p, const Visible& visible) : first(0), count(0), units_each(1), v(visible) {
    if (p.plan.splits == 0 || v.units == 0) return;
    units_each = static_cast<int>(min(p.split_tokens / p.plan.unit, int64_t(1) << 30));
    first = v.first_unit / units_each;
    count = (v.first_unit + v.units - 1) / units_each - first + 1;
  }
  __device__ int64_t begin(int64_t i) const {
    return min(max((first + i) * units_each - v.first_unit, int64_t(0)), int64_t(v.units));
  }
};

// Equal shares: block k of n has units [all k / n, all (k + 1) / n) of the list (sequence, KV head, row tile, unit).
struct Shares {
  int64_t all, n;
  __device__ Shares(const Params& p, int64_t units) : all(units) {
    n = min((all + kUnitsPerBlock - 1) / kUnitsPerBlock, int64_t(p.plan.blocks));
  }
  __device__ int64_t begin(int64_t k) const { return all * k / n; }
  __device__ int64_t block_of(int64_t unit) const { return ((unit + 1) * n - 1) / all; }
};

__device__ __forceinline__ int64_t warp_sum(int64_t x) {
#pragma unroll
  for (int h = 1; h < 32; h *= 2) x += __shfl_xor_sync(kWholeWarp, static_cast<long long>(x), h);
  return x;
}
// Of all threads; a block calls it together.
__device__ __forceinline__ int64_t block_sum(int64_t x) {
  KK_SHARED(int64_t, parts, [kMaxWarps]);
  x = warp_sum(x);
  __syncthreads();  // the parts of the call before were read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) x += parts[i];
  return x;
}

// Units, per row tile and KV head, of the sequences before b and of all.
struct UnitCount {
  int64_t before, all;
};
__device__ __forceinline__ UnitCount count_units(const Params& p, int64_t b) {
  int64_t before = 0, all = 0;
  for (int64_t i = threadIdx.x; i < p.B; i += blockDim.x) {
    const int64_t n = visible(p, i).units;
    all += n;
    before += i < b ? n : 0;
  }
  return {block_sum(before), block_sum(all)};
}

// The sequence that holds `unit` of the list, and the number of units before it.
struct Place {
  int64_t b, before;
};
__device__ __forceinline__ Place find_unit(const Params& p, int64_t unit, int64_t heads) {
  KK_SHARED(Place, found, [1]);
  int64_t before = 0;
  for (int64_t first = 0;; first += blockDim.x) {
    const int64_t b = first + threadIdx.x, n = b < p.B ? visible(p, b).units * heads : 0;
    const int64_t all = block_sum(n);
    if (unit >= before + all) {
      before += all;
      continue;
    }
    // sum of the threads before this one: of whole warps, then of lanes
    KK_SHARED(int64_t, warps, [kMaxWarps]);
    const int64_t own = warp_sum(n);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    for (int i = 0; i < static_cast<int>(threadIdx.x / 32); ++i) before += warps[i];
    int64_t up_to = n;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
      const int64_t x = __shfl_up_sync(kWholeWarp, static_cast<long long>(up_to), h);
      if (static_cast<int>(threadIdx.x % 32) >= h) up_to += x;
    }
    before += up_to - n;
    if (before <= unit && unit < before + n) found[0] = {b, before};
    __syncthreads();
    return found[0];
  }
}

// ---- the way of a block through its share

struct Segment {
  int64_t b;
  int tile, head;        // row tile, KV head
  int begin, end;        // units
  int first_token, len;  // visible tokens of the sequence
  float* slot;           // null: the segment is all there is, results go to out and lse
};

// A block's way through its share. One thread walks, in shared memory: it would take 20 registers of every thread.
struct Walk {
  int64_t at, begin,
      end;  // units of the list; with split_tokens (sequence, KV head, row tile, interval) in steps of the grid
  Place place;
};

// Empty when there is none left.
__device__ __forceinline__ Segment next_segment(const Params& p, Walk& walk, int64_t slot_size) {
  const int64_t heads = p.plan.row_tiles * p.Hkv, splits = p.plan.splits;
  while (walk.at < walk.end) {
    const int64_t at = walk.at, b = splits ? at / splits / heads : walk.place.b;
    const Visible v = visible(p, b);
    int64_t item, first, count, slot;
    if (splits) {
      walk.at += gridDim.x;
      const Splits s(p, v);
      const int64_t split = at % splits;
      if (split >= s.count) {  // behind the last interval: on to the next sequence, tile or head that is ours
        walk.at = at + (splits - split + gridDim.x - 1) / gridDim.x * gridDim.x;
        continue;
      }
      item = at / splits % heads;
      first = s.begin(split);
      count = s.begin(split + 1) - first;
      slot = at;
    } else {
      const int64_t in_b = at - walk.place.before;
      if (in_b >= v.units * heads) {
        ++walk.place.b;
        walk.place.before += v.units * heads;
        continue;
      }
      item = in_b / v.units;
      first = in_b % v.units;
      count = min(v.units - first, walk.end - at);
      slot = 2 * blockIdx.x + (at > walk.begin);
      walk.at += count;
    }
    Segment s;
    s.b = b;
    s.head = static_cast<int>(item / p.plan.row_tiles);
    s.tile = static_cast<int>(item % p.plan.row_tiles);
    s.begin = v.first_unit + static_cast<int>(first);
    s.end = s.begin + static_cast<int>(count);
    s.first_token = v.begin;
    s.len = v.len;
    s.slot = count == v.units ? nullptr : p.plan.partials + slot * slot_size;
    return s;
  }
  return {};
}

}  // namespace kk::cuda
