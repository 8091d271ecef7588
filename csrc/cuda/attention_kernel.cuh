// Decode attention on pages of any mix of formats.
//
// A block works on segments: (node, group, row tile, range of units), a unit being up to 64 tokens of one page
// (attention_schedule.cuh). Its warps take the units in turn, each with its own cp.async pipeline and its own online
// softmax (attention_warp.cuh), and do not wait for each other before the end of the segment, where their states are
// merged; or, where a group has many rows, every warp has its own of them. Rows are (sequence, query, head of the
// group).
#pragma once
#include "cuda/attention_warp.cuh"

namespace kk::cuda {

constexpr float kLn2 = 0.6931471805599453f;

// ---- results

// ln(exp(a) + exp(b)); what is larger, if that is infinite; NaN, if either is.
__device__ __forceinline__ float log_sum(float a, float b) {
  const float top = a > b ? a : b;
  if (top - top == 0.0f) return top + logf(expf(a - top) + expf(b - top));
  return a == a ? top : a;
}

// Sums, m and l of one query row -> out and lse. Each of the row's L lanes has 8 channels O times, 8 L channels apart.
// A sink logit joins the denominator, an extra token that and the sums. Lanes that are not `active` only come along: a
// warp calls it together.
template <int L, int O>
__device__ __forceinline__ void write_row(const Params& p, int64_t b, int64_t t, int64_t head, int64_t group,
                                          float (&x)[O][8], State s, bool active) {
  const int lane = threadIdx.x % L;
  float f = 0.0f, lse = -INFINITY, extra_weight = 0.0f;
  if (s.l > 0.0f || s.l != s.l) {
    f = 1.0f / s.l;
    lse = s.m == INFINITY ? s.m : s.m * kLn2 + logf(s.l);  // an infinite score makes l NaN
  }
  bool there = false;
  if (p.extra.k) {
    const float bias = p.extra.bias[b * p.extra.bias_batch + group * p.extra.bias_head];
    there = bias != -INFINITY;  // else k and v may hold anything
    const auto* q = static_cast<const uint16_t*>(p.q) + b * p.q_batch + t * p.q_token + head * p.q_head;
    const auto* k = static_cast<const uint16_t*>(p.extra.k) + b * p.extra.k_batch + group * p.extra.k_head;
    float dot = 0.0f;
    for (int64_t i = lane * kPerLane; i < p.D && there; i += L * kPerLane) {
      float a[8], c[8];
      load8(p.dtype, q + i, p.layout.q_vector, a);
      load8(p.dtype, k + i, p.layout.extra_vector, c);
#pragma unroll
      for (int j = 0; j < 8; ++j) dot += a[j] * c[j];
    }
    float score = p.scale * fold_lanes(dot, L, [](float a, float c) { return a + c; });
    if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
    if (there) {
      const float joint = log_sum(lse, score + bias);
      if (joint != -INFINITY) {
        f *= expf(lse - joint);
        extra_weight = expf(score + bias - joint);
      }
      lse = joint;
    }
  }
  if (p.sinks) {  // last, as one of +inf leaves no weight to the others
    const float joint = log_sum(lse, p.sinks[head]);
    if (joint != -INFINITY) {
      f *= expf(lse - joint);
      extra_weight *= expf(lse - joint);
    }
    lse = joint;
  }
  if (!active) return;
#pragma unroll
  for (int o = 0; o < O; ++o) {
    const int64_t channel = (lane + o * L) * kPerLane;
    if (channel >= p.Dv) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[o][i] *= f;
    if (there) {
      const auto* v = static_cast<const uint16_t*>(p.extra.v) + b * p.extra.v_batch + group * p.extra.v_head;
      float y[8];
      load8(p.dtype, v + channel, p.layout.extra_vector, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[o][i] += y[i] * extra_weight;
    }
    const int64_t at = b * p.out_batch + t * p.out_token + head * p.out_head + channel;
    store8(p.dtype, x[o], p.layout.out_vector, static_cast<uint16_t*>(p.out) + at);
  }
  if (p.lse && lane == 0) p.lse[(b * p.Tq + t) * p.Hq + head] = lse;
}

// Partial row of what was not cut.
__device__ __forceinline__ int64_t whole_row(const Params& p, int level, int64_t b, int64_t t, int64_t head) {
  return p.layout.whole + ((level * p.B + b) * p.Tq + t) * p.Hq + head;
}

template <int D, int NT, bool Packed, bool Shared, bool Sparse>
__device__ __forceinline__ void run_segment(const ParamsOf<Sparse>& p, const Segment& seg) {
  using T = Tile<D, NT>;
  constexpr int O = T::kValueOctets, L = T::kRowLanes;
  KK_DYN_SMEM(uint8_t, smem);
  KK_SHARED(Row, rows, [T::kRows * (Shared ? kMaxWarps : 1)]);
  KK_SHARED(State, states, [kMaxWarps * T::kRows]);
  const int warp = threadIdx.x / 32;
  KK_SHARED(uint32_t, bias, [1]);
  const auto own = [&](int w) { return smem + p.layout.warps_offset + w * p.layout.warp_bytes; };
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(own(w) + p.layout.sums_offset); };

  make_queries<D, NT, Packed, Shared>(p, seg, smem, rows);
  if (threadIdx.x == 0) bias[0] = p.layout.bias;
  __syncthreads();
  const bool own_rows = Shared && seg.own_rows;
  const int tile = own_rows ? warp : 0;
  Warp<D, NT, Packed, Shared, Sparse>(p, seg, smem + tile * T::kQueryBytes, rows + tile * T::kRows,
                                      own(warp) + p.layout.stages_offset, reinterpret_cast<float4*>(own(warp)),
                                      sums_of(warp), states + warp * T::kRows, bias[0])
      .run();
  __syncthreads();

  const int lane = threadIdx.x % L, block_rows = own_rows ? p.layout.block_rows : T::kRows;
  for (int r = threadIdx.x / L; r < block_rows; r += blockDim.x / L) {
    const int in_warp = r % T::kRows, first_warp = own_rows ? r / T::kRows : 0;
    const int end_warp = own_rows ? first_warp + 1 : p.layout.warps;
    float m = kLowest, l = 0.0f, sum[O][8] = {};
    for (int w = first_warp; w < end_warp; ++w) m = fmaxf(m, states[w * T::kRows + in_warp].m);
    for (int w = first_warp; w < end_warp; ++w) {
      const State s = states[w * T::kRows + in_warp];
      const float f = ptx::ex2(s.m - m);
      l += s.l * f;
#pragma unroll
      for (int o = 0; o < O; ++o) {
        const int channel = (lane + o * L) * kPerLane;
        if (channel >= T::kDv) continue;
        float x[8];
        load8<DType::f32>(sums_of(w) + in_warp * T::kSumPitch + channel, true, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[o][i] += x[i] * f;
      }
    }
    if (Packed && p.layout.rotate_at_end) {
      hadamard(sum[0], D);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[0][i] *= fwht_scale(D);
    }
    const Row& row = rows[r];
    const bool exists = r < seg.rows;
    if (seg.cut < 0 && seg.alone) {
      write_row<L, O>(p, row.b, row.t, row.head, seg.group, sum, {m, l}, exists);
    } else if (exists) {
      const int64_t at = seg.cut >= 0 ? seg.cut + r : whole_row(p, seg.level, row.b, row.t, row.head);
      float* to = p.layout.partials + at * partial_floats(T::kDv);
#pragma unroll
      for (int o = 0; o < O; ++o) {
        const int channel = (lane + o * L) * kPerLane;
        if (channel < T::kDv) store8<DType::f32>(sum[o], true, to + channel);
      }
      if (lane == 0) *reinterpret_cast<State*>(to + T::kDv) = {m, l};
    }
  }
}

// ---- kernels

// Registers: 168 leave room for 3 blocks of 4 warps on an SM, 255 for 2.
template <int D, int NT, bool Shared>
constexpr int kBlocksPerSm = D * NT <= 128 && !Shared ? 3 : 2;

template <int D, int NT, bool Packed, bool Shared, bool Sparse>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm<D, NT, Shared>)
    attention_kernel(const __grid_constant__ ParamsOf<Sparse> p) {
  KK_SHARED(Walk, walk, [1]);
  KK_SHARED(Segment, segment, [1]);
  Walk start{blockIdx.x, blockIdx.x, p.B * p.layout.tiles * p.layout.splits, 0, 0, 0};
  if (p.layout.splits == 0) {
    const Shares shares(p, count_steps(p, 0).all);
    if (blockIdx.x >= static_cast<unsigned>(shares.n)) return;
    start.at = start.begin = shares.begin(blockIdx.x);
    start.end = shares.begin(blockIdx.x + 1);
    const Place place = find_step(p, start.at);
    start.node = Sparse ? place.item / p.Hkv : place.item;
    start.group = Sparse ? static_cast<int>(place.item % p.Hkv) : 0;
    start.before = place.before;
  }
  if (threadIdx.x == 0) walk[0] = start;
  for (;;) {
    __syncthreads();  // the segment before has been written
    if (threadIdx.x == 0) segment[0] = next_segment(p, walk[0]);
    __syncthreads();
    if (segment[0].begin == segment[0].end) return;
    run_segment<D, NT, Packed, Shared, Sparse>(p, segment[0]);
  }
}

// The nodes of a sequence, from its leaf up.
struct Chain {
  int length, node[kMaxPlanDepth];
  int64_t before[kMaxPlanDepth];  // steps of the list before the node
  int position;                   // of the sequence in the plan's order
};

// Merges the parts of what was cut and of sequences with several nodes, and writes the rows of empty sequences. Block
// (b, y): rows y, y + gridDim.y, ... in groups that fill the block. L lanes hold a row, `ways` such groups of lanes take
// every ways-th of its parts.
template <int L, int O, bool Sparse>
__global__ void __launch_bounds__(32 * kMaxWarps, 4) merge_kernel(const __grid_constant__ ParamsOf<Sparse> p) {
  const int b = blockIdx.x;
  KK_SHARED(Chain, chain, [1]);
  if (threadIdx.x == 0) {
    Chain& c = chain[0];
    c.length = 0;
    c.position = b;
    if (!p.plan.nodes) c.node[c.length++] = b;
    for (int n = p.plan.nodes ? p.plan.leaf[b] : -1; n >= 0 && c.length < kMaxPlanDepth; n = p.plan.nodes[n].parent) {
      if (c.length == 0) c.position = p.plan.nodes[n].first;  // a leaf has one sequence
      c.node[c.length++] = n;
    }
  }
  __syncthreads();
  int64_t all = 0;
  for (int i = 0; i < chain[0].length && p.layout.splits == 0; ++i) {
    const StepCount steps = count_steps(p, Sparse ? b * p.Hkv : chain[0].node[i]);
    all = steps.all;
    if (threadIdx.x == 0) chain[0].before[i] = steps.before;
  }
  __syncthreads();
  const Shares shares(p, all);
  constexpr int kLaneGroups = 32 * kMaxWarps / L, kFloats = L * O * kPerLane;
  KK_SHARED(float, sums, [kLaneGroups][kFloats]);
  KK_SHARED(State, states, [kLaneGroups]);
  const int lane = threadIdx.x % L, ways = p.layout.merge_ways, per_block = kLaneGroups / ways;
  const int lane_group = threadIdx.x / L, way = lane_group % ways, in_block = lane_group / ways;
  const int Hq = static_cast<int>(p.Hq), rows = static_cast<int>(p.Tq) * Hq;
  for (int first_row = blockIdx.y * per_block; first_row < rows; first_row += gridDim.y * per_block) {
    const bool exists = first_row + in_block < rows;
    const int row = exists ? first_row + in_block : 0, t = row / Hq;
    int group = 0,
        in_group = row % Hq;  // query heads in the order of their groups
    if (!p.heads.mapped) {
      group = in_group / p.layout.group;
      in_group %= p.layout.group;
    } else {
      while (p.heads.first[group + 1] <= in_group) ++group;
      in_group -= p.heads.first[group];
    }
    const int head = head_at(p, group, in_group);

    float m = kLowest, l = 0.0f, sum[O][8] = {};
    bool written = false;  // where it was computed
    const auto add = [&](const float* part, State s) {
      const float top = fmaxf(m, s.m), before = ptx::ex2(m - top), f = ptx::ex2(s.m - top);
      m = top;
      l = l * before + s.l * f;
#pragma unroll
      for (int o = 0; o < O; ++o) {
        const int channel = (lane + o * L) * kPerLane;
        if (channel >= p.Dv) continue;
        float x[8];
        load8<DType::f32>(part + channel, true, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[o][i] = sum[o][i] * before + x[i] * f;
      }
    };
    const auto add_row = [&](int64_t partial_row) {
      const float* part = p.layout.partials + partial_row * partial_floats(p.Dv);
      add(part, *reinterpret_cast<const State*>(part + p.Dv));
    };
    for (int i = 0; i < chain[0].length; ++i) {
      const Node node = node_at(p, chain[0].node[i]);
      const Span span = span_of(p, node, group);
      if (span.units == 0) continue;
      const int64_t node_row = ((chain[0].position - node.first) * p.Tq + t) * group_heads(p, group) + in_group;
      const int64_t tile = node_row / p.layout.block_rows, tile_row = node_row % p.layout.block_rows;
      if (p.layout.splits) {
        int64_t tiles = b * p.layout.tiles + tile;
        for (int g = 0; g < group; ++g) tiles += group_tiles(p, node, g);
        const int64_t n = Splits(p, span).count;
        written = n == 1;
#pragma unroll(4 / O)
        for (int64_t k = way; k < n && n > 1; k += ways)
          add_row((tiles * p.layout.splits + k) * p.layout.block_rows + tile_row);
      } else {
        const Steps steps(p, node, group, span);
        const int64_t begin = chain[0].before[i] + steps_before(p, node, group) + tile * steps.all;
        const int first = shares.block_of(begin), last = shares.block_of(begin + steps.all - 1);
        // Units of the tile before those of block k.
        const auto units_before = [&](int k) {
          return steps.unit(min(max(shares.begin(k) - begin, int64_t(0)), steps.all));
        };
        if (units_before(first + 1) == span.units) {  // not cut
          written = chain[0].length == 1;
          if (!written && way == 0) add_row(whole_row(p, chain[0].length - 1 - i, b, t, head));
          continue;
        }
#pragma unroll(4 / O)
        for (int k = first + way; k <= last; k += ways)
          if (units_before(k) < units_before(k + 1))
            add_row((2 * int64_t(k) + (begin > shares.begin(k))) * p.layout.block_rows + tile_row);
      }
    }
    if (ways > 1) {
      __syncthreads();  // those of the rows before were read
      if (way > 0) {
#pragma unroll
        for (int o = 0; o < O; ++o) store8<DType::f32>(sum[o], true, sums[lane_group] + (lane + o * L) * kPerLane);
        if (lane == 0) states[lane_group] = {m, l};
      }
      __syncthreads();
      for (int other = 1; other < ways && way == 0; ++other) add(sums[lane_group + other], states[lane_group + other]);
    }
    write_row<L, O>(p, b, t, head, group, sum, {m, l}, exists && !written && way == 0);
  }
}

}  // namespace kk::cuda
