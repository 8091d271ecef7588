// The gradient of the state, from the last chunk of a sequence to the first: serial, as the state itself. A block takes a
// value head of a sequence and 32 columns of V:
//
//   dN = P^T dO + k- dS'       dR = T^T dN       dS = diag(a_C) dS' + scale q^^T dO - e^^T dR
//
// dS [K][32] stays in shared memory. It and dR are left for what is parallel over the chunks (delta_gradients.cuh). The
// products with P and T take three terms for any input: their sums cancel where keys are alike (delta_scan.cu).
#pragma once
#include "cuda/delta_backward.cuh"

namespace kk::cuda {
namespace {

constexpr int kReversePanel = 32, kReversePanelLd = 40;  // right operand by rows

// Channels at a time. With a gate for each there are the gates besides, and threads for 32 channels.
template <bool PerChannel>
struct ReverseSlice {
  static constexpr int kChannels = PerChannel ? 32 : 64;
  static constexpr int kByRowsLd = kChannels + 4, kByColumnsLd = kChannels + 8;  // of left operands
};
constexpr int kSquareLd = 72;  // P and T: left operand by columns

struct ReverseLayout {  // in floats
  int d_out, d_rows, work, state, factors, totals, decay, total;
  KK_HD explicit ReverseLayout(int64_t K) {
    d_out = 0;
    d_rows = d_out + kBackwardChunk * kReversePanelLd;  // dN, then dR
    work = d_rows + kBackwardChunk * kReversePanelLd;   // P or T; k-; or q^ and e^
    state = work + 2 * kBackwardChunk * kSquareLd;
    factors = state + static_cast<int>((K + 63) / 64 * 64) * kReversePanelLd;
    totals = factors + kDeltaFactors * kBackwardChunk;
    decay = totals + kDeltaThreads;
    total = decay + kBackwardChunk;
  }
};

// Grid (sequences, value heads, panels).
template <Operands O, bool PerChannel>
__global__ __launch_bounds__(kDeltaThreads, 2) void delta_reverse_kernel(__grid_constant__ const BackwardArgs a) {
  using Slice = ReverseSlice<PerChannel>;
  constexpr int C = kBackwardChunk, N = Slice::kChannels / 32;
  KK_DYN_SMEM(float, smem);
  const DeltaInputs& p = a.p.in;
  const ReverseLayout l(p.K);
  float *d_out = smem + l.d_out, *d_rows = smem + l.d_rows, *work = smem + l.work, *state = smem + l.state;
  float *work_e = work + C * Slice::kByColumnsLd, *work_alpha = work_e + C * Slice::kByColumnsLd;
  float *factors = smem + l.factors, *decay = smem + l.decay;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), channels = (K + 63) / 64 * 64;
  const int64_t n = blockIdx.x, hv = blockIdx.y;
  const int v0 = static_cast<int>(blockIdx.z) * kReversePanel, width = min(kReversePanel, V - v0);
  const DeltaSequence own = sequence_of(p, n);
  const int warp = threadIdx.x / 32;
  // Of [64][32] a warp has 16 rows and 16 columns; of a slice of the state 16 rows and 8 N columns.
  const int row = 16 * (warp / 2), column = 16 * (warp % 2);
  constexpr int kWarpsAcross = 4 / N;
  const int state_row = 16 * (warp / kWarpsAcross), state_column = 8 * N * (warp % kWarpsAcross);

  const int64_t head_of_sequence = (n * p.HV + hv) * K * V;
  for (int i = threadIdx.x; i < channels * kReversePanel; i += kDeltaThreads) {
    const int channel = i / kReversePanel, c = i % kReversePanel;
    const bool exists = a.p.d_final && channel < K && c < width;
    state[channel * kReversePanelLd + c] =
        exists ? a.p.d_final[head_of_sequence + static_cast<int64_t>(channel) * V + v0 + c] : 0.0f;
  }
  const auto store_state = [&](float* to) {
    for (int i = threadIdx.x; i < K * kReversePanel; i += kDeltaThreads) {
      const int channel = i / kReversePanel, c = i % kReversePanel;
      if (c < width) to[static_cast<int64_t>(channel) * V + v0 + c] = state[channel * kReversePanelLd + c];
    }
  };
  const auto load_square = [&](const float* from) {
    for (int i = 4 * threadIdx.x; i < C * C; i += 4 * kDeltaThreads)
      *reinterpret_cast<float4*>(work + i / C * kSquareLd + i % C) = *reinterpret_cast<const float4*>(from + i);
  };

  const int64_t chunks = (own.end - own.begin + C - 1) / C, first_slot = delta_slots(p, n, own.begin, C).begun;
  for (int64_t j = chunks - 1; j >= 0; --j) {
    const int64_t slot = first_slot + j, first = own.begin + j * C;
    const DeltaChunk chunk{own.b, first, static_cast<int>(min(int64_t{C}, own.end - first))};
    const bool has_out = p.q.p && a.p.d_out.p;
    __syncthreads();
    store_state(a.w.dstates + a.state_at(slot, hv));
    for (int i = threadIdx.x; i < kDeltaFactors * C; i += kDeltaThreads) factors[i] = a.w.intra.factors(slot, hv)[i];
    load_d_out<O>(a.p.d_out, chunk, hv, v0, V, d_out, kReversePanelLd);
    if (has_out) load_square(a.w.intra.scores(slot, hv));
    __syncthreads();

    // P and T are lower triangles: the columns of their transposes before `row` are zeros.
    const Columns left{work + row * kSquareLd + row, kSquareLd};
    float x[1][2][4] = {};
    if (has_out)
      multiply_add<Operands::tf32x3>(x, left, Rows{d_out + row * kReversePanelLd + column, kReversePanelLd}, C - row);
    for (int c0 = 0; c0 < K; c0 += Slice::kChannels) {
      const ChunkSlice<Slice::kChannels> slice{p, chunk, factors, hv, c0};
      __syncthreads();
      if constexpr (PerChannel) {
        slice.template keys<Operands::fp32>(work, Slice::kByRowsLd, [](int) { return 1.0f; });
        slice.alphas(work_alpha, Slice::kByRowsLd);
        __syncthreads();
        const int c = threadIdx.x % 32, from = threadIdx.x / 32 * 8;
        float run = channel_decay(work_alpha + c, Slice::kByRowsLd, smem + l.totals).after;
#pragma unroll
        for (int r = 7; r >= 0; --r) {
          const int at = (from + r) * Slice::kByRowsLd + c;
          work[at] = operand<O>(work[at] * run);
          run *= work_alpha[at];
        }
      } else {
        slice.template keys<O>(work, Slice::kByRowsLd, [&](int i) { return slice.factor(kToEnd, i); });
      }
      __syncthreads();
      const float* s = state + c0 * kReversePanelLd + column;
      multiply_add<O>(
          x, Rows{work + row * Slice::kByRowsLd, Slice::kByRowsLd},
          [&](int i, int c) { return operand<O>(s[i * kReversePanelLd + c]); }, Slice::kChannels);
    }
    __syncthreads();
    load_square(a.w.intra.inverse(slot, hv));
    each(x, [&](int i, int c, float& y) {
      d_rows[(row + i) * kReversePanelLd + column + c] = y;
      y = 0.0f;
    });
    __syncthreads();
    multiply_add<Operands::tf32x3>(x, left, Rows{d_rows + row * kReversePanelLd + column, kReversePanelLd}, C - row);
    __syncthreads();
    float* dr = a.w.dr + a.rows_at(slot, hv);
    each(x, [&](int i, int c, float y) {
      i += row, c += column;
      d_rows[i * kReversePanelLd + c] = operand<O>(-y);
      if (i < chunk.rows && c < width) dr[static_cast<int64_t>(i) * V + v0 + c] = y;
    });

    for (int c0 = 0; c0 < K; c0 += Slice::kChannels) {
      const ChunkSlice<Slice::kChannels> slice{p, chunk, factors, hv, c0};
      __syncthreads();
      if constexpr (PerChannel) {
        slice.template queries<Operands::fp32>(work, Slice::kByColumnsLd, [&](int) { return p.scale; });
        slice.template erased<Operands::fp32>(work_e, Slice::kByColumnsLd, [](int) { return 1.0f; });
        slice.alphas(work_alpha, Slice::kByColumnsLd);
        __syncthreads();
        const int c = threadIdx.x % 32, from = threadIdx.x / 32 * 8;
        const ChannelDecay d = channel_decay(work_alpha + c, Slice::kByColumnsLd, smem + l.totals);
        if (threadIdx.x < 32) decay[c] = d.total;
        float run = d.before;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int at = (from + r) * Slice::kByColumnsLd + c;
          run *= work_alpha[at];
          work[at] = operand<O>(work[at] * run);
          work_e[at] = operand<O>(work_e[at] * run);
        }
      } else {
        slice.template queries<O>(work, Slice::kByColumnsLd,
                                  [&](int i) { return p.scale * slice.factor(kFromStart, i); });
        slice.template erased<O>(work_e, Slice::kByColumnsLd, [&](int i) { return slice.factor(kFromStart, i); });
      }
      __syncthreads();
      float* s = state + (c0 + state_row) * kReversePanelLd + state_column;
      float y[1][N][4];
      each(y, [&](int i, int c, float& z) {
        z = (PerChannel ? decay[state_row + i] : factors[kFromStart * C + C - 1]) * s[i * kReversePanelLd + c];
      });
      if (has_out)
        multiply_add<O>(y, Columns{work + state_row, Slice::kByColumnsLd}, Rows{d_out + state_column, kReversePanelLd},
                        C);
      multiply_add<O>(y, Columns{work_e + state_row, Slice::kByColumnsLd}, Rows{d_rows + state_column, kReversePanelLd},
                      C);
      each(y, [&](int i, int c, float z) { s[i * kReversePanelLd + c] = z; });
    }
  }
  __syncthreads();
  if (a.p.dinitial) store_state(a.p.dinitial + head_of_sequence);
}

}  // namespace
}  // namespace kk::cuda
