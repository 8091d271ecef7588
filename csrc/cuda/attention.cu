// Decode attention on pages of any mix of formats.
//
// A block works on segments: (sequence, KV head, row tile, range of units), a unit being up to 64 tokens of one page
// (attention_schedule.cuh). Its warps take the units in turn, each with its own cp.async pipeline and its own online
// softmax (attention_warp.cuh), and do not wait for each other before the end of the segment, where their states are
// merged. Rows are (query token, head of the group).
#include <algorithm>
#include <string>

#include "cuda/attention_warp.cuh"

namespace kk::cuda {
namespace {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMergeBlocks = 1024;  // about as many; every one of them reads seq_lens

// ---- results

// Sums (8 channels of this lane), m and l of one query row -> out and lse. A sink logit joins the denominator only.
__device__ __forceinline__ void write_row(const Params& p, int64_t b, int64_t t, int64_t head, float (&x)[8], State s,
                                          int octet) {
  float f = 0.0f, lse = -INFINITY;
  if (s.l > 0.0f || s.l != s.l) {
    f = 1.0f / s.l;
    lse = s.m * kLn2 + logf(s.l);
  }
  if (p.sinks) {
    const float sink = p.sinks[head], top = lse > sink ? lse : sink;
    if (top > -INFINITY) {
      const float joint = top + logf(expf(lse - top) + expf(sink - top));
      f *= expf(lse - joint);
      lse = joint;
    }
  }
  if (octet * kPerLane < p.D) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= f;
    const int64_t at = b * p.out_batch + t * p.out_token + head * p.out_head + octet * kPerLane;
    store8(p.dtype, x, p.plan.out_vector, static_cast<uint16_t*>(p.out) + at);
  }
  if (p.lse && octet == 0) p.lse[(b * p.Tq + t) * p.Hq + head] = lse;
}

template <int D, int NT, bool Packed>
__device__ __forceinline__ void run_segment(const Params& p, const Segment& seg) {
  using T = Tile<D, NT>;
  KK_DYN_SMEM(uint8_t, smem);
  KK_SHARED(Row, rows, [T::kRows]);
  KK_SHARED(State, states, [kMaxWarps * T::kRows]);
  const int warp = threadIdx.x / 32;
  KK_SHARED(uint32_t, bias, [1]);
  const auto own = [&](int w) { return smem + p.plan.warps_offset + w * p.plan.warp_bytes; };
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(own(w) + p.plan.sums_offset); };

  make_queries<D, NT, Packed>(p, seg, smem, rows);
  if (threadIdx.x == 0) bias[0] = p.plan.bias;
  __syncthreads();
  Warp<D, NT, Packed>(p, seg, smem, rows, own(warp) + p.plan.stages_offset, reinterpret_cast<float4*>(own(warp)),
                      sums_of(warp), states + warp * T::kRows, bias[0])
      .run();
  __syncthreads();

  const int octet = threadIdx.x % T::kRowLanes;
  for (int r = threadIdx.x / T::kRowLanes; r < T::kRows; r += blockDim.x / T::kRowLanes) {
    float m = kLowest, l = 0.0f, sum[8] = {};
    for (int w = 0; w < p.plan.warps; ++w) m = fmaxf(m, states[w * T::kRows + r].m);
    for (int w = 0; w < p.plan.warps; ++w) {
      const State s = states[w * T::kRows + r];
      const float f = ptx::ex2(s.m - m);
      l += s.l * f;
      if (octet * kPerLane < D) {
        float x[8];
        load8<DType::f32>(sums_of(w) + r * T::kSumPitch + octet * kPerLane, true, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += x[i] * f;
      }
    }
    if (Packed && p.plan.rotate_at_end) {
      hadamard(sum, D);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] *= fwht_scale(D);
    }
    const int row = seg.tile * T::kRows + r;
    if (row >= p.plan.rows) continue;
    if (seg.slot) {
      if (octet * kPerLane < D) store8<DType::f32>(sum, true, seg.slot + r * D + octet * kPerLane);
      if (octet == 0) reinterpret_cast<State*>(seg.slot + T::kRows * D)[r] = {m, l};
    } else {
      write_row(p, seg.b, row / p.plan.group, seg.head * p.plan.group + row % p.plan.group, sum, {m, l}, octet);
    }
  }
}

// ---- kernels

// Registers: 168 leave room for 3 blocks of 4 warps on an SM, 255 for 2.
template <int D, int NT>
constexpr int kBlocksPerSm = D * NT <= 128 ? 3 : 2;

template <int D, int NT, bool Packed>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm<D, NT>)
    attention_kernel(const __grid_constant__ Params p) {
  KK_SHARED(Walk, walk, [1]);
  KK_SHARED(Segment, segment, [1]);
  Walk start{blockIdx.x, blockIdx.x, p.B * p.Hkv * p.plan.row_tiles * p.plan.splits, {}};
  if (p.plan.splits == 0) {
    const int64_t heads = p.plan.row_tiles * p.Hkv;
    const Shares shares(p, count_units(p, 0).all * heads);
    if (blockIdx.x >= shares.n) return;
    start.at = start.begin = shares.begin(blockIdx.x);
    start.end = shares.begin(blockIdx.x + 1);
    start.place = find_unit(p, start.at, heads);
  }
  if (threadIdx.x == 0) walk[0] = start;
  for (;;) {
    __syncthreads();  // the segment before has been written
    if (threadIdx.x == 0) segment[0] = next_segment(p, walk[0], slot_floats(D, 8 * NT));
    __syncthreads();
    if (segment[0].begin == segment[0].end) return;
    run_segment<D, NT, Packed>(p, segment[0]);
  }
}

// Merges the parts of what was cut, and writes the rows of empty sequences. Block (b, y): rows y, y + gridDim.y, ... in
// groups that fill the block.
template <int L>
__global__ void __launch_bounds__(32 * kMaxWarps) merge_kernel(const __grid_constant__ Params p, int tile_rows) {
  const int64_t b = blockIdx.x, heads = p.plan.row_tiles * p.Hkv;
  const Visible v = visible(p, b);
  const Splits splits(p, v);
  UnitCount units{};
  if (p.plan.splits == 0) units = count_units(p, b);
  const Shares shares(p, units.all * heads);
  const int64_t slot_size = slot_floats(p.D, tile_rows);
  const int octet = threadIdx.x % L, per_block = blockDim.x / L;
  for (int row = blockIdx.y * per_block + threadIdx.x / L; row < p.plan.rows * p.Hkv; row += gridDim.y * per_block) {
    const int64_t t = row / p.Hq, head = row % p.Hq;
    const int64_t tile_row = t * p.plan.group + head % p.plan.group, r = tile_row % tile_rows;
    const int64_t item = head / p.plan.group * p.plan.row_tiles + tile_row / tile_rows;
    const int64_t first_unit = units.before * heads + item * v.units;  // equal shares
    int64_t first = 0, n = 0;                                          // blocks or splits
    if (v.units > 0 && p.plan.splits) {
      n = splits.count;
    } else if (v.units > 0) {
      first = shares.block_of(first_unit);
      n = shares.block_of(first_unit + v.units - 1) - first + 1;
    }
    if (n == 1) continue;  // written where it was computed
    const auto slot = [&](int64_t i) {
      if (p.plan.splits) return p.plan.partials + ((b * heads + item) * p.plan.splits + i) * slot_size;
      const int64_t block = first + i;
      return p.plan.partials + (2 * block + (first_unit > shares.begin(block))) * slot_size;
    };
    const auto state = [&](int64_t i) { return reinterpret_cast<const State*>(slot(i) + tile_rows * p.D)[r]; };
    float m = kLowest, l = 0.0f, sum[8] = {};
    for (int64_t i = 0; i < n; ++i) m = fmaxf(m, state(i).m);
#pragma unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const State s = state(i);
      const float f = ptx::ex2(s.m - m);
      l += s.l * f;
      if (octet * kPerLane < p.D) {
        float x[8];
        load8<DType::f32>(slot(i) + r * p.D + octet * kPerLane, true, x);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += x[j] * f;
      }
    }
    write_row(p, b, t, head, sum, {m, l}, octet);
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
             " holds bf16, whose numbers may not fit float16; on CUDA use bfloat16 queries with it");
    require_aligned16("attention: " + name + ", keys", pool.k, pool.k_page, pool.k_head, pool.k_token);
    require_aligned16("attention: " + name + ", values", pool.v, pool.v_page, pool.v_head, pool.v_token);
    if (p.page_size % 16 != 0 && (pool.k_format != p.pools[0].k_format || pool.v_format != p.pools[0].v_format))
      refuse("page_size " + std::to_string(p.page_size) +
             " is not a multiple of 16, so on CUDA all pools must have one format; pool 0 and " + name + " differ");
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
void set_unit(Plan& plan, const AttentionParams& p, int unit) {
  using T = Tile<D, NT>;
  plan.unit = unit;
  plan.stages_offset = unit / 16 * NT * 32 * static_cast<int>(sizeof(float4));
  plan.stage_bytes = 0;
  for (int i = 0; i < p.num_pools; ++i) {
    const Pool& pool = p.pools[i];
    const Format k = pool.k_format, v = pool.v_format;
    const bool packed = is_packed(k) && is_packed(v);
    const int tokens = packed ? unit : 16;
    const int k_bytes = stage_side<D>(k, Side::K, tokens), v_bytes = stage_side<D>(v, Side::V, tokens);
    PoolPlan& own = plan.pools[i];
    own = {side_arrays<D>(k, Side::K, p.page_size), side_arrays<D>(v, Side::V, p.page_size), tokens,
           T::kHeader + k_bytes};
    const bool in_one_piece = pool.v == pool.k + k_bytes && pool.v_page == pool.k_page && pool.v_head == pool.k_head;
    if (packed && tokens == p.page_size && in_one_piece) {
      own.k = {{{0, 0, k_bytes + v_bytes}}};
      own.v = {};
    }
    plan.stage_bytes = std::max(plan.stage_bytes, own.v_offset + v_bytes);
  }
}

template <int D, int NT>
Plan make_plan(const AttentionParams& p, const CudaExec& exec) {
  using T = Tile<D, NT>;
  Plan plan{};
  plan.bias = kBias;
  plan.group = static_cast<int>(p.Hq / p.Hkv);
  plan.rows = static_cast<int>(p.Tq) * plan.group;
  plan.row_tiles = (plan.rows + T::kRows - 1) / T::kRows;
  plan.splits = p.split_tokens > 0 ? (p.max_pages * p.page_size + p.split_tokens - 1) / p.split_tokens : 0;
  for (plan.page_shift = 31; int64_t(1) << (plan.page_shift - 31) < p.page_size;) ++plan.page_shift;
  plan.page_magic = static_cast<uint32_t>(((uint64_t(1) << plan.page_shift) + p.page_size - 1) / p.page_size);

  for (int& offset : plan.queries) offset = -1;
  bool all_rotated = true;
  plan.row_factor = kWeightFactor;
  for (int i = 0; i < p.num_pools; ++i) {
    const auto need = [&](Queries kind) {
      if (plan.queries[kind] >= 0) return;
      plan.queries[kind] = plan.warps_offset;
      plan.warps_offset += T::kQueryBytes;
    };
    const Queries kind = queries_for(p.pools[i].k_format);
    need(kind);
    // A rotated float16 query has more than the 11 bits it came with; bf16 ones come with 8.
    if (kind == kQueriesRotated && p.dtype == DType::f16) need(kQueriesRotatedRest);
    const Format v = p.pools[i].v_format, first = p.pools[0].v_format;
    all_rotated &= is_rotated(v);
    if (v == Format::bf16) plan.row_factor = 1.0f;
    plan.mixed_basis |= is_rotated(v) != is_rotated(first) || is_packed(v) != is_packed(first);
  }
  plan.rotate_at_end = all_rotated;

  // As many blocks on an SM as registers allow if three stages fit, else fewer; then smaller units, then fewer warps.
  const int block_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device);
  const int sm_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, exec.device);
  constexpr int kReserved = 1024 + 1536;  // bytes that CUDA keeps of an SM for every block, and static variables
  const auto fits = [&](int warps, int blocks, int stages) {
    const int stages_end = plan.stages_offset + stages * plan.stage_bytes;
    plan.warps = warps;
    plan.stages = stages;
    plan.sums_offset = plan.mixed_basis ? stages_end : plan.stages_offset;
    plan.warp_bytes = std::max(stages_end, plan.sums_offset + T::kRows * T::kSumPitch * 4);
    plan.smem = plan.warps_offset + warps * plan.warp_bytes;
    plan.blocks = blocks * device_attribute(cudaDevAttrMultiProcessorCount, exec.device);
    return plan.smem <= std::min(block_limit, sm_limit / blocks) - kReserved;
  };
  for (int warps = kMaxWarps; warps > 0; warps /= 2)
    for (int unit = 64; unit >= 16; unit /= 2) {
      if (unit > 16 && (p.page_size % unit || p.split_tokens % unit)) continue;
      set_unit<D, NT>(plan, p, unit);
      for (int blocks = kBlocksPerSm<D, NT>; blocks > 0; --blocks)
        for (int stages = 4; stages >= (blocks > 1 ? 3 : 2); --stages)
          if (fits(warps, blocks, stages)) return plan;
    }
  fail("attention: head_dim is too large for the shared memory of this GPU");
}

template <typename F>
void with_tile(const AttentionParams& p, F&& f) {
  const bool two_terms = p.dtype == DType::f16 && any_packed(p);
  one_of<64, 80, 96, 112, 128, 192, 256>("attention: head_dim", p.D, [&](auto d) {
    if (p.Tq * (p.Hq / p.Hkv) <= 8 || (two_terms && !Tile<d.value, 2>::kTwoTerms))
      f(d, Int<1>{});
    else
      f(d, Int<2>{});
  });
}

int64_t num_slots(const AttentionParams& p, const Plan& plan) {
  return plan.splits ? p.B * plan.row_tiles * p.Hkv * plan.splits : 2 * int64_t(plan.blocks);
}

template <int D, int NT, bool Packed>
void launch_all(const AttentionParams& q, const CudaExec& exec) {
  Params p{};
  static_cast<AttentionParams&>(p) = q;
  p.plan = make_plan<D, NT>(q, exec);
  p.plan.partials = static_cast<float*>(q.workspace);
  p.plan.q_vector = aligned16(q.q, q.q_batch * 2, q.q_token * 2, q.q_head * 2);
  p.plan.out_vector = aligned16(q.out, q.out_batch * 2, q.out_token * 2, q.out_head * 2);
  launch(attention_kernel<D, NT, Packed>, dim3(p.plan.blocks), dim3(32 * p.plan.warps), p.plan.smem, exec.stream, p);
  constexpr int L = Tile<D, NT>::kRowLanes, rows = 32 * kMaxWarps / L;
  const int64_t tiles = (p.plan.rows * q.Hkv + rows - 1) / rows, most = std::max<int64_t>(1, kMergeBlocks / q.B);
  launch(merge_kernel<L>, dim3(static_cast<unsigned>(q.B), static_cast<unsigned>(std::min(tiles, most))),
         dim3(32 * kMaxWarps), 0, exec.stream, p, 8 * NT);
}

}  // namespace

int64_t attention_workspace(const AttentionParams& p, const CudaExec& exec) {
  int64_t bytes = 0;
  with_tile(p, [&](auto d, auto nt) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    bytes = num_slots(p, make_plan<D, NT>(p, exec)) * slot_floats(D, 8 * NT) * int64_t(sizeof(float));
  });
  return bytes;
}

void attention(const AttentionParams& p, const CudaExec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  check_pools(p);
  with_tile(p, [&](auto d, auto nt) {
    constexpr int D = decltype(d)::value, NT = decltype(nt)::value;
    if constexpr (D == 64 || D == 128 || D == 256) {
      if (any_packed(p)) return launch_all<D, NT, true>(p, exec);
    }
    launch_all<D, NT, false>(p, exec);
  });
}

}  // namespace kk::cuda
