// What one warp of attention_kernel does in a segment: it loads units, scores them, and sums over V.
//
// Tokens are the 16 rows of mma.m16n8k16 and query rows its 8 columns, so that a group of 1 to 8 heads wastes half as
// much as with the roles exchanged:
//   S^T [16 tokens x 8 rows] = K [16 x D] Q^T        O^T [D x 8 rows] += V^T [D x 16 tokens] P^T
// Row m of an operand is token m ^ (m >> 2 & 1) of its eight: lanes that read tokens 0 2 4 6 of 32 bytes would meet in
// the same banks of shared memory, those that read 0 2 5 7 do not. Lane = 4 g + c throughout, as in ptx.cuh.
//
// Scales stay out of the products: those of K go on the scores, those of V on the weights, which become fp16 with a
// power of two common to the warp. Packed formats sum in the rotated basis; sums of different bases are brought to the
// plain one when a warp goes from one to another, and at the end.
//
// Warps that share the units of a segment go their own ways. Where each has rows of its own (`Shared`,
// Segment::own_rows) every warp still loads only its units, but all of them use what all have loaded: the stages come
// from L2 once for the rows of a block, and a barrier in every step keeps the warps together.
//
// With a selection (`Sparse`) a token has two numbers: its place among the selected ones, by which work is cut, and its
// position in the sequence, which says who sees it. A unit is tokens of one page as ever, or where Layout::gather 16
// from anywhere: these are copied one by one to where a page of 16 tokens would have them.
#pragma once
#include "cuda/attention_schedule.cuh"
#include "cuda/codes.cuh"
#include "kvkernels/core/grid.h"

namespace kk::cuda {

constexpr float kLog2e = 1.4426950408889634f;
// The running maximum before a score was seen. Finite, so that a difference of two is never NaN; a row whose scores are
// all masked keeps it and has l = 0.
constexpr float kLowest = -3.402823466e38f;
constexpr float kNoFactor = 1099511627776.0f;  // 2^40: the first scale above 0 exceeds what this allows
constexpr uint32_t kQuarters = twice(0x3400);  // fp16 (0.25, 0.25)
constexpr float kWeightFactor = 32768.0f;      // on weights in fp16, which are at most 1: small ones keep their bits

// What sums over V are in: order of channels and basis.
enum Basis : int { kNoBasis, kRowBasis, kRotatedBasis, kPlainBasis };

struct Row {
  float q_scale;  // from the product with scaled queries to the score
  float q_mu;     // what centring took from the scores of rotated keys
  float slope;    // ALiBi
  int before;     // the row sees tokens before this one,
  uint32_t bits;  // and token before + j if bit j is set
  int position;   // of the query, from which windows and ALiBi count
  int b;          // sequence
  int16_t t, head;
};

template <int D, int NT>
struct Tile {
  static constexpr int kDv = D == 576 ? 512 : D;
  static constexpr int kRows = 8 * NT;
  static constexpr int kSteps = D / 16;         // of 16 channels: k in scores,
  static constexpr int kValueSteps = kDv / 16;  // rows of O^T in the sums
  static constexpr int kStepPairs = (kSteps + 1) / 2;
  static constexpr int kQueryBytes = NT * kStepPairs * 32 * 16;
  static constexpr int kRowLanes = D <= 64 ? 8 : D <= 128 ? 16 : 32;   // lanes that hold a row, 8 channels each,
  static constexpr int kOctets = (D / 8 + kRowLanes - 1) / kRowLanes;  // or these times as many
  static constexpr int kValueOctets = (kDv / 8 + kRowLanes - 1) / kRowLanes;
  static constexpr int kPitch = D * 2 + 16;         // bytes of a 16-bit row in a stage: 8 rows, all banks
  static constexpr int kSumPitch = kDv + 4;         // floats of a row of sums
  static constexpr int kGroup = D < 128 ? D : 128;  // channels that share a scale
  [[maybe_unused]] static constexpr int kGroups = D / kGroup;
  static constexpr bool kTwoTerms = D * NT < 512;  // rotated float16 queries as two fp16 numbers; more would spill
};

// Of a stage: place of its first token, pool (-1: nothing); with a selection two positions, from the first on and before
// the other (or, where some of 16 are missing, any), positions of 16 tokens where these are gathered (-1: none), and
// words with their scales in them, of K and of V.
template <bool Sparse>
constexpr int kHeader = Sparse ? 16 + 16 * 4 + 2 * 16 * 4 : 16;
constexpr int kPositions = 16, kScaleWords = kPositions + 16 * 4;

__device__ __forceinline__ int code_bits(Format f) {
  return f == Format::u8 ? 8 : f == Format::u4 ? 4 : f == Format::u3 ? 3 : 2;
}
__device__ __forceinline__ bool is_rows(Format f) { return f == Format::bf16 || f == Format::f16; }

// Of the query with this tree mask, or of its token: ancestors in the tree.
__device__ __forceinline__ int depth(uint32_t bits) { return __popc(bits) - 1; }

// The tokens of a stage, in tiles of 16.
struct Tokens {
  uint8_t *k, *v;        // sides
  int count;             // laid out in the stage
  int place;             // of the first: its position, or number among the selected ones
  int begin, end;        // tiles that hold visible tokens
  bool edge;             // some row does not see some token of these tiles
  int position;          // of the first, with a selection
  const int* positions;  // of 16, where they are gathered
};

// What a warp does in a segment.
template <int D, int NT, bool Packed, bool Shared, bool Sparse>
struct Warp {
  using T = Tile<D, NT>;
  static constexpr bool kKeepQueries = Shared && !Packed && D <= 128;  // in registers; more would spill

  const ParamsOf<Sparse>& p;
  const Segment& seg;
  const uint8_t* queries;
  const Row* rows;
  uint8_t* stages;      // of the warp
  float4* tile_scores;  // [unit / 16][NT][32]
  float* sums;          // [kRows][kSumPitch]
  State* state;         // [kRows]
  int lane, g, c;
  const uint32_t bias;  // kBias

  uint32_t kept_queries[kKeepQueries ? T::kStepPairs : 1][NT][2][2];
  int kept;                          // kind of these
  float acc[T::kValueSteps][NT][4];  // (two channels, rows 8 nt + 2 c and + 1)
  float m[NT][2], l[NT][2];          // l: of this lane's tokens only
  float q_scale[NT][2];
  float v_factor;  // power of two on the weights of rotated values
  int basis;       // of acc
  bool sums_used;

  int end, len;   // of the segment, of the node's tokens or the selected ones
  int unit, sub;  // what is loaded next: tile of the unit, or bits of the gathered tokens that were loaded
  int32_t entry,
      next_entry;               // page-table entries: of this unit and of the warp's next
  int position, next_position;  // with a selection, of token lane % 16
  int issued;                   // stages

  __device__ Warp(const ParamsOf<Sparse>& params, const Segment& segment, const uint8_t* own_queries, const Row* row,
                  uint8_t* own, float4* own_scores, float* own_sums, State* own_state, uint32_t fp16_bias)
      : p(params),
        seg(segment),
        queries(own_queries),
        rows(row),
        stages(own),
        tile_scores(own_scores),
        sums(own_sums),
        state(own_state),
        bias(fp16_bias) {
    lane = threadIdx.x % 32;
    g = lane / 4;
    c = lane % 4;
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][nt][j] = 0.0f;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        m[nt][i] = kLowest;
        l[nt][i] = 0.0f;
        q_scale[nt][i] = rows[8 * nt + 2 * c + i].q_scale;
      }
    kept = kQueryKinds;
    v_factor = kNoFactor;
    basis = kNoBasis;
    sums_used = false;
    end = seg.end;
    len = seg.span.end;
    unit = seg.begin + threadIdx.x / 32;
    sub = issued = 0;
    find_unit(unit, entry, position);
    find_unit(unit + p.layout.warps, next_entry, next_position);
  }

  __device__ void run() {
    const int n_stages = p.layout.stages, warp = threadIdx.x / 32;
    const bool own_rows = Shared && seg.own_rows, idle = own_rows && warp * T::kRows >= seg.rows;
    // Tokens that all rows see; with a tree, depths are at most 31.
    const int tokens = Sparse ? seg.node.end : len;
    const int last_position = p.tree_mask ? tokens - static_cast<int>(p.Tq) + 31 : tokens - 1;
    const int seen_by_all_from = seg.span.window < 0 ? 0 : max(last_position - seg.span.window, 0);
    const int seen_by_all_to = seg.node.sequences > 1 ? tokens : min(rows[0].before + !p.tree_mask, tokens);
    int filled = 0, used = 0;
    for (int step = 1 - n_stages; own_rows || step < issued; ++step) {  // the first steps only load
      uint8_t* stage = stages + used * p.layout.stage_bytes;
      if (step >= 0) {
        wait_oldest();
        if (Packed) {
          if (Sparse && p.layout.gather)
            place_scales(stage);
          else
            clear_unseen(stage);
        }
        // everybody's copies have landed, and everybody has left the stage that is filled now
        if (own_rows)
          __syncthreads();
        else
          __syncwarp();
      }
      issue(filled);
      __syncwarp();  // the products below are for whole warps
      filled = filled + 1 == n_stages ? 0 : filled + 1;
      if (step < 0) continue;
      used = used + 1 == n_stages ? 0 : used + 1;
      if (!own_rows) {
        use(stage, seen_by_all_from, seen_by_all_to);
        continue;
      }
      stage -= warp * p.layout.warp_bytes;
      bool more = false;
      for (int i = 0; i < p.layout.warps; ++i, stage += p.layout.warp_bytes) {
        if (reinterpret_cast<const int2*>(stage)->y < 0) continue;
        more = true;
        if (!idle) use(stage, seen_by_all_from, seen_by_all_to);
      }
      if (!more) break;
    }
    if (own_rows)
      __syncthreads();  // the sums may lie over the stages
    else
      __syncwarp();
    flush();
  }

  __device__ void use(uint8_t* stage, int seen_by_all_from, int seen_by_all_to) {
    const int2 header = *reinterpret_cast<const int2*>(stage);
    const Format k_format = p.pools[header.y].k_format, v_format = p.pools[header.y].v_format;
    Tokens t;
    t.k = stage + kHeader<Sparse>;
    t.v = stage + p.layout.pools[header.y].v_offset;
    t.count = Packed ? p.layout.pools[header.y].tokens : 16;
    t.place = header.x;
    t.begin = t.place < seg.span.sink ? 0 : max(seg.span.first_token - t.place, 0) / 16;
    t.end = min(t.count, len - t.place + 15) / 16;
    int from = t.place + 16 * t.begin, to = t.place + 16 * t.end;
    const bool behind_sink = to > seg.span.sink;
    if constexpr (Sparse) {
      const int2 positions = reinterpret_cast<const int2*>(stage)[1];
      from = t.position = positions.x;
      to = positions.y;
      t.positions = reinterpret_cast<const int*>(stage + kPositions);
    }
    t.edge = (from < seen_by_all_from && behind_sink) || to > seen_by_all_to;
    if (t.begin >= t.end) return;  // 16 rows of a unit, before the window
    float top[NT][2];
    scores(k_format, t, top);
    raise_maximum(top);
    values(v_format, t);
  }

  // ---- loads

  __device__ int page_of(int token) const {
    return static_cast<int>(static_cast<uint64_t>(token) * p.layout.page_magic >> p.layout.page_shift);
  }

  // Position of unit u of the segment's list.
  __device__ int first_token_of(int u) const {
    const Span& span = seg.span;
    return span.begin + (u < span.sink_units ? u : u - span.sink_units + span.first_unit) * p.layout.unit;
  }
  __device__ bool visible(int token) const {
    return token < len && (token >= seg.span.first_token || token < seg.span.sink);
  }

  // Page-table entry and position of unit u.
  __device__ void find_unit(int u, int32_t& entry_of, int& position_of) const {
    entry_of = position_of = 0;
    if (u >= end) return;
    // Of token lane % 16 where a page has no whole units (16 consecutive tokens then); entries of tokens that are not
    // visible are not looked at, but that of one of the unit which is.
    const int first = first_token_of(u) + lane % 16;
    int token = min(first, len - 1);
    if (!visible(token)) token = u < seg.span.sink_units ? seg.span.sink - 1 : seg.span.first_token;
    const int32_t* table = p.page_table + seg.table * p.table_stride;
    if constexpr (Sparse) {
      const Selection& s = p.selection;
      const int of_run = static_cast<int>(s.tokens), run = of_run == 1 ? token : page_of(token);
      const int last = of_run == 1 ? seg.node.end - 1 : page_of(seg.node.end - 1);
      // a wrong index is not to name an entry beyond the table
      const int index = min(max(s.index[seg.table * s.index_batch + seg.group * s.index_head + run], 0), last);
      position_of = index * of_run + (p.layout.gather ? token : first) - run * of_run;
      entry_of = s.entries ? s.entries[seg.table * s.entries_batch + seg.group * s.entries_head + run]
                           : table[of_run == 1 ? page_of(index) : index];
    } else {
      entry_of = table[page_of(token)];
    }
  }

  // `side`: of the page and head. Its tokens token ... token + n - 1.
  __device__ void copy_arrays(uint8_t* to, const uint8_t* side, const SideArrays& arrays, int token, int n) const {
    uint32_t dst = ptx::smem_u32(to) + lane * 16;
    side += lane * 16;
    const auto next_array = [&](const SideArray& array, auto copy) {
      const int bytes = n * array.stride + array.fixed;
      if (bytes == 0) return;
      copy(side + (array.offset + token * array.stride), bytes - lane * 16);
      dst += bytes;
    };
    next_array(arrays.array[0], [&](const uint8_t* from, int bytes) {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 4 * 512)
#pragma unroll
        for (int j = 0; j < 4 * 512; j += 512)
          if (i + j < bytes) ptx::cp_async<16>(dst + i + j, from + i + j);
    });
    const auto small = [&](const uint8_t* from, int bytes) {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 512) ptx::cp_async<16>(dst + i, from + i);
    };
    next_array(arrays.array[1], small);
    next_array(arrays.array[2], small);
  }

  // The gathered tokens of one side, token lane % 16 of `side` at in_page, into the arrays of a page of 16 tokens; zeros
  // where there is none. `of_page`: the side of the page that arrays without tokens come from.
  __device__ void copy_tokens(uint8_t* to, uint8_t* scale_words, const uint8_t* side, const uint8_t* of_page,
                              const SideArrays& arrays, int in_page, bool exists) const {
    const int token = lane % 16, half = lane / 16;
    uint32_t dst = ptx::smem_u32(to);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const SideArray& array = arrays.array[i];
      const uint8_t* from = side + array.offset + in_page * array.stride;
      const uint32_t own = dst + token * array.stride;
      if (array.stride >= 16) {
#pragma unroll 1
        for (int j = half * 16; j < array.stride; j += 32) ptx::cp_async<16>(own + j, exists ? from + j : p.q, exists);
      } else if (half == 0 && array.stride > 0) {
        if (array.stride == 8)
          ptx::cp_async<8>(own, exists ? from : p.q, exists);
        else if (array.stride == 4)
          ptx::cp_async<4>(own, exists ? from : p.q, exists);
        else  // one of the two scales of a word
          ptx::cp_async<4>(ptx::smem_u32(scale_words) + 4 * token, exists ? from - in_page % 2 * 2 : p.q, exists);
      }
#pragma unroll 1
      for (int j = lane * 16; j < array.fixed; j += 512) ptx::cp_async<16>(dst + j, of_page + array.offset + j);
      dst += 16 * array.stride + array.fixed;
    }
  }

  // Scales of 2 bytes come in words of 4: cp.async copies no less.
  __device__ void place_scales(uint8_t* stage) const {
    if constexpr (Packed && Sparse && T::kGroups == 1) {
      const int pool = reinterpret_cast<const int2*>(stage)->y, token = lane % 16;
      if (Shared && pool < 0) return;
      __syncwarp();  // everybody's copies have landed
      const bool values = lane >= 16;
      const Format format = values ? p.pools[pool].v_format : p.pools[pool].k_format;
      if (is_rows(format) || format == Format::kivi2) return;
      uint8_t* side = stage + (values ? p.layout.pools[pool].v_offset : kHeader<Sparse>);
      const uint32_t word = reinterpret_cast<const uint32_t*>(stage + kScaleWords)[lane];
      const int odd = reinterpret_cast<const int*>(stage + kPositions)[token] & 1;
      reinterpret_cast<uint16_t*>(side + 16 * (D * code_bits(format) / 8))[token] =
          static_cast<uint16_t>(word >> 16 * odd);
    }
  }

  // 16 rows of 16-bit numbers; `row` is that of token lane % 16, null where there is none: zeros, as 0 * NaN is NaN.
  template <int Channels>
  __device__ void copy_rows(uint8_t* to, const uint8_t* row) const {
    constexpr int pieces = Channels / 8;
    const uint32_t dst = ptx::smem_u32(to);
#pragma unroll 4
    for (int i = lane; i < 16 * pieces; i += 32) {
      const int r = i / pieces, at = i % pieces * 16;
      const auto from = reinterpret_cast<const uint8_t*>(
          __shfl_sync(kWholeWarp, static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(row)), r));
      // nothing is read from p.q, but it is an address that exists
      ptx::cp_async<16>(dst + r * T::kPitch + at, from ? from + at : p.q, from != nullptr);
    }
  }

  // The next tokens into a stage: 16 where a side has 16-bit rows, else a unit; of gathered ones those that lie in one
  // pool, or in one page if its keys have scales in common. One commit group per call.
  __device__ void issue(int stage) {
    uint8_t* to = stages + stage * p.layout.stage_bytes;
    if (unit < end) {
      const bool gather = Sparse && p.layout.gather;
      const int first = first_token_of(unit) + (gather ? 0 : sub * 16), token = first + lane % 16;
      bool exists = visible(token);
      int32_t source = entry;
      uint32_t left = 0, taken = 0;
      if (gather) {
        exists &= !(sub >> lane % 16 & 1);
        left = __ballot_sync(kWholeWarp, exists) & 0xffffu;
        source = __shfl_sync(kWholeWarp, entry, __ffs(left) - 1);
        const int differ = entry ^ source;
        exists &= (Packed && p.pools[source >> 28].k_format == Format::kivi2 ? differ : differ >> 28) == 0;
        taken = __ballot_sync(kWholeWarp, exists) & 0xffffu;
      }
      const Pool& pool = p.pools[source >> 28];
      const int64_t page = entry & kPageMask;
      const uint8_t* k = pool.k + page * pool.k_page + seg.k_head * pool.k_head;
      const uint8_t* v = pool.v + page * pool.v_page + seg.v_head * pool.v_head;
      const bool k_rows = !Packed || is_rows(pool.k_format), v_rows = !Packed || is_rows(pool.v_format);
      const int at = !Sparse ? token : gather ? position : position + sub * 16;
      const int in_page = at - page_of(at) * static_cast<int>(p.page_size), first_in_page = in_page - lane % 16;
      const PoolLayout& arrays = p.layout.pools[source >> 28];
      uint8_t *const k_to = to + kHeader<Sparse>, *const v_to = to + arrays.v_offset;
      const int n = arrays.tokens;
      if constexpr (Sparse) {
        const int last = __shfl_sync(kWholeWarp, at, 15);
        if (lane == 0) {
          const bool all = !gather || taken == 0xffffu;
          *reinterpret_cast<int4*>(to) = make_int4(first, source >> 28, all ? at : 0,
                                                   !all     ? INT32_MAX
                                                   : gather ? last + 1
                                                            : at + n);
        }
        if (gather && lane < 16) reinterpret_cast<int*>(to + kPositions)[lane] = exists ? at : -1;
      } else {
        if (lane == 0) *reinterpret_cast<int2*>(to) = make_int2(first, source >> 28);
      }
      if (k_rows)
        copy_rows<D>(k_to, exists ? k + in_page * pool.k_token : nullptr);
      else if (gather)
        copy_tokens(k_to, to + kScaleWords, k, pool.k + (source & kPageMask) * pool.k_page + seg.k_head * pool.k_head,
                    arrays.k, in_page, exists);
      else
        copy_arrays(k_to, k, arrays.k, first_in_page, n);
      if (v_rows) {
        if (v_to != k_to) copy_rows<T::kDv>(v_to, exists ? v + in_page * pool.v_token : nullptr);
      } else if (gather) {
        copy_tokens(v_to, to + kScaleWords + 16 * 4, v, nullptr, arrays.v, in_page, exists);
      } else {
        copy_arrays(v_to, v, arrays.v, first_in_page, n);
      }
      if (gather)
        sub |= taken;
      else
        sub += n / 16;
      if (gather ? left == taken : sub * 16 >= p.layout.unit || first + n >= len) {
        sub = 0;
        unit += p.layout.warps;
        entry = next_entry;
        position = next_position;
        find_unit(unit + p.layout.warps, next_entry, next_position);
      }
      ++issued;
    } else if (Shared && lane == 0) {
      *reinterpret_cast<int2*>(to) = make_int2(0, -1);
    }
    ptx::cp_async_commit();
  }

  __device__ void wait_oldest() const {
    if (p.layout.stages == 2)
      ptx::cp_async_wait<0>();
    else if (p.layout.stages == 3)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<2>();
  }

  // Numbers of tokens that nobody sees may be anything; as scales and zero points of V they become 0, which whoever
  // loaded them does before others come.
  __device__ void clear_unseen(uint8_t* stage) const {
    const int2 header = *reinterpret_cast<const int2*>(stage);
    if (Shared && header.y < 0) return;
    const int count = p.layout.pools[header.y].tokens, position = header.x;
    const bool gap = position < seg.span.first_token && position + count > seg.span.sink;
    const Format format = p.pools[header.y].v_format;
    if (is_rows(format) || (!gap && position + count <= len)) return;
    __syncwarp();  // everybody's copies have landed
    const int bits = code_bits(format), of_token = format == Format::kivi2 ? D / 32 : T::kGroups;
    uint16_t* numbers = reinterpret_cast<uint16_t*>(stage + p.layout.pools[header.y].v_offset + count * (D * bits / 8));
    for (int i = lane; i < count * of_token; i += 32)
      if (!visible(position + i / of_token)) {
        numbers[i] = 0;
        if (format == Format::kivi2) numbers[i + count * of_token] = 0;
      }
  }

  // ---- scores

  // Token of row m of an operand, of its eight.
  static __device__ __forceinline__ int token_of(int row) { return row ^ (row >> 2 & 1); }

  static __device__ __forceinline__ float half_at(const uint8_t* p, int i) {
    return __half2float(reinterpret_cast<const __half*>(p)[i]);
  }

  // Scores of tile i as the mma leaves them: (token g, rows 2 c and 2 c + 1), (token g + 8, the same). They wait in
  // shared memory between K and V, so that either side goes through all tiles of a stage at a time. Each lane has its
  // own.
  __device__ float4* scores_of(int i, int nt) const { return tile_scores + (i * NT + nt) * 32 + lane; }

  // Products with scaled queries -> scores, in units of log 2; top: the largest of this lane.
  __device__ void keep_scores(int i, const float (&x)[NT][4], const float (&add)[NT][2], float (&top)[NT][2]) const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      float s[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = fmaf(x[nt][j], q_scale[nt][j % 2], add[nt][j % 2]);
      *scores_of(i, nt) = make_float4(s[0], s[1], s[2], s[3]);
#pragma unroll
      for (int j = 0; j < 2; ++j) top[nt][j] = fmaxf(top[nt][j], fmaxf(s[j], s[j + 2]));
    }
  }

  // What most calls do not need: softcap, ALiBi, tokens that some row does not see.
  __device__ void finish_scores(const Tokens& t, float (&top)[NT][2]) const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) top[nt][0] = top[nt][1] = kLowest;
    for (int i = t.begin; i < t.end; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const float4 x = *scores_of(i, nt);
        float s[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Row& row = rows[8 * nt + 2 * c + j % 2];
          const int in_stage = 16 * i + token_of(g) + j / 2 * 8, place = t.place + in_stage;
          const int token = !Sparse ? place : p.layout.gather ? t.positions[in_stage] : t.position + in_stage;
          const int of_queries = token - row.before;
          bool seen = place < len && (of_queries < 0 || (row.bits >> of_queries & 1));
          if (Sparse) seen &= token >= 0;
          int distance = row.position - token;
          if (p.tree_mask && seen && of_queries >= 0)
            distance = row.position - row.before - depth(p.tree_mask[row.b * p.tree_stride + of_queries]);
          if (p.softcap > 0.0f) s[j] = p.softcap * tanhf(s[j] / p.softcap) * kLog2e;
          if (p.alibi_slopes) s[j] -= row.slope * static_cast<float>(distance);
          if (seg.span.window >= 0) seen &= distance <= seg.span.window || place < seg.span.sink;
          if (!seen) s[j] = -INFINITY;
          top[nt][j % 2] = fmaxf(top[nt][j % 2], s[j]);
        }
        *scores_of(i, nt) = make_float4(s[0], s[1], s[2], s[3]);
      }
  }

  template <bool Bf16>
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (Bf16)
      ptx::mma_m16n8k16_bf16(d, a, b, d);
    else
      ptx::mma_m16n8k16_f16(d, a, b, d);
  }

  __device__ void scores(Format format, const Tokens& t, float (&top)[NT][2]) {
    const bool rotated = Packed && !is_rows(format) && format != Format::kivi2;
    float add[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        add[nt][i] = rotated ? rows[8 * nt + 2 * c + i].q_mu : 0.0f;
        top[nt][i] = kLowest;
      }
    if (format == Format::bf16) {
      row_scores<true>(t, add, top);
    } else if (!Packed || format == Format::f16) {
      row_scores<false>(t, add, top);
    } else if constexpr (Packed) {
      if (format == Format::u2)
        code_scores<2>(t, add, top);
      else if (format == Format::u4)
        code_scores<4>(t, add, top);
      else if (format == Format::u3)
        code_scores<3>(t, add, top);
      else if (format == Format::u8)
        code_scores<8>(t, add, top);
      else
        kivi2_scores(t, add, top);
    }
    if (p.softcap > 0.0f || p.alibi_slopes || t.edge) finish_scores(t, top);
  }

  // B operands of steps 2 n and 2 n + 1.
  __device__ void load_queries(Queries kind, int nt, int n, uint32_t (&q)[2][2]) const {
    const uint4 w =
        *reinterpret_cast<const uint4*>(queries + p.layout.queries[kind] + ((nt * T::kStepPairs + n) * 32 + lane) * 16);
    q[0][0] = w.x, q[0][1] = w.y, q[1][0] = w.z, q[1][1] = w.w;
  }

  // Where warps have rows of their own, shared memory is what they wait for, and a third of it would be queries.
  __device__ void keep_queries(Queries kind) {
    if (kept == kind) return;
    kept = kind;
#pragma unroll
    for (int n = 0; n < T::kStepPairs; ++n)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) load_queries(kind, nt, n, kept_queries[n][nt]);
  }

  template <bool Bf16>
  __device__ void row_scores(const Tokens& t, const float (&add)[NT][2], float (&top)[NT][2]) {
    // matrices 0 1: tokens 0-7 and 8-15 of channels 0-7; 2 3: of channels 8-15
    const uint32_t at = ptx::smem_u32(t.k) + (token_of(lane % 8) + (lane & 8)) * T::kPitch + (lane >> 4) * 16;
    constexpr Queries kind = Bf16 ? kQueriesBf16 : kQueriesF16;
    if constexpr (kKeepQueries) keep_queries(kind);
    float x[NT][4] = {};
#pragma unroll
    for (int n = 0; n < T::kStepPairs; ++n) {
      uint32_t q[NT][2][2];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        if constexpr (kKeepQueries)
          memcpy(q[nt], kept_queries[n][nt], sizeof(q[nt]));
        else
          load_queries(kind, nt, n, q[nt]);
#pragma unroll
      for (int i = 0; i < 2 && 2 * n + i < T::kSteps; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, at + (2 * n + i) * 32);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) mma<Bf16>(x[nt], a, q[nt][i]);
      }
    }
    keep_scores(0, x, add, top);
  }

  // 64 channels, four steps: operands of this lane's two tokens as unpack() leaves them.
  __device__ void channel_scores(Queries kind, int first_step, const uint32_t (&a)[8], const uint32_t (&b)[8],
                                 float (&x)[NT][4]) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t k[4] = {a[2 * s], b[2 * s], a[2 * s + 1], b[2 * s + 1]};
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        uint32_t q[2][2];
        load_queries(kind, nt, (first_step + s) / 2, q);
        mma<false>(x[nt], k, q[s % 2]);
      }
    }
  }

  // Lane c reads the c-th quarter of each scale group's channels, of tokens g and g + 8.
  template <int B>
  __device__ void code_scores(const Tokens& t, const float (&add)[NT][2], float (&top)[NT][2]) const {
    constexpr int bits = B == 3 ? 2 : B, token_bytes = D * bits / 8;
    constexpr int bytes = T::kGroup / 4 * bits / 8, words = bytes / 4, high_bytes = T::kGroup / 32;
    const uint8_t* high = t.k + t.count * token_bytes;
    const uint8_t* scales = high + (B == 3 ? t.count * (D / 8) : 0);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      const int a = 16 * i + token_of(g), b = a + 8;
      float x[NT][4] = {};
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        uint32_t wa[words], wb[words], ha[1] = {}, hb[1] = {};
        const uint8_t* at = t.k + (4 * group + c) * bytes;
        load_words<bytes>(at + a * token_bytes, wa);
        load_words<bytes>(at + b * token_bytes, wb);
        if constexpr (B == 3) {
          load_words<high_bytes>(high + a * (D / 8) + (4 * group + c) * high_bytes, ha);
          load_words<high_bytes>(high + b * (D / 8) + (4 * group + c) * high_bytes, hb);
        }
        float part[NT][4] = {};
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t xa[8], xb[8];
          unpack<B>(pair_channels<B>(wa, ha[0], n), bias, xa);
          unpack<B>(pair_channels<B>(wb, hb[0], n), bias, xb);
          const int first_step = group * (T::kGroup / 16) + 4 * n;
          channel_scores(kQueriesRotated, first_step, xa, xb, part);
          if constexpr (T::kTwoTerms)
            if (p.layout.queries[kQueriesRotatedRest] >= 0)
              channel_scores(kQueriesRotatedRest, first_step, xa, xb, part);
        }
        const float s[2] = {half_at(scales, a * T::kGroups + group), half_at(scales, b * T::kGroups + group)};
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int j = 0; j < 4; ++j) x[nt][j] += part[nt][j] * s[j / 2];
      }
      keep_scores(i, x, add, top);
    }
  }

  // On a quarter of every key, because zero + 3 scale may exceed what fp16 holds.
  __device__ void kivi2_scores(const Tokens& t, const float (&add)[NT][2], float (&top)[NT][2]) const {
    constexpr int bytes = T::kGroup / 16;
    const uint8_t* scales = t.k + t.count * (D / 4);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      const int a = 16 * i + token_of(g), b = a + 8;
      float x[NT][4] = {};
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        uint32_t wa[bytes / 4], wb[bytes / 4];
        const uint8_t* at = t.k + (4 * group + c) * bytes;
        load_words<bytes>(at + a * (D / 4), wa);
        load_words<bytes>(at + b * (D / 4), wb);
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          const uint8_t* affine = scales + (group * T::kGroup + c * (T::kGroup / 4) + 16 * n) * 2;
          uint32_t scale[8], zero[8], xa[8], xb[8];
          load_words<32>(affine, scale);
          load_words<32>(affine + D * 2, zero);
          unpack<2, true>(pair_channels<2>(wa, 0, n), bias, xa);
          unpack<2, true>(pair_channels<2>(wb, 0, n), bias, xb);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t both = j % 2 == 0 ? 0x5410 : 0x7632;  // channels j and j + 8
            const uint32_t s = __byte_perm(scale[j / 2], scale[j / 2 + 4], both);
            const uint32_t z = fma2(__byte_perm(zero[j / 2], zero[j / 2 + 4], both), kQuarters, 0u);
            xa[j] = fma2(xa[j], s, z);
            xb[j] = fma2(xb[j], s, z);
          }
          channel_scores(kQueriesPlain, group * (T::kGroup / 16) + 4 * n, xa, xb, x);
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) x[nt][j] *= 4.0f;
      keep_scores(i, x, add, top);
    }
  }

  // ---- online softmax

  __device__ void scale_acc(const float (&f)[NT][2]) {
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][nt][j] *= f[nt][j % 2];
  }

  static __device__ __forceinline__ float max_over_tokens(float x) {  // lanes of the same c hold the same rows
#pragma unroll
    for (int h = 4; h < 32; h *= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, h));
    return x;
  }

  // Soon the maximum is rarely exceeded, and nothing is to be done.
  __device__ void raise_maximum(const float (&top)[NT][2]) {
    bool above = false;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) above |= top[nt][0] > m[nt][0] || top[nt][1] > m[nt][1];
    if (!__any_sync(kWholeWarp, above)) return;
    float f[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float to = fmaxf(m[nt][i], max_over_tokens(top[nt][i]));
        f[nt][i] = ptx::ex2(m[nt][i] - to);
        m[nt][i] = to;
        l[nt][i] *= f[nt][i];
      }
    scale_acc(f);
  }

  // Weights exp2(score - m) of tile i.
  __device__ void weights_of(int i, float (&w)[NT][4]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float4 x = *scores_of(i, nt);
      w[nt][0] = ptx::ex2(x.x - m[nt][0]);
      w[nt][1] = ptx::ex2(x.y - m[nt][1]);
      w[nt][2] = ptx::ex2(x.z - m[nt][0]);
      w[nt][3] = ptx::ex2(x.w - m[nt][1]);
      l[nt][0] += w[nt][0] + w[nt][2];
      l[nt][1] += w[nt][1] + w[nt][3];
    }
  }

  // ---- sums over V

  __device__ void values(Format format, const Tokens& t) {
    const int to = is_rows(format) ? kRowBasis : format == Format::kivi2 ? kPlainBasis : kRotatedBasis;
    if (Packed && basis != to && basis != kNoBasis) flush();
    basis = to;
    if (format == Format::bf16) {
      row_values<true>(t);
    } else if (!Packed || format == Format::f16) {
      row_values<false>(t);
    } else if constexpr (Packed) {
      if (format == Format::kivi2) return kivi2_values(t);
      raise_factor(t, format);
      if (format == Format::u2)
        code_values<2>(t);
      else if (format == Format::u4)
        code_values<4>(t);
      else if (format == Format::u3)
        code_values<3>(t);
      else
        code_values<8>(t);
    }
  }

  // Weights -> B operands: (tokens 2 c and 2 c + 1, row g), (the same + 8).
  template <bool Bf16>
  static __device__ __forceinline__ void operands(const float (&w)[NT][4], uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lo = w[nt][2 * i], hi = w[nt][2 * i + 1];
        b[nt][i] = ptx::movmatrix_trans(Bf16 ? pack_bf16(lo, hi) : pack_f16(lo, hi));
      }
  }

  template <bool Bf16>
  __device__ void row_values(const Tokens& t) {
    float w[NT][4];
    uint32_t b[NT][2];
    weights_of(0, w);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 4; ++j) w[nt][j] *= p.layout.row_factor;
    operands<Bf16>(w, b);
    // matrices 0 1: channels 0-7 and 8-15 of tokens 0-7; 2 3: of tokens 8-15
    const uint32_t at = ptx::smem_u32(t.v) + (token_of(lane % 8) + (lane >> 4) * 8) * T::kPitch + (lane & 8) * 2;
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a, at + i * 32);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma<Bf16>(acc[i][nt], a, b[nt]);
    }
  }

  // 8 channels, four steps: of tokens 2 c and 2 c + 1, and of the tokens 8 further on.
  __device__ void channel_values(int first_step, const uint32_t (&lo)[8], const uint32_t (&hi)[8],
                                 const uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t v[4] = {lo[2 * s], lo[2 * s + 1], hi[2 * s], hi[2 * s + 1]};
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma<false>(acc[first_step + s][nt], v, b[nt]);
    }
  }

  // Token i = 0 ... 3 of this lane in the B operands' order.
  __device__ int value_token(int i) const { return token_of(2 * c + i % 2) + i / 2 * 8; }

  // fp16 holds weight * scale * v_factor: that keeps the largest scale so far between 2^14 and 2^15, so that nothing
  // overflows and what is down to 2^-28 of it keeps all its bits.
  __device__ void raise_factor(const Tokens& t, Format format) {
    const int bits = code_bits(format);
    const uint8_t* scales = t.v + t.count * (D * bits / 8);
    float top = 0.0f;
#pragma unroll 1
    for (int i = 2 * lane; i < t.count * T::kGroups; i += 64) {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(scales + 2 * i));
      top = fmaxf(top, fmaxf(both.x, both.y));
    }
    if (!__any_sync(kWholeWarp, top * v_factor >= 32768.0f)) return;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, h));
    top = fminf(top, kMaxScale);  // Inf may stay Inf
    const float factor = bits_float((127u + 14u + 127u - (float_bits(top) >> 23)) << 23);
    float f[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) f[nt][0] = f[nt][1] = factor / v_factor;
    scale_acc(f);
    v_factor = factor;
  }

  // Lane g reads the g-th eighth of each scale group's channels, of its four tokens.
  template <int B>
  __device__ void code_values(const Tokens& t) {
    constexpr int bits = B == 3 ? 2 : B, token_bytes = D * bits / 8;
    constexpr int bytes = T::kGroup / 8 * bits / 8, words = bytes < 4 ? 1 : bytes / 4, high_bytes = T::kGroup / 64;
    const uint8_t* high = t.v + t.count * token_bytes;
    const uint8_t* scales = high + (B == 3 ? t.count * (D / 8) : 0);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      float weight[NT][4];
      weights_of(i, weight);
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float w[NT][4];
        const int a = (16 * i + token_of(g)) * T::kGroups + group;
        const float s[2] = {half_at(scales, a) * v_factor, half_at(scales, a + 8 * T::kGroups) * v_factor};
        bool nan = false;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[nt][j] = weight[nt][j] * s[j / 2];
            nan |= w[nt][j] != w[nt][j];
          }
        if (t.edge && __any_sync(kWholeWarp,
                                 nan)) {  // a row that does not see a token does not see its NaN
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int j = 0; j < 4; ++j) w[nt][j] = weight[nt][j] == 0.0f ? 0.0f : w[nt][j];
        }
        uint32_t b[NT][2], x[4][words], h[4][1] = {};
        operands<false>(w, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = 16 * i + value_token(j);
          load_words<bytes>(t.v + token * token_bytes + (8 * group + g) * bytes, x[j]);
          if constexpr (B == 3) load_words<high_bytes>(high + token * (D / 8) + (8 * group + g) * high_bytes, h[j]);
        }
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t lo[8], hi[8];
          unpack<B>(pair_tokens<B>(x[0], h[0][0], x[1], h[1][0], n), bias, lo);
          unpack<B>(pair_tokens<B>(x[2], h[2][0], x[3], h[3][0], n), bias, hi);
          channel_values(group * (T::kGroup / 16) + 4 * n, lo, hi, b);
        }
      }
    }
  }

  // On a quarter of every value, as kivi2_scores.
  __device__ void kivi2_values(const Tokens& t) {
    constexpr int bytes = T::kGroup / 32, groups = D / 32;
    const uint8_t* scales = t.v + t.count * (D / 4);
    const uint8_t* zeros = scales + t.count * (groups * 2);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      float w[NT][4];
      weights_of(i, w);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) w[nt][j] *= kWeightFactor;
      uint32_t b[NT][2];
      operands<false>(w, b);
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        const int of_32 = group * (T::kGroup / 32) + g * (T::kGroup / 8) / 32;
        uint32_t x[4][1], s[4], z[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = 16 * i + value_token(j);
          load_words<bytes>(t.v + token * (D / 4) + (8 * group + g) * bytes, x[j]);
          s[j] = reinterpret_cast<const uint16_t*>(scales)[token * groups + of_32];
          z[j] = reinterpret_cast<const uint16_t*>(zeros)[token * groups + of_32];
        }
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t v[2][8];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            unpack<2, true>(pair_tokens<2>(x[2 * h], 0, x[2 * h + 1], 0, n), bias, v[h]);
            const uint32_t zero = fma2(z[2 * h] | z[2 * h + 1] << 16, kQuarters, 0u);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[h][j] = fma2(v[h][j], s[2 * h] | s[2 * h + 1] << 16, zero);
          }
          channel_values(group * (T::kGroup / 16) + 4 * n, v[0], v[1], b);
        }
      }
    }
  }

  // ---- sums in shared memory

  // Rows of `sums` <- H rows / sqrt(D).
  __device__ void rotate_sums() const {
    if constexpr (Packed) {
      __syncwarp();
      const int at = lane % T::kRowLanes * kPerLane;
      for (int r = lane / T::kRowLanes; r < T::kRows; r += 32 / T::kRowLanes) {
        float x[8];
        load8<DType::f32>(sums + r * T::kSumPitch + at, true, x);
        hadamard(x, D);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] *= fwht_scale(D);
        store8<DType::f32>(x, true, sums + r * T::kSumPitch + at);
      }
      __syncwarp();
    }
  }

  // Channel of acc[step][nt][0 and 1] for which = 0, of [2 and 3] for 1.
  __device__ int channel(int step, int which) const {
    if (!Packed || basis == kRowBasis) return 16 * step + 8 * which + g;
    constexpr int steps = T::kGroup / 16;
    return step / steps * T::kGroup + g * (T::kGroup / 8) + 2 * (step % steps) + which;
  }

  // acc is added to `sums` and cleared; m and l go to `state`. Sums of different bases meet in the plain one: what is
  // there is rotated before rotated sums are added, and all of it back.
  __device__ void flush() {
    const bool rotate = Packed && basis == kRotatedBasis && p.layout.mixed_basis;
    if (rotate && sums_used) rotate_sums();
    const float factor = basis == kRotatedBasis ? 1.0f / v_factor
                         : basis == kPlainBasis ? 4.0f / kWeightFactor
                                                : 1.0f / p.layout.row_factor;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = 8 * nt + 2 * c + i;
        const float before = sums_used ? ptx::ex2(state[r].m - m[nt][i]) : 0.0f;
#pragma unroll
        for (int step = 0; step < T::kValueSteps; ++step)
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            float* sum = sums + r * T::kSumPitch + channel(step, which);
            float& x = acc[step][nt][2 * which + i];
            *sum = x * factor + (sums_used ? *sum * before : 0.0f);
            x = 0.0f;
          }
      }
    if (rotate) rotate_sums();
    __syncwarp();  // state[].m was read
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = l[nt][i];
#pragma unroll
        for (int h = 4; h < 32; h *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, h);
        if (g == 0) state[8 * nt + 2 * c + i] = {m[nt][i], sum};
      }
    __syncwarp();
    v_factor = kNoFactor;
    sums_used = true;
  }
};

// q of the segment's rows into B operands of every kind that the pools need, and what the rows have of their own.
template <int D, int NT, bool Packed, bool Shared>
__device__ __forceinline__ void make_queries(const Params& p, const Segment& seg, uint8_t* smem, Row* rows) {
  using T = Tile<D, NT>;
  const int lane = threadIdx.x % T::kRowLanes, group = group_heads(p, seg.group);
  const float unit = p.softcap > 0.0f ? 1.0f : kLog2e;
  const int block_rows = Shared && seg.own_rows ? p.layout.block_rows : T::kRows;
  for (int r = threadIdx.x / T::kRowLanes; r < block_rows; r += blockDim.x / T::kRowLanes) {
    const bool valid = r < seg.rows;
    const int row = valid ? seg.first_row + r : 0, t = row / group % static_cast<int>(p.Tq);
    const int b = sequence_at(p, seg.node.first + row / (group * static_cast<int>(p.Tq)));
    const int head = head_at(p, seg.group, row % group);
    float x[T::kOctets][8] = {}, rotated[8], q_mu = 0.0f, top = 0.0f;
#pragma unroll
    for (int o = 0; o < T::kOctets; ++o) {
      const int channel = (lane + o * T::kRowLanes) * kPerLane;
      if (valid && channel < D) {
        const int64_t at = b * p.q_batch + t * p.q_token + head * p.q_head + channel;
        load8(p.dtype, static_cast<const uint16_t*>(p.q) + at, p.layout.q_vector, x[o]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[o][i]));
    }
    const bool rotate = Packed && p.layout.queries[kQueriesRotated] >= 0;
    if (rotate) {
      const int64_t at = int64_t(seg.k_head) * D + lane * kPerLane;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (p.transform.centre) q_mu += x[0][i] * p.transform.centre[at + i];
        rotated[i] = p.transform.balance ? x[0][i] / p.transform.balance[at + i] : x[0][i];
      }
      hadamard(rotated, D);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        rotated[i] *= fwht_scale(D);
        top = fmaxf(top, fabsf(rotated[i]));
      }
      q_mu = fold_lanes(q_mu, T::kRowLanes, [](float a, float b) { return a + b; });
    }
    top = fold_lanes(top, T::kRowLanes, [](float a, float b) { return fmaxf(a, b); });
    // The largest becomes 2^7 ... 2^8: far from fp16's end, and what is down to 2^-21 of it keeps all its bits.
    const int exponent = max(static_cast<int>(float_bits(top) >> 23) - 127, -100);
    const float up = bits_float(static_cast<uint32_t>(127 + 7 - exponent) << 23);
    const float down = bits_float(static_cast<uint32_t>(127 - 7 + exponent) << 23);
    // word of (step, register b0 or b1, lane 4 g + c) with g = r % 8
    const auto word = [&](Queries kind, int step, int reg, int c) {
      return reinterpret_cast<uint32_t*>(smem + p.layout.queries[kind]) +
             (((r / 8 * T::kStepPairs + step / 2) * 32 + r % 8 * 4 + c) * 4 + step % 2 * 2 + reg);
    };
#pragma unroll
    for (int o = 0; o < T::kOctets; ++o) {
      const int octet = lane + o * T::kRowLanes;
      if (octet >= 4 * T::kStepPairs) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[o][i] *= up;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (p.layout.queries[kQueriesF16] >= 0)
          *word(kQueriesF16, octet / 2, octet % 2, c) = pack_f16(x[o][2 * c], x[o][2 * c + 1]);
        if (p.layout.queries[kQueriesBf16] >= 0)
          *word(kQueriesBf16, octet / 2, octet % 2, c) = pack_bf16(x[o][2 * c], x[o][2 * c + 1]);
      }
      if constexpr (Packed) {
        // group of channels, quarter c of it, 16 channels n of that, channels 0-7 or 8-15
        constexpr int octets = T::kGroup / 8;
        const int group = octet / octets, in_group = octet % octets, c = in_group / (octets / 4);
        const int n = in_group % (octets / 4) / 2, high = octet % 2;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int step = group * (T::kGroup / 16) + 4 * n + i / 2;
          if (rotate) {
            const float y = rotated[i] * up;
            reinterpret_cast<__half*>(word(kQueriesRotated, step, i % 2, c))[high] = __float2half_rn(y);
            if constexpr (T::kTwoTerms)
              if (p.layout.queries[kQueriesRotatedRest] >= 0)
                reinterpret_cast<__half*>(word(kQueriesRotatedRest, step, i % 2, c))[high] =
                    __float2half_rn(y - __half2float(__float2half_rn(y)));
          }
          if (p.layout.queries[kQueriesPlain] >= 0)
            reinterpret_cast<__half*>(word(kQueriesPlain, step, i % 2, c))[high] = __float2half_rn(x[o][i]);
        }
      }
    }
    if (lane == 0) {
      const int64_t len = p.plan.nodes ? p.seq_lens[b] : seg.node.end;
      Row own;
      own.q_scale = p.scale * unit * down;
      own.q_mu = q_mu * p.scale * unit;
      own.slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride + head] * kLog2e : 0.0f;
      own.before = static_cast<int>(len - p.Tq);
      own.bits = p.tree_mask ? static_cast<uint32_t>(p.tree_mask[b * p.tree_stride + t]) : (2u << t) - 1u;
      own.position = own.before + depth(own.bits);
      own.b = b;
      own.t = static_cast<int16_t>(t);
      own.head = static_cast<int16_t>(head);
      rows[r] = own;
    }
  }
}

}  // namespace kk::cuda
