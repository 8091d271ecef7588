// q of a segment's rows, scaled and rotated, as the B operands of the products with K, of every kind that the pools
// need.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/codes.cuh"
#include "kvkernels/core/fwht.h"

namespace kk::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// Where channel i of an octet of channels stands among the operands of codes: the c-th quarter of every `Run` channels
// is lane c's, and unpack() gives it channels 8 apart, or 4 where it has but 8.
struct CodePlace {
  int step, reg, c, high;
};
template <int Run>
__device__ __forceinline__ CodePlace code_place(int octet, int i) {
  constexpr int octets = Run / 8, quarter = octets / 4;
  const int run = octet / octets, in_run = octet % octets, first_step = run * (Run / 16);
  if constexpr (quarter == 1) return {first_step + i % 4 / 2, i % 2, in_run, i / 4};
  return {first_step + 4 * (in_run % quarter / 2) + i / 2, i % 2, in_run / quarter, octet % 2};
}

__device__ __forceinline__ float load_number(DType type, const uint16_t* x) {
  return type == DType::f16 ? __half2float(__ushort_as_half(*x)) : bits_float(static_cast<uint32_t>(*x) << 16);
}

// Writes the operands to `smem`, and what the rows have of their own.
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
    float x[T::kOctets][8] = {}, rotated[8], halves[8], q_mu = 0.0f, top = 0.0f;
    const auto* q = static_cast<const uint16_t*>(p.q) + b * p.q_batch + t * p.q_token + head * p.q_head;
#pragma unroll
    for (int o = 0; o < T::kOctets; ++o) {
      const int channel = (lane + o * T::kRowLanes) * kPerLane;
      if (valid && channel < D) load8(p.dtype, q + channel, p.layout.q_vector, x[o]);
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[o][i]));
    }
    const bool rotate = Packed && p.layout.queries[kQueriesRotated] >= 0;
    const bool rotate_halves = Packed && p.layout.queries[kQueriesHalves] >= 0;
    if (rotate || rotate_halves) {
      const int64_t of_head = int64_t(seg.k_head) * D, at = of_head + lane * kPerLane;
      const auto rotate_runs = [&](float (&y)[8], int n) {
        hadamard(y, n);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          y[i] *= fwht_scale(n);
          top = fmaxf(top, fabsf(y[i]));
        }
      };
      const KeyTransform& k = p.transform;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (k.centre) q_mu += x[0][i] * k.centre[at + i];
        rotated[i] = k.balance ? x[0][i] / k.balance[at + i] : x[0][i];
        halves[i] = rotated[i];
      }
      if (rotate) rotate_runs(rotated, D);
      if (rotate_halves) {
#pragma unroll
        for (int i = 0; i < 8 && k.order; ++i) {
          const int channel = k.order[at + i];
          halves[i] = valid ? load_number(p.dtype, q + channel) : 0.0f;
          if (k.balance) halves[i] /= k.balance[of_head + channel];
        }
        rotate_runs(halves, T::kHalf);
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
        const auto store = [&](Queries kind, CodePlace at, float y) {
          reinterpret_cast<__half*>(word(kind, at.step, at.reg, at.c))[at.high] = __float2half_rn(y);
        };
        const auto store_two = [&](Queries kind, Queries rest, CodePlace at, float y) {
          store(kind, at, y);
          if (p.layout.queries[rest] >= 0) store(rest, at, y - __half2float(__float2half_rn(y)));
        };
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const CodePlace at = code_place<T::kGroup>(octet, i);
          if (rotate) store_two(kQueriesRotated, kQueriesRotatedRest, at, rotated[i] * up);
          if (rotate_halves)
            store_two(kQueriesHalves, kQueriesHalvesRest, code_place<T::kHalf>(octet, i), halves[i] * up);
          if (p.layout.queries[kQueriesPlain] >= 0) store(kQueriesPlain, at, x[o][i]);
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
