// Keys: a block takes 128 tokens of a KV head, several times, and a warp 16 of them at once for 16 query rows
// (cuda/score_rows.cuh): bytes bound 16-bit keys, instructions packed ones. Labels: a thread takes a token.
#include "kvkernels/ops/score_tokens.h"

#include "cuda/key_columns.cuh"
#include "cuda/score_reduce.cuh"

namespace kk::cuda {
namespace {

constexpr int kStepTokens = 2 * kColumns;
constexpr int kMaxRounds = 4, kBlocksPerSm = 16;

struct Args : ScoreTokensParams {
  ScoreRows rows;
  ScoreSink sink;
  Items tokens;
  uint32_t heads = 0, chunks = 0, rounds = 0;  // a block takes 128 tokens `rounds` times
  PoolSide side[kMaxPools] = {};
  int plain_digits = 0, parts_digits[2] = {};  // of q, and of q' for formats of one part and of two; 0: none need it
  bool some_f16 = false, transform_vector = false;
  int64_t record_bytes = 0;  // of a label cache

  Args(const ScoreTokensParams& p, const ScoreSink& s, const Items& i)
      : ScoreTokensParams(p), rows(p), sink(s), tokens(i) {}
};

// The queries of a tile of rows, as formats want them; digits = 0: no pool has such a format.
template <int MaxD>
struct Queries {
  QueryTile plain, rotated, halves;  // q; q' = H (q / t); q' of formats of two parts

  __device__ Queries(const Args& a, uint4* data)
      : plain{data, a.plain_digits, plain_steps(static_cast<int>(a.D)), kPlainRun},
        rotated{behind(plain), a.parts_digits[0], MaxD / 16, unit_run(MaxD, 1)},
        halves{behind(rotated), a.parts_digits[1], MaxD / 16, unit_run(MaxD, 2)} {}

 private:
  static __device__ uint4* behind(const QueryTile& q) { return q.data + QueryTile::bytes(q.digits, q.steps) / 16; }
};

// This lane's channels of q', before the rotation, and its part of q.mu.
__device__ __forceinline__ float load_balanced(const Args& a, int64_t b, int h, int row, int c, const int32_t* order,
                                               float (&x)[8]) {
  const int64_t at = static_cast<int64_t>(h) * a.D;
  float y[8], dot = 0.0f;
  if (order) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int from = order[at + c + i];
      x[i] = a.rows.element(a, b, h, row, from);
      if (a.transform.centre) dot = fmaf(x[i], a.transform.centre[at + from], dot);
      if (a.transform.balance) x[i] = x[i] / a.transform.balance[at + from];
    }
    return dot;
  }
  a.rows.load(a, b, h, row, c, x);
  if (a.transform.centre) {
    load8<DType::f32>(a.transform.centre + at + c, a.transform_vector, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = fmaf(x[i], y[i], dot);
  }
  if (a.transform.balance) {
    load8<DType::f32>(a.transform.balance + at + c, a.transform_vector, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] / y[i];
  }
  return dot;
}

// q of a tile, q' = H (q / t) of formats of one part and of two, and q.mu, so that q.k = q'.k' + q.mu.
template <int MaxD>
__device__ __forceinline__ void build_queries(const Args& a, const Queries<MaxD>& q, float (&bias)[2][kTileRows],
                                              int64_t b, int h, int tile) {
  const int D = static_cast<int>(a.D), padded = plain_steps(D) * 16, lanes = D / kPerLane;
  float x[8];
  if (q.plain.digits)
    for (int i = threadIdx.x; i < kTileRows * padded / kPerLane; i += kScoreThreads) {
      const int row = i * kPerLane / padded, c = i * kPerLane % padded;
      a.rows.load(a, b, h, tile + row, c, x);
      q.plain.put(0, row, c, x);
    }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = 32 / lanes;
  for (int parts = 1; parts <= 2; ++parts) {
    const QueryTile rotated = parts == 1 ? q.rotated : q.halves;
    if (!rotated.digits) continue;
    for (int first = warp * rows; first < kTileRows; first += kScoreWarps * rows) {
      const int row = first + lane / lanes, c = lane % lanes * kPerLane;
      const float dot = load_balanced(a, b, h, tile + row, c, parts == 2 ? a.transform.order : nullptr, x);
      const float sum = fold_lanes(dot, lanes, [](float p, float q) { return p + q; });
      if (c == 0) bias[parts - 1][row] = sum;
      hadamard(x, D / parts);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= fwht_scale(D / parts);
      rotated.put(0, row, c, x);
    }
  }
}

template <int MaxD>
__global__ __launch_bounds__(kScoreThreads, MaxD > 128 ? 3 : 4) void score_keys_kernel(__grid_constant__ const Args a) {
  KK_DYN_SMEM(uint4, smem);
  KK_SHARED(float, columns, [kScoreWarps][8][kWarpItems]);
  KK_SHARED(float, bias, [2][kTileRows]);  // q.mu, summed in the order of each kind of q'
  const int h = static_cast<int>(blockIdx.x % a.heads), lane = threadIdx.x % 32, g = lane / 4;
  const int64_t b = blockIdx.x / a.heads / a.chunks, head = b * a.heads + h;
  const uint32_t count = a.tokens.count(b), block = a.rounds * kBlockItems;
  const uint32_t begin = blockIdx.x / a.heads % a.chunks * block;
  a.sink.fill_behind(head, begin, begin + block, count);
  if (begin >= count) return;

  const int D = static_cast<int>(a.D);
  const Queries<MaxD> queries(a, smem);
  // Steps of the warp, two for each round of 32 tokens.
  const int warp = threadIdx.x / 32;
  const auto own = [&](int step) { return begin + (step / 2 * kScoreWarps + warp) * kWarpItems; };
  int steps = 0;
  for (int i = 0; i < static_cast<int>(a.rounds); ++i) steps += steps_of(own(2 * i), count, kStepTokens);

  Keys<MaxD> keys;
  unsigned long long page = 0;  // of token `lane` of a round
  uint32_t where = 0;           // pool << 28 | token in the page
  KeyPlace first{};             // of the 16 tokens of a step
  Format format = Format::bf16;
  bool f16[2] = {}, some_f16 = false;
  const auto load = [&](int step) {
    const uint32_t token = own(step) + lane;
    if (step % 2 == 0) page = where = 0;
    if (step % 2 == 0 && token < count) {
      const Slot at = locate(token, a.page_size);
      const int32_t entry = a.page_table[b * a.table_stride + at.page];
      page = reinterpret_cast<unsigned long long>(a.side[entry >> 28].page(entry & kPageMask, h));
      where = static_cast<uint32_t>(entry >> 28) << 28 | static_cast<uint32_t>(at.token);
    }
    const int of_round = step % 2 * kStepTokens;
    const auto place = [&](int from, uint32_t& at) {
      const auto address = __shfl_sync(kWholeWarp, page, from);
      at = __shfl_sync(kWholeWarp, where, from);
      return KeyPlace{reinterpret_cast<const uint8_t*>(address), static_cast<int>(at & kPageMask)};
    };
    uint32_t at;
    first = place(of_round, at);
    format = a.side[at >> 28].format;
    // Packed pages have multiples of 16 tokens: those of a step lie in one.
    switch_format(format, [&](auto fmt) {
      using Fmt = decltype(fmt);
      if constexpr (Fmt::rotated) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
          keys.template load_codes<Fmt>(tile, a.page_size, {first.page, first.token + tile * kColumns});
      }
    });
    if (format != Format::bf16 && format != Format::f16) return;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const KeyPlace column = place(of_round + tile * kColumns + g, at);
      keys.load_row(tile, D, a.side[at >> 28].token_stride, column);
      f16[tile] = a.side[at >> 28].format == Format::f16;
    }
    some_f16 = a.some_f16 && __any_sync(kWholeWarp, f16[0] || f16[1]);
  };
  if (steps > 0) load(0);

  const int tiles = (a.rows.rows + kTileRows - 1) / kTileRows;
  for (int row_tile = 0; row_tile < tiles; ++row_tile) {
    if (row_tile > 0) __syncthreads();
    build_queries(a, queries, bias, b, h, row_tile * kTileRows);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
      float x[2][4] = {};
      switch_format(format, [&](auto fmt) {
        using Fmt = decltype(fmt);
        if constexpr (Fmt::rotated) {
          const auto add_unit = [&](auto number) {
            constexpr int unit = decltype(number)::value;
            Sums sums[2];
            keys.template multiply_codes<Fmt, unit>(Fmt::parts == 1 ? queries.rotated : queries.halves, sums);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float base = unit == 0 ? bias[Fmt::parts - 1][g + i / 2 * 8] : x[tile][i];
                x[tile][i] = fmaf(keys.scale(tile, i % 2, unit), sums[tile].value(i), base);
              }
          };
          add_unit(Int<0>{});
          if constexpr (Units<Fmt, MaxD>::count == 2) add_unit(Int<1>{});
        } else {
          Sums sums[2];
          if constexpr (Fmt::packed)
            multiply_kivi2<MaxD>(queries.plain, a.page_size, first, sums);
          else if (some_f16)
            keys.template multiply_rows<true>(queries.plain, D, f16, sums);
          else
            keys.template multiply_rows<false>(queries.plain, D, f16, sums);
#pragma unroll
          for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[tile][i] = sums[tile].value(i);
        }
      });
      const bool last = step + 1 == steps;
      if (!last || row_tile + 1 < tiles) load(last ? 0 : step + 1);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[tile][i] *= a.scale;
        a.sink.put(head, a.rows.rows, row_tile * kTileRows, own(step), step % 2 * kStepTokens + tile * kColumns, count,
                   x[tile], columns[warp]);
      }
      if (step % 2 == 1 || last) a.sink.put_columns(head, row_tile * kTileRows, own(step), count, columns[warp]);
    }
  }
}

// Label i of all channels one behind another.
template <int Bits>
__device__ __forceinline__ float label(const uint8_t* record, int64_t i) {
  if constexpr (Bits == 16) return bf16_to_float(reinterpret_cast<const uint16_t*>(record)[i]);
  if constexpr (Bits == 8) return static_cast<float>(static_cast<int8_t>(record[i]));
  return static_cast<float>(record[i / 2] >> (i % 2 * 4) & 15) - 7.5f;
}

template <int Bits>
__global__ __launch_bounds__(kScoreThreads, 8) void score_labels_kernel(__grid_constant__ const Args a) {
  KK_DYN_SMEM(float, queries);  // [channels][kTileRows]
  const int h = static_cast<int>(blockIdx.x % a.heads), r = static_cast<int>(a.layout.channels);
  const int64_t b = blockIdx.x / a.heads / a.chunks, head = b * a.heads + h;
  const uint32_t count = a.tokens.count(b), block = a.rounds * kBlockItems;
  const uint32_t begin = blockIdx.x / a.heads % a.chunks * block;
  a.sink.fill_behind(head, begin, begin + block, count);
  if (begin >= count) return;

  for (int tile = 0; tile < a.rows.rows; tile += kTileRows) {
    if (tile > 0) __syncthreads();
    for (int i = threadIdx.x; i < r * kTileRows; i += kScoreThreads)
      queries[i] = a.rows.element(a, b, h, tile + i % kTileRows, a.channels[h * r + i / kTileRows]);
    __syncthreads();
    for (uint32_t item = begin + threadIdx.x; item < min(begin + block, count); item += kBlockItems) {
      const Slot at = locate(item, a.page_size);
      const int32_t entry = a.page_table[b * a.table_stride + at.page];
      const uint8_t* record = a.records[entry >> 28] + (int64_t{entry & kPageMask} * a.heads + h) * a.record_bytes;
      float scale = a.scale;
      if (Bits != 16)
        scale *= bf16_to_float(reinterpret_cast<const uint16_t*>(record + summary_codes_bytes(a.layout))[at.token]);
      float all = keeps_max(a.reduce) ? -INFINITY : 0.0f;
      for (int four = tile; four < min(tile + kTileRows, a.rows.rows); four += 4) {
        float x[4] = {};
#pragma unroll 8
        for (int j = 0; j < r; ++j) {
          const float k = label<Bits>(record, j * a.page_size + at.token);
          const float4 q = reinterpret_cast<const float4*>(queries)[(j * kTileRows + four - tile) / 4];
          x[0] = fmaf(k, q.x, x[0]), x[1] = fmaf(k, q.y, x[1]), x[2] = fmaf(k, q.z, x[2]), x[3] = fmaf(k, q.w, x[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (four + i >= a.rows.rows) break;
          if (a.sink.kept)
            a.sink.kept[(head * a.rows.rows + four + i) * a.sink.items + item] = x[i] * scale;
          else
            all = a.sink.combine(x[i] * scale, all);
        }
      }
      float* out = a.sink.out + head * a.sink.items + item;
      if (!a.sink.kept) *out = tile == 0 ? all : a.sink.combine(all, *out);
    }
  }
}

// A thread takes a page of a head: the best of its tokens for every row, kept for each or reduced over the rows.
__global__ __launch_bounds__(kReduceThreads) void best_of_pages_kernel(const float* tokens, ScoreSink sink, Items pages,
                                                                       uint32_t heads_each, int rows) {
  const uint32_t chunks = (pages.n + kReduceThreads - 1) / kReduceThreads, size = pages.item_tokens;
  const uint32_t head = blockIdx.x / chunks, page = blockIdx.x % chunks * kReduceThreads + threadIdx.x;
  if (page >= pages.n) return;
  const uint32_t b = head / heads_each;
  float y = -INFINITY;
  if (page < pages.count(b)) {
    const uint32_t size_here = min(size, static_cast<uint32_t>(pages.seq_lens[b]) - page * size);
    for (int r = 0; r < rows; ++r) {
      const int64_t row = static_cast<int64_t>(head) * rows + r;
      const float* of_page = tokens + (row * pages.n + page) * size;
      float best = -INFINITY;
      for (uint32_t i = 0; i < size_here; ++i) best = max_or_nan(of_page[i], best);
      if (sink.kept) sink.kept[row * pages.n + page] = best;
      y = r == 0 ? best : sink.combine(best, y);
    }
  }
  if (!sink.kept) sink.out[static_cast<int64_t>(head) * pages.n + page] = y;
}

ReduceLayout layout_of(const ScoreTokensParams& p) { return ReduceLayout(p, p.best_of_page ? p.n * p.page_size : 0); }

void score_keys(Args& a, unsigned blocks, const CudaExec& exec) {
  const char* op = a.best_of_page ? "score_pages: pool " : "score_tokens: pool ";
  a.transform_vector = aligned16(a.transform.centre) && aligned16(a.transform.balance);
  for (int i = 0; i < a.num_pools; ++i) {
    a.side[i] = pool_side(op + std::to_string(i), a.pools[i], Side::K, a.transform, a.page_size, a.D);
    if (a.side[i].rotated)  // of 16-bit queries two digits are as good as themselves
      a.parts_digits[a.side[i].parts - 1] = a.dtype == DType::f32 ? 3 : 2;
    else
      a.plain_digits = digits_of(a.dtype);
    a.some_f16 |= a.side[i].format == Format::f16;
  }
  const int D = static_cast<int>(a.D);
  const int64_t smem = QueryTile::bytes(a.plain_digits, plain_steps(D)) +
                       QueryTile::bytes(a.parts_digits[0] + a.parts_digits[1], D / 16);
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(blocks), dim3(kScoreThreads), static_cast<size_t>(smem), exec.stream, a);
  };
  if (D <= 64) return run(score_keys_kernel<64>);
  if (D <= 128) return run(score_keys_kernel<128>);
  run(score_keys_kernel<256>);
}

void score_labels(Args& a, unsigned blocks, const CudaExec& exec) {
  a.record_bytes = summary_bytes(a.layout);
  const auto smem = static_cast<size_t>(a.layout.channels) * kTileRows * sizeof(float);
  const auto run = [&](auto kernel) { launch(kernel, dim3(blocks), dim3(kScoreThreads), smem, exec.stream, a); };
  if (a.layout.bits == 16) return run(score_labels_kernel<16>);
  if (a.layout.bits == 8) return run(score_labels_kernel<8>);
  run(score_labels_kernel<4>);
}

}  // namespace

int64_t score_tokens_workspace(const ScoreTokensParams& p, const CudaExec&) { return layout_of(p).bytes; }

void score_tokens(const ScoreTokensParams& p, const CudaExec& exec) {
  const char* op = p.best_of_page ? "score_pages" : "score_tokens";
  const ReduceLayout layout = layout_of(p);
  float* kept_tokens = static_cast<float*>(p.workspace);
  float* kept_items = is_softmax(p.reduce) ? kept_tokens + layout.items_at / 4 : nullptr;
  const Items items = items_of(op, p, p.n, p.best_of_page ? p.page_size : 1);
  const ScoreSink sink{kept_items, p.out, items.n, p.reduce};

  Args a(p, sink, items);
  if (p.best_of_page) {
    a.tokens = items_of(op, p, p.n * p.page_size, 1);
    a.sink = {kept_tokens, nullptr, a.tokens.n, p.reduce};
  }
  a.heads = static_cast<uint32_t>(p.Hkv);
  // Queries are built once for several rounds, where that leaves enough blocks.
  const int64_t enough = int64_t{kBlocksPerSm} * device_attribute(cudaDevAttrMultiProcessorCount, exec.device);
  const int64_t all_rounds = (a.tokens.n + kBlockItems - 1) / kBlockItems;
  a.rounds = static_cast<uint32_t>(std::clamp<int64_t>(p.B * p.Hkv * all_rounds / enough, 1, kMaxRounds));
  a.chunks = static_cast<uint32_t>((all_rounds + a.rounds - 1) / a.rounds);
  const unsigned blocks = blocks_of(op, p.B * p.Hkv * a.chunks);
  p.records[0] ? score_labels(a, blocks, exec) : score_keys(a, blocks, exec);
  if (p.best_of_page) {
    const int64_t page_blocks = (p.n + kReduceThreads - 1) / kReduceThreads;
    launch(best_of_pages_kernel, dim3(blocks_of(op, p.B * p.Hkv * page_blocks)), dim3(kReduceThreads), 0, exec.stream,
           kept_tokens, sink, items, a.heads, a.rows.rows);
  }
  if (is_softmax(p.reduce)) reduce_softmax(op, p, sink, items, layout, p.workspace, exec);
}

}  // namespace kk::cuda
