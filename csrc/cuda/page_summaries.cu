// A warp makes the records of a run for 32 / L KV heads: L lanes go through the tokens in their order, 8 channels a lane.
// The heads of a warp read the same pages, hence one format: the transforms of decode() need whole warps. A key is read
// once, a record written once.
#include "kvkernels/ops/page_summaries.h"

#include <algorithm>

#include "cuda/codec.cuh"

namespace kk::cuda {
namespace {

constexpr int kWarps = kCodecThreads / 32;
constexpr int kBlocksPerSm = 8;

struct Args {
  PoolSide side[kMaxPools];
  uint8_t* records[kMaxPools];
  SummaryLayout layout;
  int64_t record_bytes;
  const int32_t *page_table, *seq_lens, *start, *channels, *offsets;
  int64_t max_pages, table_stride, page_size, num_segments, offsets_stride;
  int heads, parts;  // parts: blocks of a sequence
};

// Tokens [begin, end) of sequence b.
struct Run {
  int64_t begin, end;
};

__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// The largest magnitude of a row; NaN if one is NaN.
template <int L>
__device__ __forceinline__ float largest(const float (&x)[8]) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max_or_nan(fabsf(x[i]), most);
  return fold_lanes(most, L, max_or_nan);
}

// f(x) for the keys of the run, one token after the other; by a warp. Several are read at once: a sequence that grows has
// one page to summarise, and waits for its loads.
template <int L, int kBatch, typename F>
__device__ __forceinline__ void each_key(const Args& a, int64_t b, int head, const Run& run, F&& f) {
  const bool active = head < a.heads;
  const int32_t* table = a.page_table + b * a.table_stride;
  Slot at = locate(run.begin, a.page_size);
  for (int64_t left = run.end - run.begin; left > 0; ++at.page, at.token = 0) {
    const int32_t entry = table[at.page];
    const PoolSide& side = a.side[entry >> 28];
    const int64_t end = min(a.page_size, at.token + left);
    left -= end - at.token;
    for (int64_t token = at.token; token < end; token += kBatch) {
      float x[kBatch][8];
      switch_format(side.format, [&](auto fmt) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          load_stored<decltype(fmt), L>(side, active && token + i < end, entry & kPageMask, active ? head : 0,
                                        token + i, x[i]);
      });
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= end) break;
        if (side.rotated) unrotate<L>(side, active ? head : 0, x[i]);
        f(x[i]);
      }
    }
  }
}

template <int L>
__device__ __forceinline__ void store_codes(const float (&x)[8], float scale, Rounding rounding, uint8_t* out) {
  uint32_t w[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    w[i / 4] |= static_cast<uint32_t>(summary_code8(x[i], scale, rounding) & 255) << (8 * (i % 4));
  *reinterpret_cast<uint2*>(out) = make_uint2(w[0], w[1]);
}

// f of 8 numbers to bf16.
template <typename F>
__device__ __forceinline__ void store_bf16(const float (&x)[8], F&& f, uint8_t* out) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = f(x[2 * i]) | static_cast<uint32_t>(f(x[2 * i + 1])) << 16;
  *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
}

template <int L>
__device__ __forceinline__ void summarise_minmax(const Args& a, int64_t b, int head, const Run& run, uint8_t* record) {
  const int lane = threadIdx.x % L, c = lane * kPerLane;
  float hi[8], lo[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) hi[i] = -INFINITY, lo[i] = INFINITY;
  each_key<L, 4>(a, b, head, run, [&](const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      hi[i] = max_or_nan(x[i], hi[i]);
      lo[i] = x[i] < lo[i] || x[i] != x[i] ? x[i] : lo[i];
    }
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) hi[i] += 0.0f, lo[i] += 0.0f;  // no -0: which zero is the larger depends on the order
  const int64_t D = a.layout.head_dim;
  const bool writes = head < a.heads && c < D;
  if (a.layout.bits == 16) {
    if (!writes) return;
    store_bf16(hi, bf16_up, record + 2 * c);
    store_bf16(lo, bf16_down, record + 2 * (D + c));
    return;
  }
  const uint16_t hi_scale = summary_scale(largest<L>(hi), 127.0f), lo_scale = summary_scale(largest<L>(lo), 127.0f);
  if (!writes) return;
  store_codes<L>(hi, bf16_to_float(hi_scale), Rounding::up, record + c);
  store_codes<L>(lo, bf16_to_float(lo_scale), Rounding::down, record + D + c);
  if (lane == 0) *reinterpret_cast<uint32_t*>(record + 2 * D) = hi_scale | static_cast<uint32_t>(lo_scale) << 16;
}

template <int L>
__device__ __forceinline__ void summarise_mean(const Args& a, int64_t b, int head, const Run& run, uint8_t* record) {
  const int lane = threadIdx.x % L, c = lane * kPerLane;
  float sum[8] = {};
  each_key<L, 4>(a, b, head, run, [&](const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += x[i];
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = sum[i] / static_cast<float>(run.end - run.begin);
  const bool writes = head < a.heads && c < a.layout.head_dim;
  if (a.layout.bits == 16) {
    if (writes) store_bf16(sum, float_to_bf16, record + 2 * c);
    return;
  }
  const uint16_t scale = summary_scale(largest<L>(sum), 127.0f);
  if (!writes) return;
  store_codes<L>(sum, bf16_to_float(scale), Rounding::nearest, record + c);
  if (lane == 0) *reinterpret_cast<uint16_t*>(record + a.layout.head_dim) = scale;
}

// Two tokens at a time, since two 4-bit codes are a byte; keys [2][D] of this row stand in shared memory.
template <int L>
__device__ __forceinline__ void summarise_channels(const Args& a, int64_t b, int head, const Run& run, uint8_t* record,
                                                   float* keys) {
  constexpr int D = kPerLane * L;
  const SummaryLayout& s = a.layout;
  const int lane = threadIdx.x % L, bits = s.bits;
  const bool writes = head < a.heads;
  const int32_t* channels = a.channels + (writes ? head : 0) * s.channels;
  uint16_t* scales = reinterpret_cast<uint16_t*>(record + summary_codes_bytes(s));
  const auto make_pair = [&](int64_t token) {  // the even one
    __syncwarp();
    uint16_t scale[2] = {};
    if (bits != 16) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float most = 0.0f;
        for (int64_t j = lane; j < s.channels; j += L) most = max_or_nan(fabsf(keys[t * D + channels[j]]), most);
        scale[t] = summary_scale(fold_lanes(most, L, max_or_nan), bits == 8 ? 127.0f : 7.5f);
      }
    }
    const bool both = token + 1 < a.page_size;
    for (int64_t j = lane; j < s.channels && writes; j += L) {
      const float x = keys[channels[j]], y = keys[D + channels[j]];
      const int64_t at = j * a.page_size + token;
      const auto code8 = [](float v, uint16_t by) {
        return static_cast<uint8_t>(summary_code8(v, bf16_to_float(by), Rounding::nearest));
      };
      if (bits == 16) {
        reinterpret_cast<uint16_t*>(record)[at] = float_to_bf16(x);
        if (both) reinterpret_cast<uint16_t*>(record)[at + 1] = float_to_bf16(y);
      } else if (bits == 8) {
        record[at] = code8(x, scale[0]);
        record[at + 1] = code8(y, scale[1]);
      } else {
        record[at / 2] = static_cast<uint8_t>(summary_code4(x, bf16_to_float(scale[0])) |
                                              summary_code4(y, bf16_to_float(scale[1])) << 4);
      }
    }
    if (bits != 16 && writes && lane == 0) scales[token] = scale[0], scales[token + 1] = scale[1];
    __syncwarp();
  };
  int64_t token = 0;
  const auto put = [&](const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) keys[token % 2 * D + lane * kPerLane + i] = x[i];
    if (token % 2 == 1) make_pair(token - 1);
    ++token;
  };
  each_key<L, 2>(a, b, head, run, put);
  const float zeros[8] = {};
  while (token < a.page_size || token % 2 == 1) put(zeros);
}

template <int L, SummaryKind Kind>
__global__ __launch_bounds__(kCodecThreads, 2) void page_summaries_kernel(__grid_constant__ const Args a) {
  constexpr int kHeads = 32 / L;  // of a warp
  const int64_t b = blockIdx.x / a.parts;
  const int head_blocks = (a.heads + kHeads - 1) / kHeads;
  const int64_t room = a.max_pages * a.page_size, len = min(max(int64_t(a.seq_lens[b]), int64_t(0)), room);
  const int64_t start = a.start ? a.start[b] : 0;
  const int64_t first = a.offsets ? 0 : start / a.page_size;
  const int64_t last = a.offsets ? a.num_segments : (len + a.page_size - 1) / a.page_size;
  const int64_t warps = static_cast<int64_t>(a.parts) * kWarps;
  for (int64_t i = blockIdx.x % a.parts * kWarps + threadIdx.x / 32; i < (last - first) * head_blocks; i += warps) {
    const int64_t r = first + i / head_blocks;
    const int head = static_cast<int>(i % head_blocks) * kHeads + threadIdx.x % 32 / L;
    Run run{r * a.page_size, min((r + 1) * a.page_size, len)};
    if (a.offsets) {
      const int32_t* offset = a.offsets + b * a.offsets_stride + r;
      run = {offset[0], offset[1]};
    }
    if (run.end <= max(run.begin, start) || run.end > len) continue;
    const int32_t entry =
        a.offsets ? static_cast<int32_t>(b * a.num_segments + r) : a.page_table[b * a.table_stride + r];
    const int64_t page = a.offsets ? b * a.num_segments + r : entry & kPageMask;
    uint8_t* record = a.records[a.offsets ? 0 : entry >> 28] + (page * a.heads + head) * a.record_bytes;
    if constexpr (Kind == SummaryKind::minmax) {
      summarise_minmax<L>(a, b, head, run, record);
    } else if constexpr (Kind == SummaryKind::mean) {
      summarise_mean<L>(a, b, head, run, record);
    } else {
      KK_SHARED(float, keys, [kCodecThreads / L][2 * kPerLane * L]);
      summarise_channels<L>(a, b, head, run, record, keys[threadIdx.x / L]);
    }
  }
}

}  // namespace

void page_summaries(const PageSummariesParams& p, const CudaExec& exec) {
  Args a{};
  for (int i = 0; i < p.num_pools; ++i) {
    a.side[i] =
        pool_side("page_summaries: pool " + std::to_string(i), p.pools[i], Side::K, p.transform, p.page_size, p.D);
    a.records[i] = p.records[i];
  }
  a.layout = p.layout;
  a.record_bytes = summary_bytes(p.layout);
  a.page_table = p.page_table, a.seq_lens = p.seq_lens, a.start = p.start, a.channels = p.channels;
  a.offsets = p.offsets;
  a.max_pages = p.max_pages, a.table_stride = p.table_stride, a.page_size = p.page_size;
  a.num_segments = p.num_segments, a.offsets_stride = p.offsets_stride;
  a.heads = static_cast<int>(p.Hkv);
  // Blocks for all runs, up to what fills the device: of a sequence that grows by a few tokens, few have something to do.
  const int64_t runs = (p.offsets ? p.num_segments : p.max_pages) * p.Hkv;
  const int64_t fill = int64_t{kBlocksPerSm} * device_attribute(cudaDevAttrMultiProcessorCount, exec.device);
  const int64_t parts = std::min((runs + kWarps - 1) / kWarps, (fill + p.B - 1) / p.B);
  if (p.B == 0 || parts == 0) return;
  if (p.B * parts >> 31) fail("page_summaries: too many sequences for one launch on CUDA");
  a.parts = static_cast<int>(parts);
  with_row_lanes(p.D, [&](auto L) {
    const auto run = [&](auto kernel) {
      launch(kernel, dim3(static_cast<unsigned>(p.B * parts)), dim3(kCodecThreads), 0, exec.stream, a);
    };
    if (p.layout.kind == SummaryKind::minmax) return run(page_summaries_kernel<L.value, SummaryKind::minmax>);
    if (p.layout.kind == SummaryKind::mean) return run(page_summaries_kernel<L.value, SummaryKind::mean>);
    run(page_summaries_kernel<L.value, SummaryKind::channels>);
  });
}

}  // namespace kk::cuda
