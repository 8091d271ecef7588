// How tokens come into the stages of a warp: which ones and from where, cp.async, and what is done to them when they
// have landed, so that whoever uses a stage finds packed sides as a page of its tokens would have them, with codes of
// whole bits and fp16 scales.
//
// With a selection (`Sparse`) a token has two numbers: its place among the selected ones, by which work is cut, and its
// position in the sequence, which says who sees it. A unit is tokens of one page as ever, or where Layout::gather 16
// from anywhere: these are copied one by one to where a page of 16 tokens would have them.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/trits.cuh"

namespace kk::cuda {

template <int D, int NT, bool Packed, bool Shared, bool Sparse>
struct Stages {
  using T = Tile<D, NT>;

  const ParamsOf<Sparse>& p;
  const Segment& seg;
  uint8_t* stages;  // of the warp
  int lane;

  int unit, sub;              // what is loaded next: tile of the unit, or bits of the gathered tokens that were loaded
  int32_t entry, next_entry;  // page-table entries: of this unit and of the warp's next
  int position, next_position;  // with a selection, of token lane % 16
  int issued;                   // stages

  __device__ Stages(const ParamsOf<Sparse>& params, const Segment& segment, uint8_t* own)
      : p(params), seg(segment), stages(own) {
    lane = threadIdx.x % 32;
    unit = seg.begin + threadIdx.x / 32;
    sub = issued = 0;
    find_unit(unit, entry, position);
    find_unit(unit + p.layout.warps, next_entry, next_position);
  }

  __device__ int page_of(int token) const {
    return static_cast<int>(static_cast<uint64_t>(token) * p.layout.page_magic >> p.layout.page_shift);
  }

  // Position of unit u of the segment's list.
  __device__ int first_token_of(int u) const {
    const Span& span = seg.span;
    return span.begin + (u < span.sink_units ? u : u - span.sink_units + span.first_unit) * p.layout.unit;
  }
  __device__ bool visible(int token) const {
    return token < seg.span.end && (token >= seg.span.first_token || token < seg.span.sink);
  }

  // Page-table entry and position of unit u.
  __device__ void find_unit(int u, int32_t& entry_of, int& position_of) const {
    entry_of = position_of = 0;
    if (u >= seg.end) return;
    // Of token lane % 16 where a page has no whole units (16 consecutive tokens then); entries of tokens that are not
    // visible are not looked at, but that of one of the unit which is.
    const int first = first_token_of(u) + lane % 16;
    int token = min(first, seg.span.end - 1);
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
  template <int N>
  __device__ void copy_arrays(uint8_t* to, const uint8_t* side, const SideArray (&arrays)[N], int token, int n) const {
    const uint32_t dst = ptx::smem_u32(to) + lane * 16;
    side += lane * 16;
    const auto copy = [&](const SideArray& array, auto run) {
      const int bytes = n * array.stride + array.fixed;
      run(side + (array.offset + token * array.stride), dst + array.room + n * max(array.size - array.stride, 0),
          bytes - lane * 16);
      return bytes;
    };
    const int first = copy(arrays[0], [&](const uint8_t* from, uint32_t own, int bytes) {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 4 * 512)
#pragma unroll
        for (int j = 0; j < 4 * 512; j += 512)
          if (i + j < bytes) ptx::cp_async<16>(own + i + j, from + i + j);
    });
    if (first == 0) return;
#pragma unroll 1
    for (int i = 1; i < N; ++i) {
      const int bytes = copy(arrays[i], [&](const uint8_t* from, uint32_t own, int left) {
#pragma unroll 1
        for (int j = 0; j < left; j += 512) ptx::cp_async<16>(own + j, from + j);
      });
      if (bytes == 0) return;
    }
  }

  // The gathered tokens of one side, token lane % 16 of `side` at in_page, into the arrays of a page of 16 tokens;
  // zeros where there is none. `of_page`: the side of the page that arrays without tokens come from. Tokens that are
  // not aligned come in the words of 4 bytes that hold them: trits to the beginning of their rooms, scales to `words`.
  template <int N>
  __device__ void copy_tokens(uint8_t* to, uint8_t* words, const uint8_t* side, const uint8_t* of_page,
                              const SideArray (&arrays)[N], int in_page, bool exists) const {
    const int token = lane % 16, half = lane / 16;
    uint32_t word = ptx::smem_u32(words) + 4 * token;
#pragma unroll 1
    for (int i = 0; i < N && arrays[i].stride + arrays[i].fixed > 0; ++i) {
      const SideArray& array = arrays[i];
      const uint8_t* from = side + array.offset + in_page * array.stride;
      const uint32_t dst = ptx::smem_u32(to) + array.room, own = dst + token * array.size;
      if (array.stride >= 16 && array.stride % 16 == 0) {
#pragma unroll 1
        for (int j = half * 16; j < array.stride; j += 32) ptx::cp_async<16>(own + j, exists ? from + j : p.q, exists);
      } else if (array.stride == 8) {
        if (half == 0) ptx::cp_async<8>(own, exists ? from : p.q, exists);
      } else if (array.stride > 0) {
        const int skip = (array.offset + in_page * array.stride) & 3;
        const bool scale = array.stride < 4;
#pragma unroll 1
        for (int j = half * 4; j < skip + array.stride; j += 8)
          ptx::cp_async<4>((scale ? word : own) + j, exists ? from - skip + j : p.q, exists);
        if (scale) word += 16 * 4;
      }
#pragma unroll 1
      for (int j = lane * 16; j < array.fixed; j += 512) ptx::cp_async<16>(dst + j, of_page + array.offset + j);
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
    if (unit < seg.end) {
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
        copy_tokens(v_to, to + kScaleWords + 2 * 16 * 4, v, nullptr, arrays.v, in_page, exists);
      } else {
        copy_arrays(v_to, v, arrays.v, first_in_page, n);
      }
      if (gather)
        sub |= taken;
      else
        sub += n / 16;
      if (gather ? left == taken : sub * 16 >= p.layout.unit || first + n >= seg.span.end) {
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

  // ---- what is done to a stage that has landed, by the warp that loaded it, before others come

  __device__ void finish(uint8_t* stage) const {
    const int pool = reinterpret_cast<const int2*>(stage)->y;
    if (Shared && pool < 0) return;
    const PoolLayout& layout = p.layout.pools[pool];
    uint8_t *const k = stage + kHeader<Sparse>, *const v = stage + layout.v_offset;
    if (layout.grows) {
      __syncwarp();  // everybody's copies have landed
#pragma unroll 1
      for (int side = 0; side < 2; ++side) expand(stage, side == 0 ? k : v, layout.codes[side], layout.tokens);
    }
    if (Sparse && p.layout.gather)
      place_scales(stage, k, v, layout);
    else
      clear_unseen(reinterpret_cast<const int2*>(stage)->x, v, layout, p.pools[pool].v_format);
  }

  // Codes and scales at the end of their rooms -> what fills the rooms.
  __device__ void expand(const uint8_t* stage, uint8_t* side, const Codes& codes, int tokens) const {
    if (codes.trits) expand_trits(stage, side, tokens);
    if (!codes.short_scales || (Sparse && p.layout.gather)) return;
    const int lane = ptx::opaque(threadIdx.x % 32);
    const int channels = D / codes.parts, scales = tokens * (channels > 128 ? channels / 128 : 1);
    for (int part = 0; part < codes.parts; ++part) {
      side += tokens * (channels * codes.bits[part] / 8);
      for (int first = 0; first < scales; first += 32) {  // fp16 numbers do not reach the 8-bit ones that come later
        const int i = first + lane;
        const int bits = i < scales ? side[scales + i] : 0;
        __syncwarp();
        if (i < scales) reinterpret_cast<uint16_t*>(side)[i] = static_cast<uint16_t>(bits << 7);
      }
      side += 2 * scales;
    }
  }

  // 16 tokens at a time, as their codes do not reach the trits of later ones. A lane makes 32 codes of 8 bytes.
  __device__ void expand_trits(const uint8_t* stage, uint8_t* side, int tokens) const {
    constexpr int row = D / 4, pieces = D / 32, group_pieces = T::kGroup / 32, group_bytes = (T::kGroup + 4) / 5;
    constexpr int trit_row = T::kGroups * group_bytes;
    const bool gather = Sparse && p.layout.gather;
    const int lane = ptx::opaque(threadIdx.x % 32), piece = lane % pieces, in_group = piece % group_pieces;
    const int byte = 32 * in_group / 5, skip = 32 * in_group % 5, last = min(7, group_bytes - 1 - byte);
    const uint8_t* trits = side + (gather ? 0 : (row - trit_row) * tokens) + piece / group_pieces * group_bytes + byte;
#pragma unroll 1
    for (int first = 0; first < tokens; first += 16) {
      uint2 made[16 * pieces / 32];
#pragma unroll
      for (int j = 0; j < 16 * pieces / 32; ++j) {
        const int token = first + (j * 32 + lane) / pieces;
        const uint8_t* at = trits + token * (gather ? row : trit_row);
        if (gather) at += (trit_row * reinterpret_cast<const int*>(stage + kPositions)[token]) & 3;
        const uint32_t a = unpack_trits(at[0] | at[1] << 10 | at[2] << 20);
        const uint32_t b = unpack_trits(at[3] | at[4] << 10 | at[5] << 20);
        const uint32_t c = unpack_trits(at[6] | at[last] << 10);
        const uint32_t w[3] = {a | b << 30, b >> 2 | c << 28, c >> 4};
        made[j] = make_uint2(__funnelshift_r(w[0], w[1], 2 * skip), __funnelshift_r(w[1], w[2], 2 * skip));
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 16 * pieces / 32; ++j)
        *reinterpret_cast<uint2*>(side + (first + (j * 32 + lane) / pieces) * row + piece * 8) = made[j];
    }
  }

  // Scales of fewer than 4 bytes a token come with their neighbours in words: cp.async copies no less.
  __device__ void place_scales(uint8_t* stage, uint8_t* k, uint8_t* v, const PoolLayout& layout) const {
    if constexpr (Packed && Sparse) {
      __syncwarp();  // everybody's copies have landed
      const int token = lane % 16, at = reinterpret_cast<const int*>(stage + kPositions)[token];
      for (int slot = lane / 16; slot < 3; slot += 2) {  // of kScaleWords
        const bool values = slot == 2;
        const Codes& codes = layout.codes[values];
        const int part = values ? 0 : slot;
        if (part >= codes.parts) continue;
        const int channels = D / codes.parts, groups = channels > 128 ? channels / 128 : 1;
        const int bytes = groups * (codes.short_scales ? 1 : 2);
        if (bytes == 4) continue;
        uint8_t* side = values ? v : k;
        for (int i = 0; i < part; ++i) side += 16 * (channels * codes.bits[i] / 8 + 2 * groups);
        uint16_t* scales = reinterpret_cast<uint16_t*>(side + 16 * (channels * codes.bits[part] / 8)) + token * groups;
        const uint32_t word =
            reinterpret_cast<const uint32_t*>(stage + kScaleWords)[16 * slot + token] >> 8 * (bytes * at & 3);
        if (!codes.short_scales)
          scales[0] = static_cast<uint16_t>(word);
        else
          for (int i = 0; i < groups; ++i) scales[i] = static_cast<uint16_t>((word >> 8 * i & 0xffu) << 7);
      }
    }
  }

  // Numbers of tokens that nobody sees may be anything; as scales and zero points of V they become 0.
  __device__ void clear_unseen(int place, uint8_t* v, const PoolLayout& layout, Format format) const {
    const int count = layout.tokens;
    const bool gap = place < seg.span.first_token && place + count > seg.span.sink;
    if (is_rows(format) || (!gap && place + count <= seg.span.end)) return;
    __syncwarp();  // everybody's copies have landed, or the scales' way into fp16 is done
    const bool kivi2 = format == Format::kivi2;
    const int of_token = kivi2 ? D / 32 : T::kGroups;
    uint16_t* numbers = reinterpret_cast<uint16_t*>(v + count * (D * (kivi2 ? 2 : layout.codes[1].bits[0]) / 8));
    for (int i = lane; i < count * of_token; i += 32)
      if (!visible(place + i / of_token)) {
        numbers[i] = 0;
        if (kivi2) numbers[i + count * of_token] = 0;
      }
  }
};

}  // namespace kk::cuda
