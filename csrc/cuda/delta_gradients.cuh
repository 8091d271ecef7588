// What is parallel over the chunks of the backward pass: a block takes a chunk and a key head, and its value heads in
// order, so that sums over them need no atomics.
//
//   dP = tril(dO N^T)  dL = -tril_-1(dR N^T)           [C][C], scale goes into dP
//   de^ = -dR S^T      dq^ = scale dO S^T      dk- = N dS'^T          64 channels at a time
// by matrix instructions; then by a thread for each channel and block of 16 rows, D_ij by running products:
//   de_i = a_i o de^_i + sum_j dL_ij k_j o D_ij          dq_i = a_i o dq^_i + sum_j dP_ij k_j o D_ij
//   dk_j = D_Cj o dk-_j + sum_i (dL_ij e_i + dP_ij q_i) o D_ij
// dg_t is the sum of what every decay with alpha_t in it, times its gradient: those of pairs i >= t > j (y_ij), of rows
// i >= t from the start, of rows j < t to the end, and of the state. Only sums, so that the gates' own strength does not
// drown them: pairs of the thread's own block directly, others by what rows and columns have in common:
//     block of t:            J                I           sum over
//   pairs (i, j) of        later, J         I, earlier    rows i >= t or columns j < t of the block
//   blocks before and after t's block                     all
#pragma once
#include "cuda/delta_backward.cuh"

namespace kk::cuda {
namespace {

constexpr int kGradientsSlice = 64;  // channels
constexpr int kPairsLd = 68, kSumsLd = 68;
constexpr int kColumnsLd = 36;  // 32 columns of V: left operand by rows, right one by columns

struct GradientsLayout {  // in floats
  int d_keys, d_queries, de, dq, dk, factors, totals, row_totals, column_totals, between, state_sums, rows, total;
  KK_HD GradientsLayout() {
    const int C = kBackwardChunk;
    d_keys = 0, d_queries = d_keys + C * kPairsLd;                                // dL, dP
    de = d_queries + C * kPairsLd, dq = de + C * kSumsLd, dk = dq + C * kSumsLd;  // [64][64]; or columns of V
    factors = dk + C * kSumsLd;
    totals = factors + kDeltaFactors * C;  // [4][64] each
    row_totals = totals + 4 * C, column_totals = row_totals + 4 * C;
    between = column_totals + 4 * C;  // [3][64] of pairs of blocks (2, 0), (3, 0), (3, 1)
    state_sums = between + 3 * C;     // [64] S o dS'
    rows = state_sums + C;            // RowSum
    total = rows + 6 * C;
  }
};
enum RowSum {  // [64] each
  kBetaSum,    // two: of either half of the channels
  kGateSum = 2,
  kSquares = 4,   // kaczmarz: sum of k^2 + eps
  kKeyFactor = 5  // kaczmarz: what k is multiplied by in dk, of all value heads
};

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(0xffffffffu, x, h);
  return x;
}

// 16 neighbours of a row, alike for all lanes.
__device__ __forceinline__ void read16(const float* from, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}

// One of 16 rows j of a channel, paired with rows i.
struct PairSums {
  float k[16], decay[16], dk[16], column[16];  // column: y_ij of later blocks

  // Row i of block I, not of j's own block: y_ij is returned, summed over j.
  __device__ __forceinline__ float add(const float (&dl)[16], const float (&dp)[16], float alpha, float e, float q,
                                       float& de, float& dq) {
    float sum_e = 0.0f, sum_q = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      decay[j] *= alpha;
      const float w = decay[j] * k[j], x = fmaf(dl[j], e, dp[j] * q);
      sum_e = fmaf(dl[j], w, sum_e);
      sum_q = fmaf(dp[j], w, sum_q);
      dk[j] = fmaf(x, decay[j], dk[j]);
      column[j] = fmaf(x, w, column[j]);
    }
    de += sum_e, dq += sum_q;
    return fmaf(e, sum_e, q * sum_q);
  }

  // Row i of the block of j itself. dg[t] takes the pairs i >= t > j.
  __device__ __forceinline__ void add_own(int i, const float (&dl)[16], const float (&dp)[16], float alpha, float e,
                                          float q, float& de, float& dq, float (&dg)[16]) {
    float sum_e = 0.0f, sum_q = 0.0f, before = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j > 0 && j <= i) dg[j] += before;
      if (j < i) decay[j] *= alpha;
      const float w = decay[j] * k[j], x = fmaf(dl[j], e, dp[j] * q);
      sum_e = fmaf(dl[j], w, sum_e);
      sum_q = fmaf(dp[j], w, sum_q);
      dk[j] = fmaf(x, decay[j], dk[j]);
      if (j < i) before = fmaf(x, w, before);
    }
    de += sum_e, dq += sum_q;
  }
};

// Grid (slots, key heads); with cu_seqlens a slot more: the tokens that belong to no sequence.
template <Operands O>
__global__ __launch_bounds__(kDeltaThreads, 1) void delta_gradients_kernel(__grid_constant__ const BackwardArgs a) {
  KK_DYN_SMEM(float, smem);
  const DeltaInputs& p = a.p.in;
  const GradientsLayout l;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), C = kBackwardChunk;
  const int64_t slot = blockIdx.x, h = blockIdx.y, group = p.HV / p.H;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  const auto put = [](DType type, void* to, int64_t at, float x) {
    if (to) write_number(type, to, at, x);
  };
  if (p.cu_seqlens && slot + 1 == gridDim.x) {
    for (int64_t t = p.cu_seqlens[p.N]; t < p.T; ++t) {
      for (int c = thread; c < K; c += kDeltaThreads) {
        put(p.q.dtype, a.p.dq, (t * p.H + h) * K + c, 0.0f);
        put(p.k.dtype, a.p.dk, (t * p.H + h) * K + c, 0.0f);
      }
      const int64_t head = t * p.HV + h * group;
      for (int64_t c = thread; c < group * K; c += kDeltaThreads) {
        put(DType::f32, a.p.derase, head * K + c, 0.0f);
        if (p.vector_gate) put(DType::f32, a.p.dg, head * K + c, 0.0f);
      }
      for (int64_t c = thread; c < group * V; c += kDeltaThreads) {
        put(p.v.dtype, a.p.dv, head * V + c, 0.0f);
        put(DType::f32, a.p.dwrite, head * V + c, 0.0f);
      }
      for (int64_t c = thread; c < group; c += kDeltaThreads) {
        put(DType::f32, a.p.dbeta, head + c, 0.0f);
        if (!p.vector_gate) put(DType::f32, a.p.dg, head + c, 0.0f);
      }
    }
    return;
  }
  const DeltaChunk chunk = chunk_of(p, slot);
  if (chunk.rows == 0) return;
  const int64_t first_token = chunk.b * p.T + chunk.first;
  const int blocks = (chunk.rows + 15) / 16;
  const bool has_out = p.q.p && a.p.d_out.p;

  float *d_keys = smem + l.d_keys, *d_queries = smem + l.d_queries, *factors = smem + l.factors;
  float *sums_e = smem + l.de, *sums_q = smem + l.dq, *sums_k = smem + l.dk, *rows = smem + l.rows;
  // The same memory while columns of V pass through.
  float *d_out = sums_e, *dr = d_out + C * kColumnsLd, *n = dr + C * kColumnsLd;
  float *state = n + C * kColumnsLd, *d_state = state + kGradientsSlice * kColumnsLd;
  // Of [64][64] each warp has 16 rows and 32 columns.
  const int row = 16 * (warp / 2), column = 32 * (warp % 2);

  for (int i = warp; i < C && p.rule == BetaRule::kaczmarz; i += kDeltaThreads / 32) {
    float sum = 0.0f;
    const float norm = a.w.intra.factors(slot, h * group)[kKeyNorm * C + i];
    for (int c = lane; c < K && i < chunk.rows; c += 32) {
      const float k = row_of(p.k, chunk.b, chunk.first + i, h)[c] * norm;
      sum = fmaf(k, k, sum);
    }
    sum = sum_of_lanes(sum);
    if (lane == 0) rows[kSquares * C + i] = sum + kKaczmarzEps, rows[kKeyFactor * C + i] = 0.0f;
  }

  for (int64_t hv = h * group; hv < (h + 1) * group; ++hv) {
    __syncthreads();
    for (int i = thread; i < kDeltaFactors * C; i += kDeltaThreads) factors[i] = a.w.intra.factors(slot, hv)[i];
    for (int i = thread; i < 4 * C; i += kDeltaThreads) rows[i] = 0.0f;  // kBetaSum, kGateSum
    const auto load_rows = [&](int v0) {
      load_d_out<O>(a.p.d_out, chunk, hv, v0, V, d_out, kColumnsLd);
      load_columns<O>(a.w.dr + a.rows_at(slot, hv), chunk.rows, v0, V, dr, kColumnsLd);
      load_columns<O>(a.w.n + a.rows_at(slot, hv), chunk.rows, v0, V, n, kColumnsLd);
    };

    {
      float dl[1][4][4] = {}, dp[1][4][4] = {};
      for (int v0 = 0; v0 < V; v0 += 32) {
        load_rows(v0);
        __syncthreads();
        const Columns right{n + column * kColumnsLd, kColumnsLd};
        if (column <= row) {
          multiply_add<O>(dl, Rows{dr + row * kColumnsLd, kColumnsLd}, right, 32);
          if (has_out) multiply_add<O>(dp, Rows{d_out + row * kColumnsLd, kColumnsLd}, right, 32);
        }
        __syncthreads();
      }
      each(dl, [&](int i, int j, float x) {
        i += row, j += column;
        d_keys[i * kPairsLd + j] = i > j ? -x : 0.0f;
      });
      each(dp, [&](int i, int j, float x) {
        i += row, j += column;
        d_queries[i * kPairsLd + j] = i >= j ? p.scale * x : 0.0f;
      });
    }

    for (int c0 = 0; c0 < K; c0 += kGradientsSlice) {
      const int c = thread % 64, J = thread / 64, channel = c0 + c;
      {
        float de[1][4][4] = {}, dq[1][4][4] = {}, dk[1][4][4] = {}, state_sum = 0.0f;
        for (int v0 = 0; v0 < V; v0 += 32) {
          __syncthreads();
          load_rows(v0);
          const int64_t at = a.state_at(slot, hv) + static_cast<int64_t>(c0) * V;
          load_columns<O>(a.w.states + at, K - c0, v0, V, state, kColumnsLd);
          load_columns<O>(a.w.dstates + at, K - c0, v0, V, d_state, kColumnsLd);
          __syncthreads();
          const Columns right{state + column * kColumnsLd, kColumnsLd};
          multiply_add<O>(de, Rows{dr + row * kColumnsLd, kColumnsLd}, right, 32);
          if (has_out) multiply_add<O>(dq, Rows{d_out + row * kColumnsLd, kColumnsLd}, right, 32);
          multiply_add<O>(dk, Rows{n + row * kColumnsLd, kColumnsLd},
                          Columns{d_state + column * kColumnsLd, kColumnsLd}, 32);
          // Four neighbouring threads have a channel.
          const int from = thread / 4 * kColumnsLd + thread % 4 * 8;
#pragma unroll
          for (int v = 0; v < 8; ++v) state_sum = fmaf(state[from + v], d_state[from + v], state_sum);
        }
        state_sum += __shfl_xor_sync(0xffffffffu, state_sum, 1);
        state_sum += __shfl_xor_sync(0xffffffffu, state_sum, 2);
        if (thread % 4 == 0) smem[l.state_sums + thread / 4] = state_sum;
        __syncthreads();
        each(de, [&](int i, int j, float x) { sums_e[(row + i) * kSumsLd + column + j] = -x; });
        each(dq, [&](int i, int j, float x) { sums_q[(row + i) * kSumsLd + column + j] = p.scale * x; });
        each(dk, [&](int i, int j, float x) { sums_k[(row + i) * kSumsLd + column + j] = x; });
      }
      __syncthreads();

      // The state's part: rows i of the thread's block J.
      const ChannelRows own{p, chunk, factors, hv, channel, 16 * J};
      const ChannelDecay decay = channel_decay(own, smem + l.totals);
      const auto at = [&](int r) { return (16 * J + r) * kSumsLd + c; };
      PairSums pairs;
      float dg[16], run = decay.before;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        run *= own.alpha(r);
        pairs.k[r] = own.k(r);
        const float de = sums_e[at(r)] *= run, dq = sums_q[at(r)] *= run;
        dg[r] = fmaf(own.factor(kBeta, r) * own.erase(r) * pairs.k[r], de, own.q(r) * dq);
      }
#pragma unroll
      for (int r = 14; r >= 0; --r) dg[r] += dg[r + 1];
      smem[l.row_totals + thread] = dg[0];
      run = decay.after;
#pragma unroll
      for (int r = 15; r >= 0; --r) {
        pairs.dk[r] = sums_k[at(r)] * run;
        sums_k[at(r)] = 0.0f;  // from here on: y_ij of row i and earlier blocks
        pairs.decay[r] = 1.0f, pairs.column[r] = 0.0f;
        run *= own.alpha(r);
      }
      run = 0.0f;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        dg[r] += run;
        run = fmaf(pairs.k[r], pairs.dk[r], run);
      }
      smem[l.column_totals + thread] = run;
      __syncthreads();
      float others = decay.total * smem[l.state_sums + c];
      for (int b = 0; b < 4; ++b)
        if (b != J) others += smem[(b < J ? l.column_totals : l.row_totals) + 64 * b + c];

      // Pairs, at each step of different rows i.
      for (int step = 0; step < blocks; ++step) {
        const int I = J + step;
        if (step > 0) __syncthreads();
        if (I >= blocks) continue;
        const ChannelRows later{p, chunk, factors, hv, channel, 16 * I};
        float total = 0.0f;
        for (int r = 0; r < 16; ++r) {
          const int i = 16 * I + r, to = i * kSumsLd + c;
          float dl[16], dp[16];
          read16(d_keys + i * kPairsLd + 16 * J, dl);
          read16(d_queries + i * kPairsLd + 16 * J, dp);
          const float e = later.factor(kBeta, r) * later.erase(r) * later.k(r), q = later.q(r), alpha = later.alpha(r);
          float de = sums_e[to], dq = sums_q[to];
          if (step == 0) {
            pairs.add_own(r, dl, dp, alpha, e, q, de, dq, dg);
          } else {
            const float y = pairs.add(dl, dp, alpha, e, q, de, dq);
            sums_k[to] += y;
            total += y;
          }
          sums_e[to] = de, sums_q[to] = dq;
        }
        if (step > 1) smem[l.between + 64 * (I == 2 ? 0 : 1 + J) + c] = total;
      }
      __syncthreads();
      if (J == 1 && blocks > 2) others += smem[l.between + c];
      if (J > 0 && J < 3 && blocks > 3) others += smem[l.between + 64 + c];
      if (J == 2 && blocks > 3) others += smem[l.between + 128 + c];
      float from_later = 0.0f;
#pragma unroll
      for (int r = 15; r >= 0; --r) {
        from_later += sums_k[at(r)];
        dg[r] += from_later + others;
      }
      float from_earlier = 0.0f;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        dg[r] += from_earlier;
        from_earlier += pairs.column[r];
      }

#pragma unroll
      for (int r = 0; r < 16; ++r) {
        const int i = 16 * J + r;
        const bool exists = own.exists(r);
        const float beta = own.factor(kBeta, r), erase = own.erase(r), de = sums_e[at(r)];
        if (exists) {
          const int64_t token = first_token + i, head = token * p.HV + hv;
          const int64_t sum = a.keys_at(slot, h) + static_cast<int64_t>(i) * K + channel;
          const bool first_head = hv == h * group;
          const float dk = fmaf(beta * erase, de, pairs.dk[r]), dq = sums_q[at(r)];
          a.w.dk[sum] = first_head ? dk : a.w.dk[sum] + dk;
          if (p.q.p) a.w.dq[sum] = first_head ? dq : a.w.dq[sum] + dq;
          if (a.p.derase) a.p.derase[head * K + channel] = beta * pairs.k[r] * de;
          if (a.p.dg && p.vector_gate) a.p.dg[head * K + channel] = dg[r];
        }
        const float beta_sum = sum_of_lanes(exists ? erase * pairs.k[r] * de : 0.0f);
        const float gate_sum = sum_of_lanes(exists ? dg[r] : 0.0f);
        if (lane == 0) {
          rows[(kBetaSum + warp % 2) * C + i] += beta_sum;
          rows[(kGateSum + warp % 2) * C + i] += gate_sum;
        }
      }
    }
    __syncthreads();

    for (int i = warp; i < chunk.rows; i += kDeltaThreads / 32) {
      const int64_t head = (first_token + i) * p.HV + hv;
      const float* from = a.w.dr + a.rows_at(slot, hv) + static_cast<int64_t>(i) * V;
      const DeltaRow values = row_of(p.v, chunk.b, chunk.first + i, hv);
      const DeltaRow writes = row_of(p.write, chunk.b, chunk.first + i, hv);
      const float beta = factors[kBeta * C + i];
      float sum = 0.0f;
      for (int v = lane; v < V; v += 32) {
        const float dw = from[v], value = values[v], write = p.write.p ? writes[v] : 1.0f;
        put(p.v.dtype, a.p.dv, head * V + v, beta * write * dw);
        if (a.p.dwrite) a.p.dwrite[head * V + v] = beta * value * dw;
        sum = fmaf(dw, write * value, sum);
      }
      sum = sum_of_lanes(sum) + rows[kBetaSum * C + i] + rows[(kBetaSum + 1) * C + i];
      if (lane == 0) {
        float dbeta = sum;
        if (p.rule == BetaRule::sigmoid) dbeta *= beta * (1.0f - beta);
        if (p.rule == BetaRule::sigmoid2) dbeta *= beta * (1.0f - 0.5f * beta);
        if (p.rule == BetaRule::kaczmarz) {
          dbeta /= rows[kSquares * C + i];
          rows[kKeyFactor * C + i] -= 2.0f * beta * dbeta;
        }
        if (a.p.dbeta) a.p.dbeta[head] = dbeta;
        if (a.p.dg && !p.vector_gate) a.p.dg[head] = rows[kGateSum * C + i] + rows[(kGateSum + 1) * C + i];
      }
    }
  }
  __syncthreads();

  // Through the norms: x' = x / |x|, dx = (dx' - x' (x'.dx')) / |x|.
  for (int i = warp; i < chunk.rows; i += kDeltaThreads / 32) {
    const auto finish = [&](const DeltaRows& inputs, const float* sums, DeltaFactor norm, float add_key, void* out) {
      if (!out) return;
      const DeltaRow from = row_of(inputs, chunk.b, chunk.first + i, h);
      const float factor = factors[norm * C + i];
      const float* d = sums + a.keys_at(slot, h) + static_cast<int64_t>(i) * K;
      float along = 0.0f;
      for (int c = lane; c < K && p.l2norm; c += 32) {
        const float x = from[c] * factor;
        along = fmaf(x, fmaf(add_key, x, d[c]), along);
      }
      along = sum_of_lanes(along);
      for (int c = lane; c < K; c += 32) {
        const float x = from[c] * factor;
        write_number(inputs.dtype, out, ((first_token + i) * p.H + h) * K + c,
                     factor * (fmaf(add_key, x, d[c]) - along * x));
      }
    };
    finish(p.k, a.w.dk, kKeyNorm, p.rule == BetaRule::kaczmarz ? rows[kKeyFactor * C + i] : 0.0f, a.p.dk);
    if (p.q.p) finish(p.q, a.w.dq, kQueryNorm, 0.0f, a.p.dq);
  }
}

}  // namespace
}  // namespace kk::cuda
