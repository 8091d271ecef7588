// Decode attention on pages of any mix of formats.
//
// A block works on segments: (node, group, row tile, range of units), a unit being up to 64 tokens of one page
// (attention_schedule.cuh). Its warps take the units in turn, each with its own cp.async pipeline and its own online
// softmax (attention_warp.cuh), and do not wait for each other before the end of the segment, where their states are
// merged; or, where a group has many rows, every warp has its own of them. Rows are (sequence, query, head of the
// group).
#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/attention_warp.cuh"

namespace kk::cuda {
namespace {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMergeBlocks = 1024;  // about as many; every one of them reads seq_lens

// ---- results

// ln(exp(a) + exp(b)); -inf if both are.
__device__ __forceinline__ float log_sum(float a, float b) {
  const float top = a > b ? a : b;
  return top > -INFINITY ? top + logf(expf(a - top) + expf(b - top)) : top;
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
    lse = s.m * kLn2 + logf(s.l);
  }
  if (p.sinks) {
    const float joint = log_sum(lse, p.sinks[head]);
    if (joint > -INFINITY) f *= expf(lse - joint);
    lse = joint;
  }
  if (p.extra.k) {
    const float bias = p.extra.bias[b * p.extra.bias_batch + group * p.extra.bias_head];
    const bool there = bias != -INFINITY;  // else k and v may hold anything
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
      if (joint > -INFINITY) f *= expf(lse - joint);
      extra_weight = expf(score + bias - joint);
      lse = joint;
    }
  }
  if (!active) return;
#pragma unroll
  for (int o = 0; o < O; ++o) {
    const int64_t channel = (lane + o * L) * kPerLane;
    if (channel >= p.Dv) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[o][i] *= f;
    if (extra_weight != 0.0f) {
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

template <int D, int NT, bool Packed, bool Shared>
__device__ __forceinline__ void run_segment(const Params& p, const Segment& seg) {
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
  Warp<D, NT, Packed, Shared>(p, seg, smem + tile * T::kQueryBytes, rows + tile * T::kRows,
                              own(warp) + p.layout.stages_offset, reinterpret_cast<float4*>(own(warp)), sums_of(warp),
                              states + warp * T::kRows, bias[0])
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

template <int D, int NT, bool Packed, bool Shared>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm<D, NT, Shared>)
    attention_kernel(const __grid_constant__ Params p) {
  KK_SHARED(Walk, walk, [1]);
  KK_SHARED(Segment, segment, [1]);
  Walk start{blockIdx.x, blockIdx.x, p.B * p.layout.tiles * p.layout.splits, 0, 0, 0};
  if (p.layout.splits == 0) {
    const Shares shares(p, count_steps(p, 0).all);
    if (blockIdx.x >= shares.n) return;
    start.at = start.begin = shares.begin(blockIdx.x);
    start.end = shares.begin(blockIdx.x + 1);
    const Place place = find_step(p, start.at);
    start.node = place.node;
    start.before = place.before;
  }
  if (threadIdx.x == 0) walk[0] = start;
  for (;;) {
    __syncthreads();  // the segment before has been written
    if (threadIdx.x == 0) segment[0] = next_segment(p, walk[0]);
    __syncthreads();
    if (segment[0].begin == segment[0].end) return;
    run_segment<D, NT, Packed, Shared>(p, segment[0]);
  }
}

// The nodes of a sequence, from its leaf up.
struct Chain {
  int length, node[kMaxPlanDepth];
  int64_t before[kMaxPlanDepth];  // steps of the list before the node
  int position;                   // of the sequence in the plan's order
};

// Merges the parts of what was cut and of sequences with several nodes, and writes the rows of empty sequences. Block
// (b, y): rows y, y + gridDim.y, ... in groups that fill the block.
template <int L, int O>
__global__ void __launch_bounds__(32 * kMaxWarps, 4) merge_kernel(const __grid_constant__ Params p) {
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
    const StepCount steps = count_steps(p, chain[0].node[i]);
    all = steps.all;
    if (threadIdx.x == 0) chain[0].before[i] = steps.before;
  }
  __syncthreads();
  const Shares shares(p, all);
  const int lane = threadIdx.x % L, per_block = blockDim.x / L;
  const int Hq = static_cast<int>(p.Hq), rows = static_cast<int>(p.Tq) * Hq;
  for (int first_row = blockIdx.y * per_block; first_row < rows; first_row += gridDim.y * per_block) {
    const bool exists = first_row + static_cast<int>(threadIdx.x / L) < rows;
    const int row = exists ? first_row + threadIdx.x / L : 0, t = row / Hq;
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
    const auto add = [&](int64_t partial_row) {
      const float* part = p.layout.partials + partial_row * partial_floats(p.Dv);
      const State s = *reinterpret_cast<const State*>(part + p.Dv);
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
        for (int64_t k = 0; k < n && n > 1; ++k) add((tiles * p.layout.splits + k) * p.layout.block_rows + tile_row);
      } else {
        const Steps steps(p, node, group, span);
        const int64_t begin = chain[0].before[i] + steps_before(p, node, group) + tile * steps.all;
        const int64_t first = shares.block_of(begin), last = shares.block_of(begin + steps.all - 1);
        // Units of the tile before those of block k.
        const auto units_before = [&](int64_t k) {
          return steps.unit(min(max(shares.begin(k) - begin, int64_t(0)), steps.all));
        };
        if (units_before(first + 1) == span.units) {  // not cut
          written = chain[0].length == 1;
          if (!written) add(whole_row(p, chain[0].length - 1 - i, b, t, head));
          continue;
        }
#pragma unroll(4 / O)
        for (int64_t k = first; k <= last; ++k)
          if (units_before(k) < units_before(k + 1))
            add((2 * k + (begin > shares.begin(k))) * p.layout.block_rows + tile_row);
      }
    }
    write_row<L, O>(p, b, t, head, group, sum, {m, l}, exists && !written);
  }
}

// ---- host

// Bytes of `tokens` tokens of one side in a stage.
template <int D>
int stage_side(Format format, Side side, int tokens) {
  int bytes = 0;
  with_format(format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    bytes = Fmt::packed ? static_cast<int>(Fmt::side_bytes(side, tokens, D)) : tokens * Tile<D, 1>::kPitch;
  });
  return bytes;
}

bool is_packed(Format f) {
  bool packed = false;
  with_format(f, [&](auto fmt) { packed = decltype(fmt)::packed; });
  return packed;
}
bool is_rotated(Format f) {
  bool rotated = false;
  with_format(f, [&](auto fmt) { rotated = decltype(fmt)::rotated; });
  return rotated;
}

bool any_packed(const AttentionParams& p) {
  bool packed = false;
  for (int i = 0; i < p.num_pools; ++i) packed |= is_packed(p.pools[i].k_format) || is_packed(p.pools[i].v_format);
  return packed;
}

void check_pools(const AttentionParams& p) {
  const auto refuse = [](const std::string& message) { fail(("attention: " + message).c_str()); };
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) refuse("q must be float16 or bfloat16 on CUDA, got float32");
  for (int i = 0; i < p.num_pools; ++i) {
    const Pool& pool = p.pools[i];
    const std::string name = "pool " + std::to_string(i);
    if (p.dtype == DType::f16 && (pool.k_format == Format::bf16 || pool.v_format == Format::bf16))
      refuse("q is float16, but " + name +
             " holds bf16, whose numbers may not fit float16; on CUDA use "
             "bfloat16 queries with it");
    require_aligned16("attention: " + name + ", keys", pool.k, pool.k_page, pool.k_head, pool.k_token);
    require_aligned16("attention: " + name + ", values", pool.v, pool.v_page, pool.v_head, pool.v_token);
    if (p.page_size % 16 != 0 && (pool.k_format != p.pools[0].k_format || pool.v_format != p.pools[0].v_format))
      refuse("page_size " + std::to_string(p.page_size) +
             " is not a multiple of 16, so on CUDA all pools must have one "
             "format; pool 0 and " +
             name + " differ");
  }
}

template <int D>
SideArrays side_arrays(Format format, Side side, int64_t page_size) {
  const int ps = static_cast<int>(page_size);
  SideArrays s{};
  with_format(format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    if constexpr (Fmt::rotated) {
      s.array[0] = {0, D * Fmt::low_bits / 8, 0};
      if (Fmt::bits == 3) s.array[1] = {static_cast<int>(Fmt::plane1_offset(ps, D)), D / 8, 0};
      s.array[2] = {static_cast<int>(Fmt::scales_offset(ps, D)), static_cast<int>(Fmt::groups(D)) * 2, 0};
    } else if constexpr (Fmt::packed) {
      s.array[0] = {0, D / 4, 0};
      const int scales = static_cast<int>(Fmt::scale_offset(ps, D)),
                zeros = static_cast<int>(Fmt::zero_offset(side, ps, D));
      s.array[1] = side == Side::K ? SideArray{scales, 0, D * 2} : SideArray{scales, D / 32 * 2, 0};
      s.array[2] = side == Side::K ? SideArray{zeros, 0, D * 2} : SideArray{zeros, D / 32 * 2, 0};
    }
  });
  return s;
}

Queries queries_for(Format k) {
  return k == Format::f16    ? kQueriesF16
         : k == Format::bf16 ? kQueriesBf16
         : is_rotated(k)     ? kQueriesRotated
                             : kQueriesPlain;
}

// What a stage holds when a unit is so many tokens.
template <int D, int NT>
void set_unit(Layout& layout, const AttentionParams& p, int unit) {
  using T = Tile<D, NT>;
  layout.unit = unit;
  int most_tokens = 0;
  layout.stage_bytes = 0;
  for (int i = 0; i < p.num_pools; ++i) {
    const Pool& pool = p.pools[i];
    const Format k = pool.k_format, v = pool.v_format;
    const bool packed = is_packed(k) && is_packed(v);
    const int tokens = packed ? unit : 16;
    const int k_bytes = stage_side<D>(k, Side::K, tokens), v_bytes = stage_side<D>(v, Side::V, tokens);
    PoolLayout& own = layout.pools[i];
    own = {side_arrays<D>(k, Side::K, p.page_size), side_arrays<D>(v, Side::V, p.page_size), tokens,
           T::kHeader + k_bytes};
    const bool v_in_k = !packed && pool.v == pool.k && k == v && pool.v_page == pool.k_page &&
                        pool.v_head == pool.k_head && pool.v_token == pool.k_token && p.k_share == p.v_share;
    if (v_in_k) own.v_offset = T::kHeader;
    const bool in_one_piece = pool.v == pool.k + k_bytes && pool.v_page == pool.k_page && pool.v_head == pool.k_head;
    if (packed && tokens == p.page_size && in_one_piece) {
      own.k = {{{0, 0, k_bytes + v_bytes}}};
      own.v = {};
    }
    most_tokens = std::max(most_tokens, tokens);
    layout.stage_bytes = std::max({layout.stage_bytes, T::kHeader + k_bytes, own.v_offset + v_bytes});
  }
  layout.stages_offset = most_tokens / 16 * NT * 32 * static_cast<int>(sizeof(float4));
}

// Slots for parts, of block_rows rows each.
int64_t num_parts(const AttentionParams& p, const Layout& layout) {
  return layout.splits ? p.B * layout.tiles * layout.splits : 2 * int64_t(layout.blocks);
}

int64_t heads_of(const AttentionParams& p, int64_t group) {
  return p.heads.mapped ? p.heads.first[group + 1] - p.heads.first[group] : p.Hq / p.Hkv;
}
// As many rows as the largest group of a sequence has.
int64_t most_rows(const AttentionParams& p) {
  int64_t heads = 0;
  for (int64_t g = 0; g < p.Hkv; ++g) heads = std::max(heads, heads_of(p, g));
  return p.Tq * heads;
}

template <int D, int NT, bool Shared>
Layout make_layout(const AttentionParams& p, const CudaExec& exec) {
  using T = Tile<D, NT>;
  Layout layout{};
  layout.bias = kBias;
  layout.group = p.heads.mapped ? 0 : static_cast<int>(p.Hq / p.Hkv);
  layout.uniform = !p.heads.mapped && !p.head_windows;
  layout.tile_rows = T::kRows;
  layout.splits = p.split_tokens > 0 ? (p.max_pages * p.page_size + p.split_tokens - 1) / p.split_tokens : 0;
  for (layout.page_shift = 31; int64_t(1) << (layout.page_shift - 31) < p.page_size;) ++layout.page_shift;
  layout.page_magic = static_cast<uint32_t>(((uint64_t(1) << layout.page_shift) + p.page_size - 1) / p.page_size);

  bool needed[kQueryKinds] = {}, all_rotated = true;
  layout.row_factor = kWeightFactor;
  for (int i = 0; i < p.num_pools; ++i) {
    const Queries kind = queries_for(p.pools[i].k_format);
    needed[kind] = true;
    // A rotated float16 query has more than the 11 bits it came with; bf16 ones come with 8.
    if (kind == kQueriesRotated && p.dtype == DType::f16) needed[kQueriesRotatedRest] = true;
    const Format v = p.pools[i].v_format, first = p.pools[0].v_format;
    all_rotated &= is_rotated(v);
    if (v == Format::bf16) layout.row_factor = 1.0f;
    layout.mixed_basis |= is_rotated(v) != is_rotated(first) || is_packed(v) != is_packed(first);
  }
  layout.rotate_at_end = all_rotated;

  const int block_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device);
  const int sm_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, exec.device);
  constexpr int kStatic = kMaxWarps * T::kRows * static_cast<int>(sizeof(Row) + sizeof(State)) + 512;
  constexpr int kReserved = 1024 + kStatic;  // bytes that CUDA keeps of an SM for every block, and static variables
  const auto fits = [&](int warps, int blocks, int stages) {
    const int tiles = Shared ? warps : 1;  // of T::kRows rows
    layout.warps = warps;
    layout.stages = stages;
    layout.block_rows = tiles * T::kRows;
    layout.warps_offset = 0;
    for (int kind = 0; kind < kQueryKinds; ++kind) {
      layout.queries[kind] = needed[kind] ? layout.warps_offset : -1;
      if (needed[kind]) layout.warps_offset += tiles * T::kQueryBytes;
    }
    const int stages_end = layout.stages_offset + stages * layout.stage_bytes;
    layout.sums_offset = layout.mixed_basis ? stages_end : layout.stages_offset;
    layout.warp_bytes = std::max(stages_end, layout.sums_offset + T::kRows * T::kSumPitch * 4);
    layout.smem = layout.warps_offset + warps * layout.warp_bytes;
    layout.blocks = blocks * device_attribute(cudaDevAttrMultiProcessorCount, exec.device);
    return layout.smem <= std::min(block_limit, sm_limit / blocks) - kReserved;
  };
  const auto choose = [&] {
    // Where warps have rows of their own, as many warps as there are rows for; a plan's nodes may have any number.
    const int64_t tiles = (most_rows(p) + T::kRows - 1) / T::kRows;
    const int most_warps = Shared && !p.plan.nodes ? static_cast<int>(std::min<int64_t>(tiles, kMaxWarps)) : kMaxWarps;
    // Packed codes are unpacked anew for the rows of every warp; 16-bit rows take longer to come than to be used.
    layout.cost = Shared && any_packed(p) ? most_warps : 1;
    // As many blocks on an SM as registers allow if three stages fit, else fewer; then smaller units, then fewer warps.
    // With many rows two stages are enough: a stage is used for longer than the next one takes.
    for (int warps = most_warps; warps > 0; warps /= 2)
      for (int unit = 64; unit >= 16; unit /= 2) {
        if (unit > 16 && (p.page_size % unit || p.split_tokens % unit)) continue;
        set_unit<D, NT>(layout, p, unit);
        for (int blocks = kBlocksPerSm<D, NT, Shared> * kMaxWarps / most_warps; blocks > 0; --blocks)
          for (int stages = 4; stages >= (blocks > 1 && !Shared ? 3 : 2); --stages)
            if (fits(warps, blocks, stages)) return;
      }
    fail("attention: head_dim is too large for the shared memory of this GPU");
  };
  choose();
  for (int64_t g = 0; g < p.Hkv; ++g) layout.tiles += num_tiles(layout, p.Tq * heads_of(p, g));
  layout.whole = num_parts(p, layout) * layout.block_rows;
  return layout;
}

// Calls f(D, NT, Shared). Kernels without Shared have no plan and one row tile per group.
template <typename F>
void with_tile(const AttentionParams& p, F&& f) {
  const int64_t rows = most_rows(p);
  const bool several = p.plan.nodes || rows > 16, packed = any_packed(p);
  one_of<64, 80, 96, 112, 128, 192, 256, 576>("attention: head_dim", p.D, [&](auto d) {
    constexpr int D = decltype(d)::value;
    if constexpr (D == 576) {
      f(d, Int<1>{}, std::true_type{});
    } else {
      if (rows <= 8 && !several) return f(d, Int<1>{}, std::false_type{});
      // Packed formats at 256: two tiles with a second term of q, or of several nodes, take more registers than there
      // are.
      if constexpr (D == 256)
        if (packed && (several || p.dtype == DType::f16)) return f(d, Int<1>{}, std::true_type{});
      if (several) return f(d, Int<2>{}, std::true_type{});
      f(d, Int<2>{}, std::false_type{});
    }
  });
}

template <int D, int NT, bool Packed, bool Shared>
void launch_all(const AttentionParams& q, const CudaExec& exec) {
  using T = Tile<D, NT>;
  Params p{};
  static_cast<AttentionParams&>(p) = q;
  p.layout = make_layout<D, NT, Shared>(q, exec);
  p.layout.partials = static_cast<float*>(q.workspace);
  p.layout.q_vector = aligned16(q.q, q.q_batch * 2, q.q_token * 2, q.q_head * 2);
  p.layout.out_vector = aligned16(q.out, q.out_batch * 2, q.out_token * 2, q.out_head * 2);
  const ExtraToken& x = q.extra;
  p.layout.extra_vector = aligned16(x.k, x.k_batch * 2, x.k_head * 2) && aligned16(x.v, x.v_batch * 2, x.v_head * 2);
  launch(attention_kernel<D, NT, Packed, Shared>, dim3(p.layout.blocks), dim3(32 * p.layout.warps), p.layout.smem,
         exec.stream, p);
  constexpr int rows = 32 * kMaxWarps / T::kRowLanes;
  const int64_t groups = (q.Tq * q.Hq + rows - 1) / rows, most = std::max<int64_t>(1, kMergeBlocks / q.B);
  launch(merge_kernel<T::kRowLanes, T::kValueOctets>,
         dim3(static_cast<unsigned>(q.B), static_cast<unsigned>(std::min(groups, most))), dim3(32 * kMaxWarps), 0,
         exec.stream, p);
}

}  // namespace

int64_t attention_workspace(const AttentionParams& p, const CudaExec& exec) {
  int64_t rows = p.plan.nodes ? kMaxPlanDepth * p.B * p.Tq * p.Hq : 0;
  with_tile(p, [&](auto d, auto nt, auto shared) {
    rows += make_layout<decltype(d)::value, decltype(nt)::value, decltype(shared)::value>(p, exec).whole;
  });
  return rows * partial_floats(p.Dv) * int64_t(sizeof(float));
}

void attention(const AttentionParams& p, const CudaExec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  check_pools(p);
  with_tile(p, [&](auto d, auto nt, auto shared) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    constexpr bool Shared = decltype(shared)::value;
    if constexpr (!Shared || NT == 2 || D == 576) {
      if (!any_packed(p)) return launch_all<D, NT, false, Shared>(p, exec);
    }
    if constexpr (D == 64 || D == 128 || (D == 256 && (!Shared || NT == 1))) {
      launch_all<D, NT, true, Shared>(p, exec);
    }
  });
}

}  // namespace kk::cuda
