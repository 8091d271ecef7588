// The gradient of the state, from the last chunk of a sequence to the first: serial, as the state itself. A block takes a
// value head of a sequence and 32 columns of V:
//
//   dN = P^T dO + k- dS'       dR = T^T dN       dS = diag(a_C) dS' + scale q^^T dO - e^^T dR
//
// dS [K][32] stays in shared memory. It and dR are left for what is parallel over the chunks (delta_gradients.cuh).
#pragma once
#include "cuda/delta_backward.cuh"

namespace kk::cuda {
namespace {

constexpr int kReversePanel = 32, kReversePanelLd = 40;  // right operand by rows
constexpr int kReverseSlice = 64;                        // channels at a time
constexpr int kByRowsLd = 68, kByColumnsLd = 72;         // of left operands

struct ReverseLayout {  // in floats
  int d_out, d_rows, slices, state, factors, totals, decay, total;
  KK_HD explicit ReverseLayout(int64_t K) {
    d_out = 0;
    d_rows = d_out + kBackwardChunk * kReversePanelLd;   // dN, then dR
    slices = d_rows + kBackwardChunk * kReversePanelLd;  // P or T or k-; or q^ and e^
    state = slices + 2 * kBackwardChunk * kByColumnsLd;
    factors = state + static_cast<int>((K + 63) / 64 * 64) * kReversePanelLd;
    totals = factors + kDeltaFactors * kBackwardChunk;
    decay = totals + 4 * kReverseSlice;
    total = decay + kReverseSlice;
  }
};

// Grid (sequences, value heads, panels).
template <Operands O>
__global__ __launch_bounds__(kDeltaThreads, 1) void delta_reverse_kernel(__grid_constant__ const BackwardArgs a) {
  KK_DYN_SMEM(float, smem);
  const DeltaInputs& p = a.p.in;
  const ReverseLayout l(p.K);
  float *d_out = smem + l.d_out, *d_rows = smem + l.d_rows, *slice = smem + l.slices, *state = smem + l.state;
  float *second_slice = slice + kBackwardChunk * kByColumnsLd, *factors = smem + l.factors, *decay = smem + l.decay;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), channels = (K + 63) / 64 * 64;
  const int64_t n = blockIdx.x, hv = blockIdx.y;
  const int v0 = static_cast<int>(blockIdx.z) * kReversePanel, width = min(kReversePanel, V - v0);
  const DeltaSequence own = sequence_of(p, n);
  // Of [64][32] each warp has 16 rows and 16 columns.
  const int warp = threadIdx.x / 32, row = 16 * (warp / 2), column = 16 * (warp % 2);

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

  const int64_t chunks = (own.end - own.begin + kBackwardChunk - 1) / kBackwardChunk;
  const int64_t first_slot = delta_slots(p, n, own.begin, kBackwardChunk).begun;
  for (int64_t j = chunks - 1; j >= 0; --j) {
    const int64_t slot = first_slot + j, first = own.begin + j * kBackwardChunk;
    const DeltaChunk chunk{own.b, first, static_cast<int>(min(int64_t{kBackwardChunk}, own.end - first))};
    __syncthreads();
    store_state(a.w.dstates + a.state_at(slot, hv));
    for (int i = threadIdx.x; i < kDeltaFactors * kBackwardChunk; i += kDeltaThreads)
      factors[i] = a.w.intra.factors(slot, hv)[i];
    const auto load_square = [&](const float* from) {
      for (int i = threadIdx.x; i < kBackwardChunk * kBackwardChunk; i += kDeltaThreads)
        slice[i / kBackwardChunk * kByColumnsLd + i % kBackwardChunk] = from[i];
    };
    const bool has_out = p.q.p && a.p.d_out.p;
    load_d_out<O>(a.p.d_out, chunk, hv, v0, V, d_out, kReversePanelLd);
    if (has_out) load_square(a.w.intra.scores(slot, hv));
    __syncthreads();

    // Both triangles are lower ones: of their transposes columns from `row` on are not zero.
    float x[1][2][4] = {};
    if (has_out)
      multiply_add<Operands::tf32x3>(x, Columns{slice + row * kByColumnsLd + row, kByColumnsLd},
                                     Rows{d_out + row * kReversePanelLd + column, kReversePanelLd},
                                     kBackwardChunk - row);
    const auto channel_rows = [&](int c0) {
      return ChannelRows{
          p, chunk, factors, hv, c0 + static_cast<int>(threadIdx.x) % 64, static_cast<int>(threadIdx.x) / 64 * 16};
    };
    for (int c0 = 0; c0 < K; c0 += kReverseSlice) {
      const ChannelRows rows = channel_rows(c0);
      __syncthreads();
      float run = channel_decay(rows, smem + l.totals).after;
#pragma unroll
      for (int r = 15; r >= 0; --r) {
        slice[(rows.first_row + r) * kByRowsLd + rows.channel - c0] = operand<O>(rows.k(r) * run);
        run *= rows.alpha(r);
      }
      __syncthreads();
      const float* s = state + c0 * kReversePanelLd + column;
      multiply_add<O>(
          x, Rows{slice + row * kByRowsLd, kByRowsLd},
          [&](int i, int c) { return operand<O>(s[i * kReversePanelLd + c]); }, kReverseSlice);
    }
    __syncthreads();
    load_square(a.w.intra.inverse(slot, hv));
    each(x, [&](int i, int c, float& y) {
      d_rows[(row + i) * kReversePanelLd + column + c] = y;
      y = 0.0f;
    });
    __syncthreads();
    multiply_add<Operands::tf32x3>(x, Columns{slice + row * kByColumnsLd + row, kByColumnsLd},
                                   Rows{d_rows + row * kReversePanelLd + column, kReversePanelLd},
                                   kBackwardChunk - row);
    __syncthreads();
    float* dr = a.w.dr + a.rows_at(slot, hv);
    each(x, [&](int i, int c, float y) {
      i += row, c += column;
      d_rows[i * kReversePanelLd + c] = operand<O>(y);
      if (i < chunk.rows && c < width) dr[static_cast<int64_t>(i) * V + v0 + c] = y;
    });

    for (int c0 = 0; c0 < K; c0 += kReverseSlice) {
      const ChannelRows rows = channel_rows(c0);
      __syncthreads();
      const ChannelDecay d = channel_decay(rows, smem + l.totals);
      if (threadIdx.x < kReverseSlice) decay[threadIdx.x] = d.total;
      float run = d.before;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        const int at = (rows.first_row + r) * kByColumnsLd + rows.channel - c0;
        run *= rows.alpha(r);
        slice[at] = operand<O>(p.scale * rows.q(r) * run);
        second_slice[at] = operand<O>(-rows.factor(kBeta, r) * rows.erase(r) * rows.k(r) * run);
      }
      __syncthreads();
      float* s = state + (c0 + row) * kReversePanelLd + column;
      each(x, [&](int i, int c, float& y) { y = decay[row + i] * s[i * kReversePanelLd + c]; });
      if (has_out)
        multiply_add<O>(x, Columns{slice + row, kByColumnsLd}, Rows{d_out + column, kReversePanelLd}, kBackwardChunk);
      multiply_add<O>(x, Columns{second_slice + row, kByColumnsLd}, Rows{d_rows + column, kReversePanelLd},
                      kBackwardChunk);
      each(x, [&](int i, int c, float y) { s[i * kReversePanelLd + c] = y; });
    }
  }
  __syncthreads();
  if (a.p.dinitial) store_state(a.p.dinitial + head_of_sequence);
}

}  // namespace
}  // namespace kk::cuda
