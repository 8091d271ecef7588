// A block takes 128 records of a KV head, a warp 8 of them at a time for 16 query rows (cuda/score_rows.cuh). Blocks of the
// heads of the same pages are neighbours, as their records are. Bound by the records' bytes: 8 of minmax at D = 128 are
// 4096, and about 320 instructions of a warp with bf16 queries (counted, sm_90a). That is 2.5 of a lane per byte, and an
// H100 issues 8.8 while it reads one.
#include "kvkernels/ops/score_pages.h"

#include "cuda/score_reduce.cuh"

namespace kk::cuda {
namespace {

constexpr int kUnits = 8;  // loads of a lane under way: 16 bytes each, 64 of a record

struct Args : ScorePagesParams {
  ScoreRows rows;
  ScoreSink sink;
  Items which;
  int64_t record_bytes;
  uint32_t heads, chunks;
  // A record has `parts` of part_channels numbers with a scale each (at 16 bits one part, and no scale).
  int digits, parts, part_channels, units_per_part;
};

// Channels of minmax: those of max(q, 0), then those of min(q, 0), with NaN in both.
__device__ __forceinline__ float side_of(float q, bool upper) { return (upper ? q < 0.0f : q > 0.0f) ? 0.0f : q; }

// 16 bytes are 4 S channels.
template <int Bits>
constexpr int kRun = Bits == 16 ? 2 : 4;

template <int Bits>
__device__ __forceinline__ void build_queries(const Args& a, const QueryTile& queries, int64_t b, int h, int tile) {
  const int D = static_cast<int>(a.D), padded = a.units_per_part * 16 * queries.run, each = a.parts * padded / kPerLane;
  for (int i = threadIdx.x; i < kTileRows * each; i += kScoreThreads) {
    const int row = i / each, c = i % each * kPerLane, part = c / padded, channel = c % padded;
    float x[8];
    const bool second = channel >= D;  // 16-bit minmax is one part
    a.rows.load(a, b, h, channel < a.part_channels ? tile + row : a.rows.rows, second ? channel - D : channel, x);
    if (a.layout.kind == SummaryKind::minmax) {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = side_of(x[j], part == 0 && !second);
    }
    queries.put(part * a.units_per_part * queries.run, row, channel, x);
  }
}

template <int Bits>
__global__ __launch_bounds__(kScoreThreads, 4) void score_pages_kernel(__grid_constant__ const Args a) {
  KK_DYN_SMEM(uint4, smem);
  KK_SHARED(float, columns, [kScoreWarps][8][kWarpItems]);
  const int h = static_cast<int>(blockIdx.x % a.heads), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t b = blockIdx.x / a.heads / a.chunks, head = b * a.heads + h;
  const uint32_t count = a.which.count(b), first = blockIdx.x / a.heads % a.chunks * kBlockItems;
  a.sink.fill_behind(head, first, first + kBlockItems, count);
  if (first >= count) return;

  const int units = a.parts * a.units_per_part;
  const QueryTile queries{smem, a.digits, units * kRun<Bits>, kRun<Bits>};
  const int warp = threadIdx.x / 32;
  const uint32_t own = first + warp * kWarpItems;  // items of the warp
  const uint8_t* record = nullptr;                 // of item own + lane
  if (own + lane < count && a.which.has(b, own + lane)) {
    const int32_t entry = a.offsets ? 0 : a.page_table[b * a.table_stride + own + lane];
    const int64_t page = a.offsets ? b * a.which.n + own + lane : entry & kPageMask;
    record = a.records[entry >> 28] + (page * a.heads + h) * a.record_bytes;
  }
  const unsigned there = __ballot_sync(kWholeWarp, record != nullptr);
  const int steps = steps_of(own, count, kColumns);
  const int halves = (units + kUnits - 1) / kUnits, tiles = (a.rows.rows + kTileRows - 1) / kTileRows;

  uint4 w[kUnits];
  uint32_t scales = 0;
  const auto load = [&](int step, int half) {
    const auto address = __shfl_sync(kWholeWarp, reinterpret_cast<unsigned long long>(record), step * kColumns + g);
    const uint8_t* column = reinterpret_cast<const uint8_t*>(address);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = half * kUnits + i, part = Bits == 8 && unit >= a.units_per_part;
      const int c = (unit - part * a.units_per_part) * 16 * kRun<Bits> + t * 4 * kRun<Bits>;
      w[i] = make_uint4(0, 0, 0, 0);
      if (unit < units && c < a.part_channels && column)
        w[i] = __ldg(reinterpret_cast<const uint4*>(column + (part * a.part_channels + c) * Bits / 8));
    }
    if (Bits == 8 && column) {
      const uint16_t* s = reinterpret_cast<const uint16_t*>(column + a.parts * a.part_channels);
      scales = __ldg(s) | static_cast<uint32_t>(a.parts == 2 ? __ldg(s + 1) : 0) << 16;
    }
  };
  if (steps > 0) load(0, 0);

  for (int tile = 0; tile < tiles; ++tile) {
    if (tile > 0) __syncthreads();
    build_queries<Bits>(a, queries, b, h, tile * kTileRows);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
      Sums sums[1];
      float x[4] = {};
      // Ends a part: its columns 2 t and 2 t + 1 have their scales in the lanes that loaded them.
      const auto end_part = [&](int part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t s = __shfl_sync(kWholeWarp, scales, (2 * t + i) * 4) >> (16 * part);
          const float scale = bf16_to_float(static_cast<uint16_t>(s));
          x[i] = fmaf(scale, sums[0].value(i), x[i]);
          x[2 + i] = fmaf(scale, sums[0].value(2 + i), x[2 + i]);
        }
        sums[0] = {};
      };
      for (int half = 0; half < halves; ++half) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          const int unit = half * kUnits + i;
          if (unit >= units) break;
          if (Bits == 8 && unit > 0 && unit == a.units_per_part) end_part(0);
          const uint32_t words[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
#pragma unroll
          for (int s = 0; s < kRun<Bits>; ++s) {
            if constexpr (Bits == 16) {
              multiply<1, 1>(queries, unit * kRun<Bits> + s, {{{words[2 * s], words[2 * s + 1]}}}, sums);
            } else {
              const uint32_t even = signed_bytes(words[s]), odd = signed_bytes(words[s] >> 8);
              multiply<1, 1>(queries, unit * kRun<Bits> + s, {{{low_halves(even, odd), high_halves(even, odd)}}}, sums);
            }
          }
        }
        if (Bits == 8) end_part(a.parts - 1);
        const bool last_half = half + 1 == halves, last_step = last_half && step + 1 == steps;
        if (!last_step || tile + 1 < tiles) load(last_step ? 0 : last_half ? step + 1 : step, last_half ? 0 : half + 1);
      }
      if constexpr (Bits == 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = sums[0].value(i);
      }
      const unsigned has = there >> (step * kColumns);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = has >> (2 * t + i % 2) & 1u ? x[i] * a.scale : -INFINITY;
      a.sink.put(head, a.rows.rows, tile * kTileRows, own, step * kColumns, count, x, columns[warp]);
    }
    a.sink.put_columns(head, tile * kTileRows, own, count, columns[warp]);
  }
}

}  // namespace

int64_t score_pages_workspace(const ScorePagesParams& p, const CudaExec&) { return ReduceLayout(p, 0).bytes; }

void score_pages(const ScorePagesParams& p, const CudaExec& exec) {
  const ReduceLayout layout(p, 0);
  const bool minmax = p.layout.kind == SummaryKind::minmax;
  Args a{p, ScoreRows(p), {}, items_of("score_pages", p, p.n, p.page_size)};
  a.sink = {is_softmax(p.reduce) ? static_cast<float*>(p.workspace) : nullptr, p.out, a.which.n, p.reduce};
  a.record_bytes = summary_bytes(p.layout);
  a.which.offsets = p.offsets, a.which.offsets_stride = p.offsets_stride;
  a.heads = static_cast<uint32_t>(p.Hkv);
  a.chunks = static_cast<uint32_t>(p.n + kBlockItems - 1) / kBlockItems;
  a.digits = digits_of(p.dtype);
  const auto run = [&](auto bits) {
    constexpr int Bits = bits.value;
    a.parts = Bits == 8 && minmax ? 2 : 1;
    a.part_channels = static_cast<int>(Bits == 16 && minmax ? 2 * p.D : p.D);
    a.units_per_part = (a.part_channels * Bits / 8 + 63) / 64;
    const int64_t smem = QueryTile::bytes(a.digits, a.parts * a.units_per_part * kRun<Bits>);
    const unsigned blocks = blocks_of("score_pages", p.B * p.Hkv * a.chunks);
    launch(score_pages_kernel<Bits>, dim3(blocks), dim3(kScoreThreads), static_cast<size_t>(smem), exec.stream, a);
  };
  p.layout.bits == 16 ? run(Int<16>{}) : run(Int<8>{});
  if (is_softmax(p.reduce)) reduce_softmax("score_pages", p, a.sink, a.which, layout, p.workspace, exec);
}

}  // namespace kk::cuda
