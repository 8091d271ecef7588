// Paged decode attention, fp16, split over the sequence, with cp.async in two stages; and the merge of its partial results.
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "selftest.h"

namespace selftest {
namespace {

constexpr int D = 64, G = 4, kTile = 32, kThreads = 128, kWarps = kThreads / 32;
constexpr float kNone = -1e30f;

struct Smem {
  __half k[2][kTile][D], v[2][kTile][D], q[G][D];
  float scores[G][kTile], alpha[G];
  float2 sums[kThreads];
};

template <Bug bug>
__device__ void load_tile(const DecodeParams& p, const uint16_t* cache, __half (*tile)[D], int b, int h, int t0,
                          int end) {
  for (int i = threadIdx.x; i < kTile * D / 8; i += kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8), t = t0 + row;
    const bool valid = bug == Bug::past_page_table ? t <= end : t < end;
    const int at = valid ? t : 0, page = p.table[b * p.max_pages + at / p.page_size];
    const uint16_t* src =
        cache + (static_cast<size_t>(page * p.page_size + at % p.page_size) * p.kv_heads + h) * D + chunk * 8;
    kk::ptx::cp_async<16>(kk::ptx::smem_u32(&tile[row][chunk * 8]), src, valid);
  }
}

template <Bug bug>
__global__ void __launch_bounds__(kThreads) decode_kernel(const DecodeParams p) {
  KK_DYN_SMEM(Smem, smem);
  const int split = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int len = p.lens[b], heads = p.kv_heads * G, head = h * G + warp;
  const int per_split = ((len + p.splits - 1) / p.splits + kTile - 1) / kTile * kTile;
  const int begin = split * per_split, end = min(begin + per_split, len);
  const int tiles = begin < end ? (end - begin + kTile - 1) / kTile : 0;

  for (int i = tid; i < G * D; i += kThreads)
    (&smem->q[0][0])[i] = __ushort_as_half(p.q[(static_cast<size_t>(b) * heads + h * G) * D + i]);
  // In the second half of a tile's work a thread owns two channels, and every fourth token.
  const int pair = tid % (D / 2), group = tid / (D / 2);
  float2 acc[G] = {};
  float m = kNone, l = 0;

  if (tiles) {
    load_tile<bug>(p, p.k, smem->k[0], b, h, begin, end);
    load_tile<bug>(p, p.v, smem->v[0], b, h, begin, end);
  }
  kk::ptx::cp_async_commit();
  for (int i = 0; i < tiles; ++i) {
    const int stage = i & 1, t0 = begin + i * kTile;
    if (i + 1 < tiles) {
      load_tile<bug>(p, p.k, smem->k[stage ^ 1], b, h, t0 + kTile, end);
      load_tile<bug>(p, p.v, smem->v[stage ^ 1], b, h, t0 + kTile, end);
    }
    kk::ptx::cp_async_commit();
    if (bug != Bug::no_wait_for_first_tile || i > 0) kk::ptx::cp_async_wait<1>();
    if (bug != Bug::no_barrier_after_wait) __syncthreads();

    // Scores: 8 lanes per token.
    for (int pass = 0; pass < kTile / (4 * kWarps); ++pass) {
      const int row = (pass * kWarps + warp) * 4 + lane / 8, sub = lane % 8;
      const uint4 k8 = *reinterpret_cast<const uint4*>(&smem->k[stage][row][sub * 8]);
      const __half2* k2 = reinterpret_cast<const __half2*>(&k8);
      for (int g = 0; g < G; ++g) {
        float s = 0;
        for (int e = 0; e < 4; ++e) {
          const float2 x = __half22float2(k2[e]);
          const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&smem->q[g][sub * 8 + 2 * e]));
          s += x.x * y.x + x.y * y.y;
        }
        for (int o = 4; o > (bug == Bug::short_shuffle ? 1 : 0); o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
        if (sub == 0) smem->scores[g][row] = t0 + row < end ? s * 0.125f * 1.44269504f : kNone;
      }
    }
    __syncthreads();

    // Softmax so far: a warp per head.
    const float s = smem->scores[warp][lane];
    float highest = s;
    for (int o = 16; o > 0; o /= 2) {
      const unsigned mask = bug == Bug::half_mask ? 0x0000ffffu : 0xffffffffu;
      highest = fmaxf(highest, __shfl_xor_sync(mask, highest, o));
    }
    const float m_new = fmaxf(m, highest), alpha = kk::ptx::ex2(m - m_new), weight = kk::ptx::ex2(s - m_new);
    float total = weight;
    for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(0xffffffffu, total, o);
    l = l * alpha + total;
    m = m_new;
    smem->scores[warp][lane] = weight;
    if (lane == 0) smem->alpha[warp] = alpha;
    if (bug != Bug::divergent_barrier || warp < 3) __syncthreads();

    for (int g = 0; g < G; ++g) acc[g] = make_float2(acc[g].x * smem->alpha[g], acc[g].y * smem->alpha[g]);
    for (int row = group; row < kTile; row += kThreads / (D / 2)) {
      const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&smem->v[stage][row][pair * 2]));
      for (int g = 0; g < G; ++g) {
        acc[g].x += smem->scores[g][row] * v.x;
        acc[g].y += smem->scores[g][row] * v.y;
      }
    }
    if (bug != Bug::no_barrier_before_reuse) __syncthreads();
  }

  if (lane == 0)
    reinterpret_cast<float2*>(p.partial_ml)[(static_cast<size_t>(b) * heads + head) * p.splits + split] =
        make_float2(m, l);
  for (int g = 0; g < G; ++g) {
    smem->sums[tid] = acc[g];
    __syncthreads();
    if (group == 0) {
      float2 o = acc[g];
      for (int k = 1; k < kThreads / (D / 2); ++k) {
        o.x += smem->sums[k * (D / 2) + pair].x;
        o.y += smem->sums[k * (D / 2) + pair].y;
      }
      float* dst = p.partial_out + ((static_cast<size_t>(b) * heads + h * G + g) * p.splits + split) * D + pair * 2;
      if (bug == Bug::wide_store)
        *reinterpret_cast<float4*>(dst) = make_float4(o.x, o.y, 0, 0);
      else
        *reinterpret_cast<float2*>(dst) = o;
    }
    __syncthreads();
  }
}

__global__ void merge_kernel(const DecodeParams p) {
  KK_SHARED(float, weights, [32]);
  KK_SHARED(float, inverse, [1]);
  const int head = blockIdx.x, d = threadIdx.x;
  const size_t first = static_cast<size_t>(head) * p.splits;
  if (d < 32) {
    const float2 ml = d < p.splits ? reinterpret_cast<const float2*>(p.partial_ml)[first + d] : make_float2(kNone, 0);
    float m = ml.x;
    for (int o = 16; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    const float w = ml.y > 0 ? kk::ptx::ex2(ml.x - m) : 0;
    float total = w * ml.y;
    for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(0xffffffffu, total, o);
    weights[d] = w;
    if (d == 0) inverse[0] = total > 0 ? 1 / total : 0;
  }
  __syncthreads();
  float o = 0;
  for (int s = 0; s < p.splits; ++s)
    if (weights[s] > 0) o += weights[s] * p.partial_out[(first + s) * D + d];
  p.out[static_cast<size_t>(head) * D + d] = __half_as_ushort(__float2half_rn(o * inverse[0]));
}

}  // namespace

void decode(const DecodeParams& p, Bug bug) {
  plant<Bug::none, Bug::no_barrier_after_wait, Bug::short_shuffle, Bug::no_wait_for_first_tile, Bug::past_page_table,
        Bug::no_barrier_before_reuse, Bug::wide_store, Bug::half_mask, Bug::divergent_barrier>(bug, [&](auto planted) {
    kk::cuda::launch(decode_kernel<planted.bug>, dim3(p.splits, p.kv_heads, p.batch), kThreads, sizeof(Smem), nullptr,
                     p);
  });
  kk::cuda::launch(merge_kernel, p.batch * p.kv_heads * G, D, 0, nullptr, p);
}

}  // namespace selftest
