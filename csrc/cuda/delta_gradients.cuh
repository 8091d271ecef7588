// What is parallel over the chunks of the backward pass: a block takes a chunk and a key head, and its value heads in
// order, so that sums over them need no atomics.
//
//   dP = scale tril(dO N^T)  dL = -tril_-1(dR N^T)            [C][C]
//   de^ = -dR S^T      dq^ = scale dO S^T      dk- = N dS'^T   [C][64 channels], with a gate for each channel 32
//   de_i = a_i o de^_i + sum_j dL_ij k_j o D_ij
//   dq_i = a_i o dq^_i + sum_j dP_ij k_j o D_ij
//   dk_j = D_Cj o dk-_j + sum_i (dL_ij e_i + dP_ij q_i) o D_ij
//
// dg_t is the sum, over every decay with alpha_t in it, of its gradient times it: pairs i >= t > j, rows i >= t from the
// start of the chunk, rows j < t to its end, and the state through all of it.
// By count a lane reads 3 words of shared memory for a matrix instruction (4 with gates of channels), and a pair of rows
// takes 8 instructions for each channel that has its own gate.
#pragma once
#include "cuda/delta_backward.cuh"
#include "cuda/delta_channel_pairs.cuh"

namespace kk::cuda {
namespace {

constexpr int kPairsLd = 68;
constexpr int kPanelColumns = 32, kPanelColumnsLd = 36;  // of V: left operand by rows, right one by columns

template <bool PerChannel>
struct GradientsSlice {
  static constexpr int kChannels = PerChannel ? 32 : 64;
  static constexpr int kLd = PerChannel ? 36 : 72;  // per head: right operand by rows
};

enum GradientsRows {  // [64] each
  kSquares,           // kaczmarz: sum of k^2 + eps
  kKeyFactor,         // kaczmarz: what k is multiplied by in dk, for all value heads
  kBetaSum,           // of either half of the channels, where warps share rows; so too
  kFromStartSum = kBetaSum + 2,
  kToEndSum = kFromStartSum + 2,
  kPairSum = kToEndSum + 2,
  kGradientsRows
};

struct GradientsLayout {  // in floats
  int d_keys, d_queries, work, factors, totals, from_start, to_end, pair_totals, state_sums, rows, total;
  KK_HD GradientsLayout() {
    const int C = kBackwardChunk;
    d_keys = 0, d_queries = d_keys + C * kPairsLd;  // dL and dP
    work = d_queries + C * kPairsLd;                // columns of V, then channels: 3 of [64][72] or 6 of [64][36]
    factors = work + 3 * C * 72;
    totals = factors + kDeltaFactors * C;  // [8 blocks of rows][32] each: products of gates,
    from_start = totals + kDeltaThreads;   // sums over rows
    to_end = from_start + kDeltaThreads;
    pair_totals = to_end + kDeltaThreads;  // [28 pairs of blocks][32]
    state_sums = pair_totals + 28 * 32;    // S o dS' [64]
    rows = state_sums + C;
    total = rows + kGradientsRows * C;
  }
};

// f(half, row, column, x) for what a lane holds of 16 rows: `half` 0 has row lane / 4, 1 the one 8 rows on.
template <int N, typename F>
__device__ __forceinline__ void each_half(float (&c)[1][N][4], F f) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(i / 2, g + 8 * (i / 2), 8 * n + 2 * t + i % 2, c[0][n][i]);
}

template <Operands O, bool PerChannel>
struct Gradients {
  static constexpr int C = kBackwardChunk, kSlice = GradientsSlice<PerChannel>::kChannels,
                       kLd = GradientsSlice<PerChannel>::kLd, kTiles = kSlice / 16;  // tiles of 8 channels of a warp
  using Products = float[1][kTiles][4];

  const BackwardArgs& a;
  const DeltaChunk& chunk;
  float* smem;
  GradientsLayout l = {};
  const int slot = blockIdx.x, h = blockIdx.y;

  const DeltaInputs& p = a.p.in;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const int group = static_cast<int>(p.HV / p.H);
  const bool has_out = p.q.p && a.p.d_out.p;
  float *d_keys = smem + l.d_keys, *d_queries = smem + l.d_queries, *work = smem + l.work, *factors = smem + l.factors;
  float* rows = smem + l.rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = 16 * (warp / 2), column = kSlice / 2 * (warp % 2);  // a warp's of [64][kSlice]

  __device__ __forceinline__ float factor(DeltaFactor f, int i) const { return factors[f * C + i]; }
  __device__ __forceinline__ int64_t token(int i) const { return chunk.b * p.T + chunk.first + i; }
  __device__ __forceinline__ int64_t head(int hv, int i) const { return token(i) * p.HV + hv; }

  // Columns of V: dO, dR and N, then those of S and dS'.
  float *d_out = work, *dr = d_out + C * kPanelColumnsLd, *n = dr + C * kPanelColumnsLd;
  float *state = n + C * kPanelColumnsLd, *d_state = state + kSlice * kPanelColumnsLd;
  __device__ __forceinline__ void load_rows(int hv, int v0) const {
    load_d_out<O>(a.p.d_out, chunk, hv, v0, V, d_out, kPanelColumnsLd);
    load_columns<O>(a.w.dr + a.rows_at(slot, hv), chunk.rows, v0, V, dr, kPanelColumnsLd);
    load_columns<O>(a.w.n + a.rows_at(slot, hv), chunk.rows, v0, V, n, kPanelColumnsLd);
  }

  // dL and dP without the scale, zeros where there is no pair. Ends with a barrier.
  __device__ __forceinline__ void pairs(int hv) const {
    float dl[1][4][4] = {}, dp[1][4][4] = {};
    const int across = 32 * (warp % 2);
    for (int v0 = 0; v0 < V; v0 += kPanelColumns) {
      load_rows(hv, v0);
      __syncthreads();
      const Columns right{n + across * kPanelColumnsLd, kPanelColumnsLd};
      if (across <= row) {
        multiply_add<O>(dl, Rows{dr + row * kPanelColumnsLd, kPanelColumnsLd}, right, kPanelColumns);
        if (has_out) multiply_add<O>(dp, Rows{d_out + row * kPanelColumnsLd, kPanelColumnsLd}, right, kPanelColumns);
      }
      __syncthreads();
    }
    each(dl, [&](int i, int j, float x) {
      i += row, j += across;
      d_keys[i * kPairsLd + j] = i > j ? -x : 0.0f;
    });
    each(dp, [&](int i, int j, float x) {
      i += row, j += across;
      d_queries[i * kPairsLd + j] = i >= j ? x : 0.0f;
    });
    __syncthreads();
  }

  // One gate per head: D_ij and the scale go into dL and dP, and what alpha_t has of pairs to kPairSum. Sums down columns first, over
  // i >= t, then along the rows, over j < t. Ends with a barrier.
  __device__ __forceinline__ void gate_pairs(int hv) const {
    constexpr int kParts = kDeltaThreads / C, kRows = C / kParts, kSumsLd = C + 1;
    float* sums = work;  // [64][65]
    const int j = threadIdx.x % C, from = static_cast<int>(threadIdx.x) / C * kRows;
    const float* lower = a.w.intra.lower(slot, hv);
    const float* scores = has_out ? a.w.intra.scores(slot, hv) : nullptr;
    float decay = 1.0f;
    for (int i = min(j, from); i < from + kRows; ++i) {
      if (i > j) decay *= factor(kAlpha, i);
      if (i < from) continue;
      float &dl = d_keys[i * kPairsLd + j], &dp = d_queries[i * kPairsLd + j];
      float y = 0.0f;
      if (i > j) {
        y = dl * lower[i * C + j];
        if (has_out) y = fmaf(dp, scores[i * C + j], y);
      }
      sums[i * kSumsLd + j] = y;
      dl = operand<O>(dl * decay), dp = operand<O>(p.scale * dp * decay);
    }
    __syncthreads();
    const int t = threadIdx.x;
    if (t < C) {
      float sum = 0.0f;
      for (int i = C - 1; i > t; --i) sums[i * kSumsLd + t] = sum += sums[i * kSumsLd + t];
    }
    __syncthreads();
    if (t < C) {
      float sum = 0.0f;
      for (int i = 0; i < t; ++i) sum += sums[t * kSumsLd + i];
      rows[kPairSum * C + t] = sum;
    }
    __syncthreads();
  }

  // de^, dq^, dk- of the slice; returns the thread's part of S o dS', of channel thread / (256 / kSlice). Ends with a
  // barrier.
  __device__ __forceinline__ float state_products(int hv, int c0, Products& de, Products& dq, Products& dk) const {
    constexpr int kParts = kDeltaThreads / kSlice, kEach = kPanelColumns / kParts;
    float sum = 0.0f;
    for (int v0 = 0; v0 < V; v0 += kPanelColumns) {
      load_rows(hv, v0);
      const int64_t at = a.state_at(slot, hv) + static_cast<int64_t>(c0) * V;
      load_columns<O, kSlice>(a.w.states + at, K - c0, v0, V, state, kPanelColumnsLd);
      load_columns<O, kSlice>(a.w.dstates + at, K - c0, v0, V, d_state, kPanelColumnsLd);
      __syncthreads();
      const Columns right{state + column * kPanelColumnsLd, kPanelColumnsLd};
      multiply_add<O>(de, Rows{dr + row * kPanelColumnsLd, kPanelColumnsLd}, right, kPanelColumns);
      __syncwarp();  // one product after the other: 128 registers do not hold the operands of all three
      if (has_out) multiply_add<O>(dq, Rows{d_out + row * kPanelColumnsLd, kPanelColumnsLd}, right, kPanelColumns);
      __syncwarp();
      multiply_add<O>(dk, Rows{n + row * kPanelColumnsLd, kPanelColumnsLd},
                      Columns{d_state + column * kPanelColumnsLd, kPanelColumnsLd}, kPanelColumns);
      const int from = threadIdx.x / kParts * kPanelColumnsLd + threadIdx.x % kParts * kEach;
#pragma unroll
      for (int v = 0; v < kEach; ++v) sum = fmaf(state[from + v], d_state[from + v], sum);
      __syncthreads();
    }
    each(de, [](int, int, float& x) { x = -x; });
    each(dq, [&](int, int, float& x) { x *= p.scale; });
    return sum;
  }

  // Where the gradients of row i go, from a channel on: dq and dk are added to those of the value heads before.
  struct KeyRow {
    bool first;
    float *dq, *dk, *derase;
    DeltaRow erase;

    __device__ __forceinline__ float erase_at(int c) const { return erase.p ? erase[c] : 1.0f; }
    __device__ __forceinline__ void add(int c, float q, float k, float e) const {
      dk[c] = first ? k : dk[c] + k;
      if (dq) dq[c] = first ? q : dq[c] + q;
      if (derase) derase[c] = e;
    }
  };
  __device__ __forceinline__ KeyRow key_row(int hv, int i, int channel) const {
    const int64_t at = a.keys_at(slot, h) + static_cast<int64_t>(i) * K + channel;
    KeyRow out{hv == h * group, p.q.p ? a.w.dq + at : nullptr, a.w.dk + at, nullptr, {nullptr, p.erase.dtype}};
    if (a.p.derase) out.derase = a.p.derase + head(hv, i) * K + channel;
    if (p.erase.p) {
      const DeltaRow row = row_of(p.erase, chunk.b, chunk.first + i, hv);
      out.erase.p = static_cast<const uint8_t*>(row.p) + channel * (row.type == DType::f32 ? 4 : 2);
    }
    return out;
  }

  // ---- one gate per head, or none

  __device__ __forceinline__ void head_channels(int hv) const {
    float *k = work, *q = k + C * kLd, *e = q + C * kLd;
    float state_sum = 0.0f;
    for (int c0 = 0; c0 < K; c0 += kSlice) {
      Products de = {}, dq = {}, dk = {};
      state_sum += state_products(hv, c0, de, dq, dk);
      const ChunkSlice<kSlice> slice{p, chunk, factors, hv, c0};
      const auto one = [](int) { return 1.0f; };
      slice.template keys<O>(k, kLd, one);
      slice.template queries<O>(q, kLd, one);
      slice.template erased<O>(e, kLd, one);
      __syncthreads();
      const auto at = [&](int i, int j) { return (row + i) * kLd + column + j; };
      float beta[2] = {}, from_start[2] = {},
            to_end[2] = {};  // sums over channels of row lane / 4 and the one 8 rows on
      each_half(de, [&](int half, int i, int j, float& x) {
        x *= factor(kFromStart, row + i);
        from_start[half] = fmaf(e[at(i, j)], x, from_start[half]);
      });
      each_half(dq, [&](int half, int i, int j, float& x) {
        x *= factor(kFromStart, row + i);
        from_start[half] = fmaf(q[at(i, j)], x, from_start[half]);
      });
      each_half(dk, [&](int half, int i, int j, float& x) {
        x *= factor(kToEnd, row + i);
        to_end[half] = fmaf(k[at(i, j)], x, to_end[half]);
      });
      // dL and dP are lower triangles.
      const Rows keys{k + column, kLd};
      multiply_add<O>(de, Rows{d_keys + row * kPairsLd, kPairsLd}, keys, row + 16);
      multiply_add<O>(dk, Columns{d_keys + row * kPairsLd + row, kPairsLd}, Rows{e + row * kLd + column, kLd}, C - row);
      if (has_out) {
        multiply_add<O>(dq, Rows{d_queries + row * kPairsLd, kPairsLd}, keys, row + 16);
        multiply_add<O>(dk, Columns{d_queries + row * kPairsLd + row, kPairsLd}, Rows{q + row * kLd + column, kLd},
                        C - row);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = lane / 4 + 8 * half, first = lane % 4 * 2, channel = c0 + column + first;
        if (row + i >= chunk.rows) continue;
        const KeyRow out = key_row(hv, row + i, channel);
        const float b = factor(kBeta, row + i);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const int c = 8 * n + x;
            if (channel + c >= K) continue;
            const float key = k[at(i, first + c)], erase = out.erase_at(c), d = de[0][n][2 * half + x];
            out.add(c, dq[0][n][2 * half + x], fmaf(b * erase, d, dk[0][n][2 * half + x]), b * key * d);
            beta[half] = fmaf(erase * key, d, beta[half]);
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto put = [&](int which, float x) {
          x += __shfl_xor_sync(kWholeWarp, x, 1);
          x += __shfl_xor_sync(kWholeWarp, x, 2);
          if (lane % 4 == 0) rows[(which + warp % 2) * C + row + lane / 4 + 8 * half] += x;
        };
        put(kBetaSum, beta[half]);
        put(kFromStartSum, from_start[half]);
        put(kToEndSum, to_end[half]);
      }
      __syncthreads();
    }
    state_sum = sum_of_warp(state_sum);
    if (lane == 0) smem[l.state_sums + warp] = state_sum;
    __syncthreads();
    const int t = threadIdx.x;
    if (!a.p.dg || t >= chunk.rows) return;
    float sum = rows[kPairSum * C + t];
    for (int i = C - 1; i >= t; --i) sum += rows[kFromStartSum * C + i] + rows[(kFromStartSum + 1) * C + i];
    for (int j = 0; j < t; ++j) sum += rows[kToEndSum * C + j] + rows[(kToEndSum + 1) * C + j];
    float through = 0.0f;
    for (int w = 0; w < kDeltaThreads / 32; ++w) through += smem[l.state_sums + w];
    a.p.dg[head(hv, t)] = fmaf(factor(kFromStart, C - 1), through, sum);
  }

  // ---- a gate per channel: a thread has rows 8 J ... 8 J + 7 of a channel, J = warp

  __device__ __forceinline__ void channels(int hv) const {
    constexpr int R = kPairRows;
    float *sums_e = work, *sums_q = sums_e + C * kLd, *sums_k = sums_q + C * kLd;
    float *alpha = sums_k + C * kLd, *q = alpha + C * kLd, *e = q + C * kLd;
    const int J = warp, blocks = (chunk.rows + R - 1) / R;
    const auto at = [&](int r) { return (R * J + r) * kLd + lane; };
    float beta_sum[R] = {};
    for (int c0 = 0; c0 < K; c0 += kSlice) {
      const int channel = c0 + lane;
      {
        Products de = {}, dq = {}, dk = {};
        float sum = state_products(hv, c0, de, dq, dk);
#pragma unroll
        for (int x = 1; x < kDeltaThreads / kSlice; x *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, x);
        if (threadIdx.x % (kDeltaThreads / kSlice) == 0)
          smem[l.state_sums + threadIdx.x / (kDeltaThreads / kSlice)] = sum;
        each(de, [&](int i, int j, float x) { sums_e[(row + i) * kLd + column + j] = x; });
        each(dq, [&](int i, int j, float x) { sums_q[(row + i) * kLd + column + j] = x; });
        each(dk, [&](int i, int j, float x) { sums_k[(row + i) * kLd + column + j] = x; });
      }
      const ChunkSlice<kSlice> slice{p, chunk, factors, hv, c0};
      const auto one = [](int) { return 1.0f; };
      slice.template keys<Operands::fp32>(e, kLd, one);
      slice.template queries<Operands::fp32>(q, kLd, one);
      slice.alphas(alpha, kLd);
      __syncthreads();

      // The state's part: rows i from the start of the chunk, rows j to its end.
      const ChannelDecay decay = channel_decay(alpha + lane, kLd, smem + l.totals);
      ChannelPairs pairs;
      float dg[R], run = decay.before;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const bool exists = R * J + r < chunk.rows && channel < K;
        pairs.k[r] = e[at(r)];
        e[at(r)] = pairs.k[r] * factor(kBeta, R * J + r);
        if (p.erase.p && exists) e[at(r)] *= row_of(p.erase, chunk.b, chunk.first + R * J + r, hv)[channel];
        run *= alpha[at(r)];
        const float de = sums_e[at(r)] *= run, dq = sums_q[at(r)] *= run;
        dg[r] = fmaf(e[at(r)], de, q[at(r)] * dq);
      }
#pragma unroll
      for (int r = R - 2; r >= 0; --r) dg[r] += dg[r + 1];
      smem[l.from_start + threadIdx.x] = dg[0];
      run = decay.after;
#pragma unroll
      for (int r = R - 1; r >= 0; --r) {
        pairs.dk[r] = sums_k[at(r)] * run;
        sums_k[at(r)] = 0.0f;  // from here on sums of y_ij over earlier blocks
        pairs.decay[r] = 1.0f, pairs.column[r] = 0.0f;
        run *= alpha[at(r)];
      }
      run = 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        dg[r] += run;
        run = fmaf(pairs.k[r], pairs.dk[r], run);
      }
      smem[l.to_end + threadIdx.x] = run;

      // Pairs of rows: at each step a block of rows i has one block of rows j.
      for (int step = 0; step < blocks; ++step) {
        __syncthreads();
        const int I = J + step;
        if (I >= blocks) continue;
        float total = 0.0f;
#pragma unroll 2
        for (int r = 0; r < R; ++r) {
          const int i = R * I + r, to = i * kLd + lane;
          float dl[R], dp[R];
          read_pairs(d_keys + i * kPairsLd + R * J, dl);
          read_pairs(d_queries + i * kPairsLd + R * J, dp);
#pragma unroll
          for (int j = 0; j < R; ++j) dp[j] *= p.scale;
          float de = sums_e[to], dq = sums_q[to];
          if (step == 0) {
            pairs.add_own(r, dl, dp, alpha[to], e[to], q[to], de, dq, dg);
          } else {
            const float y = pairs.add(dl, dp, alpha[to], e[to], q[to], de, dq);
            sums_k[to] += y;
            total += y;
          }
          sums_e[to] = de, sums_q[to] = dq;
        }
        if (step > 0) smem[l.pair_totals + 32 * (I * (I - 1) / 2 + J) + lane] = total;
      }
      __syncthreads();

      // Decays that begin or end in other rows than the thread's.
      float others = decay.total * smem[l.state_sums + lane];
      for (int b = 0; b < 8; ++b)
        if (b != J) others += smem[(b < J ? l.to_end : l.from_start) + 32 * b + lane];
      for (int I = J + 1; I < blocks; ++I)
        for (int b = 0; b < J; ++b) others += smem[l.pair_totals + 32 * (I * (I - 1) / 2 + b) + lane];
      run = others;
#pragma unroll
      for (int r = R - 1; r >= 0; --r) {
        run += sums_k[at(r)];
        dg[r] += run;
      }
      run = 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        dg[r] += run;
        run += pairs.column[r];
      }

#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int i = R * J + r;
        const bool exists = i < chunk.rows && channel < K;
        float along = 0.0f;
        if (exists) {
          const KeyRow out = key_row(hv, i, channel);
          const float erase = out.erase_at(0), b = factor(kBeta, i), de = sums_e[at(r)];
          out.add(0, sums_q[at(r)], fmaf(b * erase, de, pairs.dk[r]), b * pairs.k[r] * de);
          if (a.p.dg) a.p.dg[head(hv, i) * K + channel] = dg[r];
          along = erase * pairs.k[r] * de;
        }
        beta_sum[r] += along;
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float sum = sum_of_warp(beta_sum[r]);
      if (lane == 0) rows[kBetaSum * C + R * J + r] = sum;
    }
    __syncthreads();
  }

  // ---- what has no channels of k

  __device__ __forceinline__ void values(int hv) const {
    for (int i = warp; i < chunk.rows; i += kDeltaThreads / 32) {
      const float* from = a.w.dr + a.rows_at(slot, hv) + static_cast<int64_t>(i) * V;
      const DeltaRow v = row_of(p.v, chunk.b, chunk.first + i, hv),
                     write = row_of(p.write, chunk.b, chunk.first + i, hv);
      const float beta = factor(kBeta, i);
      float sum = 0.0f;
      for (int c = lane; c < V; c += 32) {
        const float dw = from[c], value = v[c], gate = p.write.p ? write[c] : 1.0f;
        if (a.p.dv) write_number(p.v.dtype, a.p.dv, head(hv, i) * V + c, beta * gate * dw);
        if (a.p.dwrite) a.p.dwrite[head(hv, i) * V + c] = beta * value * dw;
        sum = fmaf(dw, gate * value, sum);
      }
      float dbeta = sum_of_warp(sum) + rows[kBetaSum * C + i] + rows[(kBetaSum + 1) * C + i];
      if (lane != 0) continue;
      if (p.rule == BetaRule::sigmoid) dbeta *= beta * (1.0f - beta);
      if (p.rule == BetaRule::sigmoid2) dbeta *= beta * (1.0f - 0.5f * beta);
      if (p.rule == BetaRule::kaczmarz) {
        dbeta /= rows[kSquares * C + i];
        rows[kKeyFactor * C + i] -= 2.0f * beta * dbeta;
      }
      if (a.p.dbeta) a.p.dbeta[head(hv, i)] = dbeta;
    }
  }

  // Kaczmarz: of every row of k, once for all value heads.
  __device__ __forceinline__ void squares() const {
    for (int i = warp; i < chunk.rows; i += kDeltaThreads / 32) {
      const float norm = a.w.intra.factors(slot, h * group)[kKeyNorm * C + i];
      const float sum = row_squares(row_of(p.k, chunk.b, chunk.first + i, h), K) * norm * norm;
      if (lane == 0) rows[kSquares * C + i] = sum + kKaczmarzEps, rows[kKeyFactor * C + i] = 0.0f;
    }
  }

  // x' = x f through the norm f = 1 / |x|: dx = f (dx' - x' (x'.dx')).
  __device__ __forceinline__ void through_norm(const DeltaRows& inputs, DeltaFactor norm, const float* sums, bool keys,
                                               void* out) const {
    if (!out) return;
    for (int i = warp; i < chunk.rows; i += kDeltaThreads / 32) {
      const DeltaRow from = row_of(inputs, chunk.b, chunk.first + i, h);
      const float f = factor(norm, i), more = keys && p.rule == BetaRule::kaczmarz ? rows[kKeyFactor * C + i] : 0.0f;
      const float* d = sums + a.keys_at(slot, h) + static_cast<int64_t>(i) * K;
      float along = 0.0f;
      for (int c = lane; c < K && p.l2norm; c += 32) {
        const float x = from[c] * f;
        along = fmaf(x, fmaf(more, x, d[c]), along);
      }
      along = sum_of_warp(along);
      for (int c = lane; c < K; c += 32) {
        const float x = from[c] * f;
        write_number(inputs.dtype, out, (token(i) * p.H + h) * K + c, f * (fmaf(more, x, d[c]) - along * x));
      }
    }
  }
};

// Tokens that belong to no sequence.
__device__ __forceinline__ void clear_gradients(const BackwardArgs& a, int64_t h) {
  const DeltaInputs& p = a.p.in;
  const int64_t group = p.HV / p.H, first = p.cu_seqlens[p.N];
  const auto clear = [&](DType type, void* out, int64_t heads, int64_t width) {  // the key head's part of every token
    for (int64_t t = first; out && t < p.T; ++t)
      for (int64_t i = threadIdx.x; i < heads * width; i += kDeltaThreads)
        write_number(type, out, ((t * p.H + h) * heads) * width + i, 0.0f);
  };
  clear(p.q.dtype, a.p.dq, 1, p.K);
  clear(p.k.dtype, a.p.dk, 1, p.K);
  clear(p.v.dtype, a.p.dv, group, p.V);
  clear(DType::f32, a.p.dbeta, group, 1);
  clear(DType::f32, a.p.dg, group, p.vector_gate ? p.K : 1);
  clear(DType::f32, a.p.derase, group, p.K);
  clear(DType::f32, a.p.dwrite, group, p.V);
}

// Grid (slots, key heads); with cu_seqlens there is a slot more, for the tokens that belong to no sequence.
template <Operands O, bool PerChannel>
__global__ __launch_bounds__(kDeltaThreads, O == Operands::tf32 ? 2 : 1) void delta_gradients_kernel(
    __grid_constant__ const BackwardArgs a) {
  KK_DYN_SMEM(float, smem);
  const DeltaInputs& p = a.p.in;
  if (p.cu_seqlens && blockIdx.x + 1 == gridDim.x) return clear_gradients(a, blockIdx.y);
  const DeltaChunk chunk = chunk_of(p, blockIdx.x);
  if (chunk.rows == 0) return;

  const Gradients<O, PerChannel> to{a, chunk, smem};
  if (p.rule == BetaRule::kaczmarz) to.squares();
  for (int hv = to.h * to.group; hv < (to.h + 1) * to.group; ++hv) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDeltaFactors * kBackwardChunk; i += kDeltaThreads)
      to.factors[i] = a.w.intra.factors(blockIdx.x, hv)[i];
    for (int i = threadIdx.x; i < (kPairSum - kBetaSum) * kBackwardChunk; i += kDeltaThreads)
      to.rows[kBetaSum * kBackwardChunk + i] = 0.0f;
    to.pairs(hv);
    if constexpr (PerChannel) {
      to.channels(hv);
    } else {
      to.gate_pairs(hv);
      to.head_channels(hv);
    }
    to.values(hv);
  }
  __syncthreads();
  to.through_norm(p.k, kKeyNorm, a.w.dk, true, a.p.dk);
  if (p.q.p) to.through_norm(p.q, kQueryNorm, a.w.dq, false, a.p.dq);
}

}  // namespace
}  // namespace kk::cuda
