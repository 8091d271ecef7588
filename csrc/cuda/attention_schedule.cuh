// How an attention launch shares its work: units (up to 64 tokens of one page), segments (a range of units of one node,
// group and row tile), and the places of partial results. Host and both kernels see the same Layout.
//
// A node is a run of tokens of one sequence, or of several that share them (plan_node.h); its rows are the queries of
// all its sequences. Blocks take equal shares of the list (node, group, row tile, unit), so that at most two segments
// of a block are cut from a (node, group, row tile). Both kernels find the shares by the same arithmetic from what lies
// on the device: no plan on the host, no atomics. With split_tokens segments are fixed intervals, whatever the batch.
//
// With a selection, tokens are counted along the list: units, spans and segments are about the sequence of the selected
// tokens, which is another one for every group. How long it is, a kernel before the others finds (sparse_attention.cu).
// Source: equal shares as in FlashMLA's get_decoding_sched_meta; Dao 2023, Flash-Decoding (split over tokens, merge);
// Juravsky 2024, Hydragen (queries of a shared prefix as rows of one product).
#pragma once
#include <type_traits>

#include "cuda/rows.cuh"
#include "kvkernels/ops/attention.h"

namespace kk::cuda {

constexpr int kMaxWarps = 4;
constexpr int kUnitsPerBlock = kMaxWarps;  // a smaller share would leave warps idle and make more parts to merge

// The queries that the K side of a format is multiplied with: those of rotated formats of one part and of two (halves),
// each as one fp16 number or two, and others. Each kind that the pools need is made once per segment.
enum Queries : int {
  kQueriesF16,
  kQueriesBf16,
  kQueriesRotated,
  kQueriesRotatedRest,
  kQueriesHalves,
  kQueriesHalvesRest,
  kQueriesPlain,
  kQueryKinds
};

// One side of a page of packed format is a few arrays: codes, high bits and scales, of each part. In a stage they lie
// behind each other, in rooms for what expand() makes of them; what grows is copied to the end of its room.
struct SideArray {
  int offset;      // in the side
  int stride;      // bytes of a token
  int fixed;       // bytes that belong to no token (channel scales of kivi2)
  int room, size;  // in a stage: where its room begins, and bytes of a token in that
};
constexpr int kKeyArrays = 5, kValueArrays = 3;

// Codes with a scale per token as they lie in a stage.
struct Codes {
  int8_t parts;       // of the channels; 0: other formats
  int8_t bits[2];     // of the parts
  bool trits;         // a page has five codes to a byte; in a stage they have 2 bits
  bool short_scales;  // a page has scales of 8 bits; in a stage they are fp16
};

struct PoolLayout {
  SideArray
      k[kKeyArrays];  // up to an empty one. May be the whole page, which has both sides in one piece; v is empty then
  SideArray v[kValueArrays];
  Codes codes[2];  // of K and V
  bool grows;      // in a stage
  int tokens;      // of a stage: 16 where a side has 16-bit rows, else a unit
  int v_offset;    // of the V side in a stage; that of the K side where V lies in K's rows
};

struct Layout {
  int group;       // query heads of every group, or 0 where they differ
  bool uniform;    // groups of a node have the same rows and the same visible tokens
  int tile_rows;   // rows of a warp. A group with no more of them is one tile, whose units the warps share;
  int block_rows;  // a larger one has tiles of so many, and the warps go through all units, each for its own rows
  int cost;        // steps of a unit, at most: one per warp that has rows, or 1
  int unit;        // tokens; divides page_size and split_tokens, or is 16
  int64_t tiles;   // row tiles of a sequence
  int64_t splits;  // of a sequence, at most; 0: equal shares
  int64_t whole;   // first partial row of what was not cut: [kMaxPlanDepth][B][Tq][Hq], with a sharing plan
  int blocks, warps, stages;
  int merge_ways;  // parts of a row that are merged side by side
  // Shared memory: queries of each kind | per warp: scores of a stage, stages, sums (over the stages if they may)
  int queries[kQueryKinds];  // offset; < 0: not needed
  int warps_offset, warp_bytes, stages_offset, stage_bytes, sums_offset;
  uint32_t page_magic;  // x / page_size = x * page_magic >> page_shift for 0 <= x < 2^31
  int page_shift;
  PoolLayout pools[kMaxPools];
  int64_t smem;
  bool mixed_basis;    // the pools' V sums have different bases
  bool rotate_at_end;  // all of them are rotated
  bool q_vector, out_vector, extra_vector;
  float row_factor;  // on the weights of 16-bit values: kWeightFactor, or 1 where bf16 is among them and might overflow
  uint32_t bias;     // kBias
  float* partials;   // rows of partial_floats(): [2 blocks or (B, tile, split)][block_rows], then `whole`
  bool gather;       // units are 16 selected tokens from anywhere: of a list of tokens, or of pages without whole units
};

struct Params : AttentionParams {
  static constexpr bool sparse = false;
  Layout layout;
};

// Selected tokens of a sequence and group: all of them, those before `sink` of Span, those before its first_token.
struct alignas(16) Selected {
  int all, sink, first_token;
};
struct SparseParams : Params {
  static constexpr bool sparse = true;
  Selected* selected;  // [B, Hkv]
};
template <bool Sparse>
using ParamsOf = std::conditional_t<Sparse, SparseParams, Params>;

struct State {
  float m, l;  // running maximum in units of log 2, sum of exp2(score - m)
};

// A partial row: sums [Dv], State, and two floats that keep the next one aligned.
KK_HD int64_t partial_floats(int64_t Dv) { return Dv + 4; }

// ---- geometry, the same in both kernels

struct Node {
  int first, sequences;  // in the plan's order
  int begin, end;        // tokens
};

__device__ __forceinline__ int64_t num_nodes(const Params& p) { return p.plan.nodes ? p.plan.num_nodes : p.B; }

template <typename P>
__device__ __forceinline__ Node node_at(const P& p, int64_t n) {
  const int64_t room = P::sparse && p.selection.entries ? INT32_MAX : p.max_pages * p.page_size;
  if (p.plan.nodes) {
    const PlanNode& x = p.plan.nodes[n];
    const int end = static_cast<int>(min(int64_t(x.end), room));
    return {x.first, x.last - x.first, x.begin, x.last > x.first ? end : x.begin};
  }
  const int64_t len = p.seq_lens[n];
  return {static_cast<int>(n), 1, 0, static_cast<int>(len < 0 ? 0 : len > room ? room : len)};
}

__device__ __forceinline__ int sequence_at(const Params& p, int i) { return p.plan.nodes ? p.plan.order[i] : i; }

__device__ __forceinline__ int group_heads(const Params& p, int group) {
  return p.heads.mapped ? p.heads.first[group + 1] - p.heads.first[group] : p.layout.group;
}
// Query head i of a group.
__device__ __forceinline__ int head_at(const Params& p, int group, int i) {
  return p.heads.mapped ? p.heads.order[p.heads.first[group] + i] : group * p.layout.group + i;
}

KK_HD int64_t num_tiles(const Layout& layout, int64_t rows) {
  if (rows <= layout.tile_rows) return rows > 0;
  return (rows + layout.block_rows - 1) / layout.block_rows;
}

// What of a node's tokens the queries of a group may see: those before `sink`, and [first_token, end). Units are
// counted from the node's begin; the list has the first sink_units of them and those from first_unit on. With a
// selection all of these count selected tokens, from 0.
struct Span {
  int begin, end;
  int sink, first_token;
  int sink_units, first_unit, units;
  int window;  // < 0: none
};

template <typename P>
__device__ __forceinline__ Span span_of(const P& p, const Node& node, int group) {
  Span s{node.begin, node.end, 0, node.begin, 0, 0, 0, -1};
  int64_t window = p.window_left;
  if (p.head_windows) {
    window = p.head_windows[2 * group + 1];
    if (window >= 0) s.sink = min(max(p.head_windows[2 * group], 0), node.end);
  }
  if (window >= 0) {
    s.window = static_cast<int>(min(window, int64_t(INT32_MAX)));
    s.first_token = static_cast<int>(max(node.end - p.Tq - window, int64_t(0)));
  }
  if constexpr (P::sparse) {
    const Selected& selected = p.selected[node.first * p.Hkv + group];
    s.begin = 0;
    s.end = selected.all;
    s.sink = selected.sink;
    s.first_token = selected.first_token;
  }
  const int unit = p.layout.unit, all = (s.end - s.begin + unit - 1) / unit;
  s.sink_units = (s.sink + unit - 1) / unit;
  s.first_unit = max((s.first_token - s.begin) / unit, s.sink_units);
  if (P::sparse && s.first_token == s.end) s.first_unit = max(all, s.sink_units);  // the window has no selected token
  s.units = s.sink_units + max(all - s.first_unit, 0);
  return s;
}

// Fixed intervals of split_tokens that have visible units. begin(i): first unit of the i-th, in the list.
struct Splits {
  Span s;
  int64_t units_each, of_sink, first, count;
  __device__ Splits(const Params& p, const Span& span) : s(span), units_each(1), of_sink(0), first(0), count(0) {
    if (p.layout.splits == 0 || s.units == 0) return;
    units_each = min(p.split_tokens / p.layout.unit, int64_t(1) << 30);
    of_sink = (s.sink_units + units_each - 1) / units_each;
    first = max(s.first_unit / units_each, of_sink);
    const int64_t last = s.first_unit + (s.units - s.sink_units) - 1;  // unit; those of the window come last
    count = of_sink;
    if (s.units > s.sink_units) count += max(last / units_each - first + 1, int64_t(0));
  }
  __device__ int64_t begin(int64_t i) const {
    const int64_t unit = (i < of_sink ? i : first + i - of_sink) * units_each;
    if (unit < s.sink_units) return unit;
    return s.sink_units + min(max(unit - s.first_unit, int64_t(0)), int64_t(s.units - s.sink_units));
  }
};

// Equal shares: block k of n has steps [all k / n, all (k + 1) / n) of the list, in which a unit has one or several.
// The merge asks for many of them, and a division of 64 bits is a hundred instructions: all k / n
// = each k + rest k / n.
struct Shares {
  int64_t all, each;
  int n, rest;
  __device__ Shares(const Params& p, int64_t steps) : all(steps) {
    n = static_cast<int>(min((all + kUnitsPerBlock - 1) / kUnitsPerBlock, int64_t(p.layout.blocks)));
    each = n ? all / n : 0;
    rest = static_cast<int>(all - each * n);
  }
  __device__ int64_t begin(int k) const {
    return each * k + static_cast<uint32_t>(rest * k) / static_cast<uint32_t>(n);
  }
  __device__ int block_of(int64_t step) const { return static_cast<int>(((step + 1) * n - 1) / all); }
};

__device__ __forceinline__ int64_t group_rows(const Params& p, const Node& node, int group) {
  return node.sequences * p.Tq * group_heads(p, group);
}
__device__ __forceinline__ int64_t group_tiles(const Params& p, const Node& node, int group) {
  return num_tiles(p.layout, group_rows(p, node, group));
}

// The steps of a tile; unit(i): units that begin before the i-th.
struct Steps {
  int64_t cost, all;
  __device__ Steps(const Params& p, const Node& node, int group, const Span& span) {
    const int64_t warps = (group_rows(p, node, group) + p.layout.tile_rows - 1) / p.layout.tile_rows;  // with own rows
    cost = min(warps, int64_t(p.layout.cost));
    all = span.units * cost;
  }
  __device__ int64_t unit(int64_t step) const {
    return static_cast<uint32_t>(step + cost - 1) / static_cast<uint32_t>(cost);
  }
};

// Steps of the list that the node's groups before `group` have.
template <typename P>
__device__ __forceinline__ int64_t steps_before(const P& p, const Node& node, int group) {
  const auto of_group = [&](int g) { return group_tiles(p, node, g) * Steps(p, node, g, span_of(p, node, g)).all; };
  int64_t steps = 0;
  for (int g = 0; g < (p.layout.uniform ? min(group, 1) : group); ++g) steps += of_group(g);
  return p.layout.uniform ? group * steps : steps;
}

// What threads count steps of: nodes, or with a selection, where every group has a list to be looked at, their groups.
template <typename P>
__device__ __forceinline__ int64_t num_items(const P& p) {
  return P::sparse ? p.B * p.Hkv : num_nodes(p);
}
template <typename P>
__device__ __forceinline__ int64_t item_steps(const P& p, int64_t i) {
  if constexpr (P::sparse) {
    const Node node = node_at(p, i / p.Hkv);
    const int group = static_cast<int>(i % p.Hkv);
    return group_tiles(p, node, group) * Steps(p, node, group, span_of(p, node, group)).all;
  } else {
    return steps_before(p, node_at(p, i), static_cast<int>(p.Hkv));
  }
}

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

// Steps of the items before n and of all.
struct StepCount {
  int64_t before, all;
};
template <typename P>
__device__ __forceinline__ StepCount count_steps(const P& p, int64_t n) {
  int64_t before = 0, all = 0;
  for (int64_t i = threadIdx.x; i < num_items(p); i += blockDim.x) {
    const int64_t steps = item_steps(p, i);
    all += steps;
    before += i < n ? steps : 0;
  }
  return {block_sum(before), block_sum(all)};
}

// The item that holds `step` of the list, and the number of steps before it.
struct Place {
  int64_t item, before;
};
template <typename P>
__device__ __forceinline__ Place find_step(const P& p, int64_t step) {
  KK_SHARED(Place, found, [1]);
  int64_t before = 0;
  for (int64_t first = 0;; first += blockDim.x) {
    const int64_t item = first + threadIdx.x, n = item < num_items(p) ? item_steps(p, item) : 0;
    const int64_t all = block_sum(n);
    if (step >= before + all) {
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
    if (before <= step && step < before + n) found[0] = {item, before};
    __syncthreads();
    return found[0];
  }
}

// ---- the way of a block through its share

struct Segment {
  Node node;
  Span span;
  int group, k_head, v_head;
  int table;       // the sequence whose page-table row is read
  int first_row;   // of the tile, in the node's group
  int rows;        // of the tile
  bool own_rows;   // each warp has its own rows of the tile and goes through all units; else the warps share the units
  int begin, end;  // units
  int64_t cut;     // >= 0: a part; its first partial row
  int level;       // whole, with a plan: of the node
  bool alone;      // whole: its sequence has no other node, results go to out and lse
};

// A block's way through its share. One thread walks, in shared memory: it would take 20 registers of every thread.
struct Walk {
  int64_t at, begin, end;  // steps of the list; with split_tokens (sequence, row tile, interval), a grid apart
  int64_t node, before;    // steps before (node, group)
  int group;
};

__device__ __forceinline__ Segment make_segment(const Params& p, int64_t n, const Node& node, const Span& span,
                                                int group, int64_t tile, int64_t begin, int64_t count, int64_t slot) {
  Segment s{};
  s.node = node;
  s.span = span;
  s.group = group;
  s.k_head = group / static_cast<int>(p.k_share);
  s.v_head = group / static_cast<int>(p.v_share);
  s.table = sequence_at(p, node.first);
  const int64_t rows = group_rows(p, node, group);
  s.own_rows = rows > p.layout.tile_rows;
  s.first_row = static_cast<int>(tile * p.layout.block_rows);
  s.rows = static_cast<int>(min(rows - s.first_row, int64_t(p.layout.block_rows)));
  s.begin = static_cast<int>(begin);
  s.end = static_cast<int>(begin + count);
  s.cut = count == span.units ? -1 : slot * p.layout.block_rows;
  s.alone = true;
  if (p.plan.nodes && s.cut < 0) {
    int parent = p.plan.nodes[n].parent;
    s.alone = parent < 0 && p.plan.leaf[s.table] == n;
    for (; parent >= 0; parent = p.plan.nodes[parent].parent) ++s.level;
  }
  return s;
}

// Empty when there is none left.
template <typename P>
__device__ __forceinline__ Segment next_segment(const P& p, Walk& walk) {
  const int groups = static_cast<int>(p.Hkv);
  while (walk.at < walk.end) {
    const int64_t at = walk.at;
    if (const int64_t splits = p.layout.splits) {
      const int64_t b = at / splits / p.layout.tiles, split = at % splits;
      const Node node = node_at(p, b);
      int64_t tile = at / splits % p.layout.tiles;
      int group = 0;
      if (p.layout.uniform) {
        const int64_t tiles = group_tiles(p, node, 0);
        group = static_cast<int>(tile / tiles);
        tile %= tiles;
      } else {
        for (int64_t tiles; tile >= (tiles = group_tiles(p, node, group)); ++group) tile -= tiles;
      }
      const Span span = span_of(p, node, group);
      const Splits s(p, span);
      if (split >= s.count) {  // behind the last interval: on to the next sequence or tile that is ours
        walk.at = at + (splits - split + gridDim.x - 1) / gridDim.x * gridDim.x;
        continue;
      }
      walk.at += gridDim.x;
      return make_segment(p, b, node, span, group, tile, s.begin(split), s.begin(split + 1) - s.begin(split), at);
    }
    if (walk.group == groups) {
      ++walk.node;
      walk.group = 0;
      continue;
    }
    const Node node = node_at(p, walk.node);
    const Span span = span_of(p, node, walk.group);
    const Steps steps(p, node, walk.group, span);
    const int64_t of_group = group_tiles(p, node, walk.group) * steps.all, in_group = at - walk.before;
    if (in_group >= of_group) {
      int n = 1;
      if (p.layout.uniform)
        n = of_group ? static_cast<int>(min(in_group / of_group, int64_t(groups - walk.group))) : groups - walk.group;
      walk.group += n;
      walk.before += n * of_group;
      continue;
    }
    const int64_t in_tile = in_group % steps.all, end = min(steps.all, in_tile + walk.end - at);
    const int64_t first = steps.unit(in_tile), count = steps.unit(end) - first;
    walk.at += end - in_tile;
    if (count > 0)
      return make_segment(p, walk.node, node, span, walk.group, in_group / steps.all, first, count,
                          2 * blockIdx.x + (at > walk.begin));
  }
  return {};
}

}  // namespace kk::cuda
