#include "cuda/delta_intra.cuh"

#include "cuda/rows.cuh"
#include "cuda/tril_blocks.cuh"

namespace kk::cuda {
namespace {

constexpr int kIntraSlice = 32;                 // channels at a time
constexpr int kIntraSliceLd = kIntraSlice + 4;  // no bank conflicts as left operand by rows and right one by columns

// Shared memory: floats.
struct IntraLayout {
  int C, ld, keys, queries, slices, inverse, scratch, between, factors, total;
  KK_HD explicit IntraLayout(int64_t chunk) {
    C = static_cast<int>(chunk), ld = C + 4;
    keys = 0, queries = keys + C * ld;             // e k^T and q k^T: lower blocks
    slices = queries + C * ld;                     // e, q, k, alpha [C][kIntraSlice]; not needed any more when ...
    inverse = slices, scratch = inverse + C * ld;  // ... these are
    between = slices + 4 * C * kIntraSliceLd;      // [4][kIntraSlice]
    factors = between + 4 * kIntraSlice;           // [kDeltaFactors][C]
    total = factors + kDeltaFactors * C;
  }
};

// Pairs of rows within 16 x 16 blocks on the diagonal, with a gate per channel: w_j = k_j o D_ij runs along i, for exact
// products whatever the gates are. Eight lanes share a row j, four channels each.
__device__ __forceinline__ void diagonal_pairs(const float* e, const float* q, const float* k, const float* alpha,
                                               float* keys, float* queries, int ld, int rows, bool has_q) {
  const int j = threadIdx.x / 8 % 16, channel = threadIdx.x % 8 * 4;
  for (int block = threadIdx.x / 128; 16 * block < rows; block += kDeltaThreads / 128) {
    const int from = 16 * block * kIntraSliceLd + channel;
    const float4 w4 = *reinterpret_cast<const float4*>(k + from + j * kIntraSliceLd);
    float w[4] = {w4.x, w4.y, w4.z, w4.w};
    for (int i = j / 4 * 4; i < 16; ++i) {  // the first j of the warp
      const auto dot = [&](const float* x) {
        const float4 row = *reinterpret_cast<const float4*>(x + from + i * kIntraSliceLd);
        return fmaf(row.x, w[0], fmaf(row.y, w[1], fmaf(row.z, w[2], row.w * w[3])));
      };
      if (i > j) {
        const float4 a = *reinterpret_cast<const float4*>(alpha + from + i * kIntraSliceLd);
        w[0] *= a.x, w[1] *= a.y, w[2] *= a.z, w[3] *= a.w;
      }
      float with_e = i > j ? dot(e) : 0.0f, with_q = has_q && i >= j ? dot(q) : 0.0f;
#pragma unroll
      for (int h = 1; h < 8; h *= 2) {
        with_e += __shfl_xor_sync(kWholeWarp, with_e, h);
        with_q += __shfl_xor_sync(kWholeWarp, with_q, h);
      }
      if (threadIdx.x % 8 == 0 && i >= j) {
        keys[(16 * block + i) * ld + 16 * block + j] += with_e;
        queries[(16 * block + i) * ld + 16 * block + j] += with_q;
      }
    }
  }
}

// Grid (slots, heads): value heads, or key heads where the value heads of a key head share the products of rows.
template <Operands O, bool PerChannel>
__global__ __launch_bounds__(kDeltaThreads, 3) void delta_intra_kernel(DeltaInputs p, DeltaIntra out,
                                                                       int heads_per_block) {
  KK_DYN_SMEM(float, smem);
  const DeltaChunk chunk = chunk_of(p, blockIdx.x);
  if (chunk.rows == 0) return;
  const IntraLayout l(p.chunk);
  const int C = l.C, K = static_cast<int>(p.K), warp = threadIdx.x / 32, blocks = (chunk.rows + 15) / 16;
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * heads_per_block, key_head = first_head / (p.HV / p.H);
  const bool has_q = p.q.p, own_e = PerChannel || p.erase.p;
  float *keys = smem + l.keys, *queries = smem + l.queries, *factors = smem + l.factors, *between = smem + l.between;
  float *e = smem + l.slices, *q = e + C * kIntraSliceLd, *k = q + C * kIntraSliceLd, *alpha = k + C * kIntraSliceLd;
  if (!own_e) e = k;

  for (int i = threadIdx.x; i < 2 * C * l.ld; i += kDeltaThreads) keys[i] = 0.0f;
  const bool squares = p.l2norm || p.rule == BetaRule::kaczmarz;
  for (int i = warp; i < C; i += kDeltaThreads / 32) {
    const bool exists = i < chunk.rows;
    const float k_squares = squares && exists ? row_squares(row_of(p.k, chunk.b, chunk.first + i, key_head), K) : 0.0f;
    const float q_squares =
        p.l2norm && has_q && exists ? row_squares(row_of(p.q, chunk.b, chunk.first + i, key_head), K) : 0.0f;
    const float key_norm = p.l2norm ? l2norm_factor(k_squares) : 1.0f;
    if (threadIdx.x % 32 == 0) {
      factors[kKeyNorm * C + i] = key_norm;
      factors[kQueryNorm * C + i] = p.l2norm ? l2norm_factor(q_squares) : 1.0f;
      factors[kBeta * C + i] = k_squares * key_norm * key_norm;  // until beta is read
    }
  }

  // e k^T and q k^T, the decays of the channels included
  for (int c0 = 0; c0 < K; c0 += kIntraSlice) {
    __syncthreads();
    for (int u = threadIdx.x; u < C * kIntraSlice / 8; u += kDeltaThreads) {
      const int row = u / (kIntraSlice / 8), c = u % (kIntraSlice / 8) * 8, at = row * kIntraSliceLd + c;
      const int64_t token = chunk.first + row;
      // With gates per channel the slices are operands only after they were scaled.
      constexpr Operands kStored = PerChannel ? Operands::fp32 : O;
      float x[8] = {}, y[8] = {};
      if (row < chunk.rows) {
        read8(row_of(p.k, chunk.b, token, key_head), c0 + c, K, x);
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] *= factors[kKeyNorm * C + row];
        if (p.erase.p) read8(row_of(p.erase, chunk.b, token, first_head), c0 + c, K, y);
      }
      store8_operands<kStored>(k + at, x);
      if (own_e) {
#pragma unroll
        for (int n = 0; n < 8; ++n) y[n] = p.erase.p ? x[n] * y[n] : x[n];
        store8_operands<kStored>(e + at, y);
      }
      if (has_q) {
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] = 0.0f;
        if (row < chunk.rows) read8(row_of(p.q, chunk.b, token, key_head), c0 + c, K, x);
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] *= factors[kQueryNorm * C + row];
        store8_operands<kStored>(q + at, x);
      }
      if (PerChannel) {
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] = 0.0f;
        if (row < chunk.rows) read8(row_of(p.g, chunk.b, token, first_head), c0 + c, K, x);
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] = expf(x[n]);
        store8_operands<kStored>(alpha + at, x);
      }
    }
    __syncthreads();
    if constexpr (PerChannel) {
      diagonal_pairs(e, q, k, alpha, keys, queries, l.ld, chunk.rows, has_q);
      __syncthreads();
      // Off the diagonal D_ij = (alphas of i's block up to i) (those of the blocks between) (those of j's block after j):
      // no factor is above 1 if no gate is.
      const int c = threadIdx.x % kIntraSlice, block = threadIdx.x / kIntraSlice;
      float up_to = 1.0f, after = 1.0f;
      if (block < blocks) {
#pragma unroll
        for (int r = 0; r < 16; ++r) {
          const int at = (16 * block + r) * kIntraSliceLd + c;
          up_to *= alpha[at];
          e[at] = operand<O>(e[at] * up_to);
          if (has_q) q[at] = operand<O>(q[at] * up_to);
        }
#pragma unroll
        for (int r = 15; r >= 0; --r) {
          const int at = (16 * block + r) * kIntraSliceLd + c;
          k[at] = operand<O>(k[at] * after);
          after *= alpha[at];
        }
        if (block == 0) between[c] = 1.0f;
        if (block == 1 || block == 2) between[block * kIntraSlice + c] = up_to;
      }
      __syncthreads();
      if (blocks == 4 && threadIdx.x < kIntraSlice)
        between[3 * kIntraSlice + c] = between[kIntraSlice + c] * between[2 * kIntraSlice + c];
      __syncthreads();
    }
    const int tiles = PerChannel ? blocks * (blocks - 1) / 2 : blocks * (blocks + 1) / 2;
    for (int tile = warp; tile < (has_q ? 2 : 1) * tiles; tile += kDeltaThreads / 32) {
      const bool queried = tile >= tiles;
      int i = PerChannel ? 1 : 0, j = tile % tiles;
      for (; j > (PerChannel ? i - 1 : i); ++i) j -= PerChannel ? i : i + 1;
      const float *left = (queried ? q : e) + 16 * i * kIntraSliceLd, *right = k + 16 * j * kIntraSliceLd;
      float* sum = (queried ? queries : keys) + 16 * i * l.ld + 16 * j;
      float c[1][2][4];
      each(c, [&](int r, int s, float& x) { x = sum[r * l.ld + s]; });
      if (PerChannel && i - j > 1) {
        const float* decay = between + (i - j == 3 ? 3 : j + 1) * kIntraSlice;
        multiply_add<O>(
            c, Rows{left, kIntraSliceLd},
            [&](int channel, int s) { return operand<O>(right[s * kIntraSliceLd + channel] * decay[channel]); },
            kIntraSlice);
      } else {
        multiply_add<O>(c, Rows{left, kIntraSliceLd}, Columns{right, kIntraSliceLd}, kIntraSlice);
      }
      each(c, [&](int r, int s, float x) { sum[r * l.ld + s] = x; });
    }
  }

  const int thread = static_cast<int>(threadIdx.x);
  const float k_squares = thread < C ? factors[kBeta * C + thread] : 0.0f;
  for (int64_t hv = first_head; hv < first_head + heads_per_block; ++hv) {
    __syncthreads();
    if (thread < C) {
      const int i = thread;
      const int64_t token = chunk.first + i;
      const bool exists = i < chunk.rows;
      const float given = exists && p.beta.p ? row_of(p.beta, chunk.b, token, hv)[0] : 1.0f;
      factors[kBeta * C + i] = exists ? beta_value(p.rule, given, k_squares) : 0.0f;
      factors[kAlpha * C + i] = exists && p.g.p && !PerChannel ? expf(row_of(p.g, chunk.b, token, hv)[0]) : 1.0f;
    }
    __syncthreads();
    if (thread < 2 * C) {
      const int i = thread % C;
      const bool from_start = thread < C;
      float product = 1.0f;
      for (int j = from_start ? 0 : i + 1; j < (from_start ? i + 1 : C); ++j) product *= factors[kAlpha * C + j];
      factors[(from_start ? kFromStart : kToEnd) * C + i] = product;
    }
    // Threads of a column j take a part of its rows each; D_ij runs down the column.
    const int parts = kDeltaThreads / C, j = threadIdx.x % C, from = threadIdx.x / C * (C / parts);
    float *x = smem + l.inverse, *scores = has_q ? out.scores(blockIdx.x, hv) : nullptr;
    float* lower = out.has_l ? out.lower(blockIdx.x, hv) : nullptr;
    float decay = 1.0f;
    for (int i = min(j, from); i < from + C / parts; ++i) {
      if (i > j) decay *= factors[kAlpha * C + i];
      if (i < from) continue;
      x[i * l.ld + j] = i > j ? factors[kBeta * C + i] * decay * keys[i * l.ld + j] : 0.0f;
      if (lower) lower[i * C + j] = x[i * l.ld + j];
      if (has_q) scores[i * C + j] = i >= j ? p.scale * decay * queries[i * l.ld + j] : 0.0f;
    }
    __syncthreads();
    invert_unit_lower<Operands::tf32x3>(x, l.ld, smem + l.scratch, C);
    float* inverse = out.inverse(blockIdx.x, hv);
    for (int i = threadIdx.x; i < C * C; i += kDeltaThreads) inverse[i] = x[i / C * l.ld + i % C];
    for (int i = threadIdx.x; i < kDeltaFactors * C; i += kDeltaThreads) out.factors(blockIdx.x, hv)[i] = factors[i];
  }
}

}  // namespace

DeltaIntra delta_intra(const DeltaInputs& p, void* workspace, const CudaExec& exec, bool keep_l) {
  const DeltaIntra out = delta_intra_at(p, workspace, keep_l);
  const int64_t slots = delta_begun_slots(p, p.chunk);
  if (slots == 0) return out;
  const bool shared = !p.vector_gate && !p.erase.p;
  const int heads = shared ? static_cast<int>(p.HV / p.H) : 1;
  const dim3 grid(static_cast<unsigned>(slots), static_cast<unsigned>(p.HV / heads));
  const size_t smem = IntraLayout(p.chunk).total * sizeof(float);
  const auto run = [&](auto kernel) { launch(kernel, grid, dim3(kDeltaThreads), smem, exec.stream, p, out, heads); };
  const bool per_channel = p.g.p && p.vector_gate;
  if (p.k.dtype == DType::f32)
    per_channel ? run(delta_intra_kernel<Operands::tf32x3, true>) : run(delta_intra_kernel<Operands::tf32x3, false>);
  else
    per_channel ? run(delta_intra_kernel<Operands::tf32, true>) : run(delta_intra_kernel<Operands::tf32, false>);
  return out;
}

}  // namespace kk::cuda
