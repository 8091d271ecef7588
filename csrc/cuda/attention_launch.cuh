// What the host does for a launch of attention_kernel and merge_kernel: what the pools must be, what goes where in shared
// memory and in the workspace, and how many blocks there are.
#pragma once
#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/attention_kernel.cuh"

namespace kk::cuda {

constexpr int kMergeBlocks = 1024;  // about as many; every one of them reads seq_lens

inline bool is_packed(Format f) {
  bool packed = false;
  with_format(f, [&](auto fmt) { packed = decltype(fmt)::packed; });
  return packed;
}
inline bool is_rotated(Format f) {
  bool rotated = false;
  with_format(f, [&](auto fmt) { rotated = decltype(fmt)::rotated; });
  return rotated;
}
inline bool is_halves(Format f) {
  bool halves = false;
  with_format(f, [&](auto fmt) {
    using Fmt = decltype(fmt);
    if constexpr (Fmt::rotated) halves = Fmt::parts == 2;
  });
  return halves;
}

inline bool any_packed(const AttentionParams& p) {
  bool packed = false;
  for (int i = 0; i < p.num_pools; ++i) packed |= is_packed(p.pools[i].k_format) || is_packed(p.pools[i].v_format);
  return packed;
}

inline void check_pools(const AttentionParams& p) {
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

// The arrays of a side, for a stage of `tokens` tokens; returns the bytes that they take there.
template <int D, int N>
int stage_side(Format format, Side side, int64_t page_size, int tokens, SideArray (&arrays)[N], Codes& codes) {
  int bytes = 0, n = 0;
  const auto add = [&](int64_t offset, int64_t stride, int64_t size, int64_t fixed = 0) {
    if (size + fixed == 0) return;
    arrays[n++] = {static_cast<int>(offset), static_cast<int>(stride), static_cast<int>(fixed), bytes,
                   static_cast<int>(size)};
    bytes += static_cast<int>(tokens * size + fixed);
  };
  codes = {};
  with_format(format, [&](auto fmt) {
    using Fmt = decltype(fmt);
    const auto add_part = [&](auto part, int64_t from, int64_t channels) {
      using Part = decltype(part);
      const bool trits = std::is_same_v<typename Part::Grid, Ternary>;
      codes.bits[codes.parts++] = trits ? 2 : Part::bits;
      codes.trits = trits;
      codes.short_scales = sizeof(typename Part::Scale::Bits) == 1;
      const int64_t low = Part::low_row(channels), high = Part::high_row(channels), scales = Part::scale_row(channels);
      add(from, low, trits ? channels / 4 : low);
      add(from + Part::plane1_offset(page_size, channels), high, high);
      add(from + Part::scales_offset(page_size, channels), scales, 2 * Part::groups(channels));
    };
    if constexpr (!Fmt::packed) {
      bytes = tokens * Tile<D, 1>::kPitch;
    } else if constexpr (Fmt::rotated) {
      add_part(typename Fmt::template Part<0>{}, 0, D / Fmt::parts);
      if constexpr (Fmt::parts == 2)
        add_part(typename Fmt::template Part<1>{}, Fmt::part_offset(1, page_size, D), D / 2);
    } else {
      const bool keys = side == Side::K;
      const int64_t token = keys ? 0 : D / 32 * 2, fixed = keys ? D * 2 : 0;
      add(0, D / 4, D / 4);
      add(Fmt::scale_offset(page_size, D), token, token, fixed);
      add(Fmt::zero_offset(side, page_size, D), token, token, fixed);
    }
  });
  return bytes;
}

inline Queries queries_for(Format k) {
  return k == Format::f16    ? kQueriesF16
         : k == Format::bf16 ? kQueriesBf16
         : !is_rotated(k)    ? kQueriesPlain
         : is_halves(k)      ? kQueriesHalves
                             : kQueriesRotated;
}

// What a stage holds when a unit is so many tokens.
template <int D, int NT, bool Sparse>
void set_unit(Layout& layout, const AttentionParams& p, int unit) {
  layout.unit = unit;
  int most_tokens = 0;
  layout.stage_bytes = 0;
  for (int i = 0; i < p.num_pools; ++i) {
    const Pool& pool = p.pools[i];
    const Format k = pool.k_format, v = pool.v_format;
    const bool packed = is_packed(k) && is_packed(v);
    const int tokens = packed ? unit : 16;
    PoolLayout& own = layout.pools[i];
    own = {};
    own.tokens = tokens;
    const int k_bytes = stage_side<D>(k, Side::K, p.page_size, tokens, own.k, own.codes[0]);
    const int v_bytes = stage_side<D>(v, Side::V, p.page_size, tokens, own.v, own.codes[1]);
    own.v_offset = kHeader<Sparse> + k_bytes;
    own.grows = own.codes[0].trits || own.codes[0].short_scales || own.codes[1].trits || own.codes[1].short_scales;
    const bool v_in_k = !packed && pool.v == pool.k && k == v && pool.v_page == pool.k_page &&
                        pool.v_head == pool.k_head && pool.v_token == pool.k_token && p.k_share == p.v_share;
    if (v_in_k) own.v_offset = kHeader<Sparse>;
    const bool in_one_piece = pool.v == pool.k + k_bytes && pool.v_page == pool.k_page && pool.v_head == pool.k_head;
    if (packed && tokens == p.page_size && in_one_piece && !layout.gather && !own.grows) {
      own.k[0] = {0, 0, k_bytes + v_bytes, 0, 0};
      own.k[1] = own.v[0] = {};
    }
    most_tokens = std::max(most_tokens, tokens);
    layout.stage_bytes = std::max({layout.stage_bytes, kHeader<Sparse> + k_bytes, own.v_offset + v_bytes});
  }
  layout.stages_offset = most_tokens / 16 * NT * 32 * static_cast<int>(sizeof(float4));
}

// Slots for parts, of block_rows rows each.
inline int64_t num_parts(const AttentionParams& p, const Layout& layout) {
  return layout.splits ? p.B * layout.tiles * layout.splits : 2 * int64_t(layout.blocks);
}

inline int64_t heads_of(const AttentionParams& p, int64_t group) {
  return p.heads.mapped ? p.heads.first[group + 1] - p.heads.first[group] : p.Hq / p.Hkv;
}
// Of the largest group of a sequence.
inline int64_t most_rows(const AttentionParams& p) {
  int64_t heads = 0;
  for (int64_t g = 0; g < p.Hkv; ++g) heads = std::max(heads, heads_of(p, g));
  return p.Tq * heads;
}

template <int D, int NT, bool Shared, bool Sparse>
Layout make_layout(const AttentionParams& p, const CudaExec& exec) {
  using T = Tile<D, NT>;
  Layout layout{};
  layout.bias = kBias;
  layout.group = p.heads.mapped ? 0 : static_cast<int>(p.Hq / p.Hkv);
  layout.uniform = !p.heads.mapped && !p.head_windows && (!Sparse || p.selection.index_head == 0);
  layout.gather = Sparse && (p.selection.tokens == 1 || p.page_size % 16 != 0);
  layout.tile_rows = T::kRows;
  const int64_t most_tokens = Sparse ? p.selection.count * p.selection.tokens : p.max_pages * p.page_size;
  layout.splits = p.split_tokens > 0 ? (most_tokens + p.split_tokens - 1) / p.split_tokens : 0;
  for (layout.page_shift = 31; int64_t(1) << (layout.page_shift - 31) < p.page_size;) ++layout.page_shift;
  layout.page_magic = static_cast<uint32_t>(((uint64_t(1) << layout.page_shift) + p.page_size - 1) / p.page_size);

  bool needed[kQueryKinds] = {}, all_rotated = true;
  layout.row_factor = kWeightFactor;
  for (int i = 0; i < p.num_pools; ++i) {
    const Queries kind = queries_for(p.pools[i].k_format);
    needed[kind] = true;
    // A rotated float16 query has more than the 11 bits it came with; bf16 ones come with 8.
    if (kind == kQueriesRotated && p.dtype == DType::f16) needed[kQueriesRotatedRest] = true;
    if (kind == kQueriesHalves && p.dtype == DType::f16) needed[kQueriesHalvesRest] = true;
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
    const bool own_rows = Shared && !p.plan.nodes && !(Sparse && tiles == 1);
    const int most_warps = own_rows ? static_cast<int>(std::min<int64_t>(tiles, kMaxWarps)) : kMaxWarps;
    // Packed codes are unpacked anew for the rows of every warp; 16-bit rows take longer to come than to be used.
    layout.cost = Shared && any_packed(p) ? most_warps : 1;
    // As many blocks on an SM as registers allow if three stages fit, else fewer; then smaller units, then fewer warps.
    // With many rows two stages are enough: a stage is used for longer than the next one takes.
    for (int warps = most_warps; warps > 0; warps /= 2)
      for (int unit = 64; unit >= 16; unit /= 2) {
        if (unit > 16 && (layout.gather || p.page_size % unit || p.split_tokens % unit)) continue;
        set_unit<D, NT, Sparse>(layout, p, unit);
        for (int blocks = kBlocksPerSm<D, NT, Shared> * kMaxWarps / most_warps; blocks > 0; --blocks)
          for (int stages = 4; stages >= (blocks > 1 && !Shared ? 3 : 2); --stages)
            if (fits(warps, blocks, stages)) return;
      }
    fail("attention: head_dim is too large for the shared memory of this GPU");
  };
  choose();
  for (int64_t g = 0; g < p.Hkv; ++g) layout.tiles += num_tiles(layout, p.Tq * heads_of(p, g));
  layout.whole = num_parts(p, layout) * layout.block_rows;
  // As many as keep the number of blocks; with split_tokens the order of sums must not depend on the batch.
  constexpr int kLaneGroups = 32 * kMaxWarps / T::kRowLanes;
  layout.merge_ways = kLaneGroups;
  while (!layout.splits && layout.merge_ways > 1 && p.B * p.Tq * p.Hq * layout.merge_ways > kMergeBlocks * kLaneGroups)
    layout.merge_ways /= 2;
  return layout;
}

template <int D, int NT, bool Packed, bool Shared, bool Sparse>
ParamsOf<Sparse> make_params(const AttentionParams& q, const CudaExec& exec) {
  ParamsOf<Sparse> p{};
  static_cast<AttentionParams&>(p) = q;
  p.layout = make_layout<D, NT, Shared, Sparse>(q, exec);
  p.layout.partials = static_cast<float*>(q.workspace);
  p.layout.q_vector = aligned16(q.q, q.q_batch * 2, q.q_token * 2, q.q_head * 2);
  p.layout.out_vector = aligned16(q.out, q.out_batch * 2, q.out_token * 2, q.out_head * 2);
  const ExtraToken& x = q.extra;
  p.layout.extra_vector = aligned16(x.k, x.k_batch * 2, x.k_head * 2) && aligned16(x.v, x.v_batch * 2, x.v_head * 2);
  return p;
}

template <int D, int NT, bool Packed, bool Shared, bool Sparse>
void launch_attention(const ParamsOf<Sparse>& p, const CudaExec& exec) {
  using T = Tile<D, NT>;
  launch(attention_kernel<D, NT, Packed, Shared, Sparse>, dim3(p.layout.blocks), dim3(32 * p.layout.warps),
         p.layout.smem, exec.stream, p);
  const int rows = 32 * kMaxWarps / T::kRowLanes / p.layout.merge_ways;
  const int64_t groups = (p.Tq * p.Hq + rows - 1) / rows, most = std::max<int64_t>(1, kMergeBlocks / p.B);
  launch(merge_kernel<T::kRowLanes, T::kValueOctets, Sparse>,
         dim3(static_cast<unsigned>(p.B), static_cast<unsigned>(std::min(groups, most))), dim3(32 * kMaxWarps), 0,
         exec.stream, p);
}

template <int D, int NT, bool Packed, bool Shared>
void launch_dense(const AttentionParams& p, const CudaExec& exec) {
  launch_attention<D, NT, Packed, Shared, false>(make_params<D, NT, Packed, Shared, false>(p, exec), exec);
}

// Calls f(D, NT, Shared) for calls that read all pages. Kernels without Shared have no plan and one row tile per group.
template <typename F>
void with_dense_tile(const AttentionParams& p, F&& f) {
  const int64_t rows = most_rows(p);
  const bool several = p.plan.nodes || rows > 16, packed = any_packed(p);
  one_of<64, 80, 96, 112, 128, 192, 256, 576>("attention: head_dim", p.D, [&](auto d) {
    constexpr int D = decltype(d)::value;
    if constexpr (D == 576) {
      f(d, Int<1>{}, std::true_type{});
    } else {
      if (rows <= 8 && !several) return f(d, Int<1>{}, std::false_type{});
      // Packed formats at 256: two tiles take more registers than there are.
      if constexpr (D == 256)
        if (packed) return f(d, Int<1>{}, std::true_type{});
      if (several) return f(d, Int<2>{}, std::true_type{});
      f(d, Int<2>{}, std::false_type{});
    }
  });
}

// attention_packed.cu: all pages, some of packed formats.
void packed_attention(const AttentionParams& p, const CudaExec& exec);

// sparse_attention.cu: with a selection.
int64_t sparse_attention_workspace(const AttentionParams& p, const CudaExec& exec);
void sparse_attention(const AttentionParams& p, const CudaExec& exec);

}  // namespace kk::cuda
