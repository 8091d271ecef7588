// The state is serial in the chunks of a sequence, and its columns do not know of each other: a block takes a value head
// of a sequence and 32 columns, and goes through the chunks. What does not depend on the state was made before, for all
// chunks at once (delta_intra.cuh).
//
//   X = [k^; q^] S      R = w - X_k      N = T R      o = scale X_q + P N      S <- diag(a_C) S + k-^T N
//
// S [K][32] lies in registers, as sums of the last product; a copy of it, rounded to operands, lies in shared memory.
// Everything else passes through shared memory, k^ and q^ in pieces of 64 channels, k- in pieces of 128:
//   state  [K][40]
//   rows   [C][40]  w, then R, then N
//   work   k^ rows 0-15, q^ rows 0-15, k^ rows 16-31, ... [2 C][68], then T and P [C][68] each, then k- [C][136]
// The sums of T R and P N cancel where keys are alike: these two take the three products of tf32x3 for any input. With
// T, R, P and N rounded to tf32 the error of o is four times as large on positive fp16 keys (2e-3 instead of 5e-4).
// A warp reads 12 words per lane of shared memory for 4 matrix instructions: by counts, that bounds a full GPU.

#include "cuda/delta_scan.cuh"

#include "cuda/delta_mma.cuh"

namespace kk::cuda {
namespace {

constexpr int kPanel = 32;         // columns of V
constexpr int kPanelLd = 40;       // as right operand by rows
constexpr int kSlice = 64;         // channels of X at a time
constexpr int kSliceLd = 68;       // as left operand by rows
constexpr int kWideSlice = 128;    // channels of S at a time: 8 warps of 16
constexpr int kWideSliceLd = 136;  // as left operand by columns

struct ScanLayout {  // shared memory, in floats
  int state, rows, work, factors, totals, decay, total;
  KK_HD ScanLayout(int64_t K, int64_t chunk) {
    const int C = static_cast<int>(chunk), channels = static_cast<int>((K + 15) / 16 * 16);
    state = 0;
    rows = state + channels * kPanelLd;
    work = rows + C * kPanelLd;
    factors = work + C * kWideSliceLd;
    totals = factors + kDeltaFactors * C;  // [4][64] products of the gates of 16 rows
    decay = totals + 4 * kSlice;           // [K] a_C
    total = decay + static_cast<int>(kMaxDeltaDim);
  }
};

// A chunk's rows on their way into shared memory. All threads call the functions together.
template <Operands O, bool PerChannel>
struct ChunkRows {
  const DeltaInputs& p;
  const DeltaChunk& chunk;
  int64_t hv;
  const float* factors;  // [kDeltaFactors][C]
  float *totals, *decay;

  __device__ __forceinline__ DeltaRow key(int i) const {
    return row_of(p.k, chunk.b, chunk.first + i, hv / (p.HV / p.H));
  }
  __device__ __forceinline__ DeltaRow query(int i) const {
    return row_of(p.q, chunk.b, chunk.first + i, hv / (p.HV / p.H));
  }
  __device__ __forceinline__ DeltaRow erase(int i) const { return row_of(p.erase, chunk.b, chunk.first + i, hv); }
  __device__ __forceinline__ float factor(DeltaFactor f, int i) const { return factors[f * p.chunk + i]; }

  // One channel's gates in 16 rows into to[row * ld], 1 past the last row and the last channel; returns their product.
  __device__ __forceinline__ float gates(float* to, int ld, int channel, int first_row) const {
    float product = 1.0f;
    if (first_row >= p.chunk) return product;
#pragma unroll 2
    for (int r = 0; r < 16; ++r) {
      const bool exists = first_row + r < chunk.rows && channel < p.K;
      const float alpha = exists ? expf(row_of(p.g, chunk.b, chunk.first + first_row + r, hv)[channel]) : 1.0f;
      to[r * ld] = alpha;
      product *= alpha;
    }
    return product;
  }

  // Channels from c0 on of [k^; q^] (k with erase; with one gate per head without a_i), 16 rows of the one and of the
  // other in turn.
  __device__ __forceinline__ void lookups(float* work, int c0) const {
    const int K = static_cast<int>(p.K), C = static_cast<int>(p.chunk);
    if constexpr (PerChannel) {
      const int block = threadIdx.x / kSlice, c = threadIdx.x % kSlice, channel = c0 + c;
      float* k_rows = work + 32 * block * kSliceLd + c;  // hold the gates first
      totals[threadIdx.x] = gates(k_rows, kSliceLd, channel, 16 * block);
      __syncthreads();
      if (16 * block >= C) return;
      float run = 1.0f;
      for (int b = 0; b < block; ++b) run *= totals[b * kSlice + c];
#pragma unroll 2
      for (int r = 0; r < 16; ++r) {
        const int i = 16 * block + r;
        float k = 0.0f, q = 0.0f;
        if (i < chunk.rows && channel < K) {
          k = key(i)[channel] * factor(kKeyNorm, i);
          if (p.erase.p) k *= erase(i)[channel];
          if (p.q.p) q = query(i)[channel] * factor(kQueryNorm, i);
        }
        run *= k_rows[r * kSliceLd];
        k_rows[r * kSliceLd] = operand<O>(k * run);
        k_rows[(16 + r) * kSliceLd] = operand<O>(q * run);
      }
    } else {
      for (int u = threadIdx.x; u < 2 * C * (kSlice / 8); u += kDeltaThreads) {
        const int row = u / (kSlice / 8), c = u % (kSlice / 8) * 8, i = row / 32 * 16 + row % 16;
        const bool is_query = row & 16;
        float x[8] = {};
        if (i < chunk.rows && (!is_query || p.q.p)) {
          read8(is_query ? query(i) : key(i), c0 + c, K, x);
          const float norm = factor(is_query ? kQueryNorm : kKeyNorm, i);
#pragma unroll
          for (int n = 0; n < 8; ++n) x[n] *= norm;
          if (!is_query && p.erase.p) {
            float e[8];
            read8(erase(i), c0 + c, K, e);
#pragma unroll
            for (int n = 0; n < 8; ++n) x[n] *= e[n];
          }
        }
        store8_operands<O>(work + row * kSliceLd + c, x);
      }
    }
  }

  // Channels from c0 on of k-, and a_C of them.
  __device__ __forceinline__ void updates(float* work, int c0) const {
    const int K = static_cast<int>(p.K), C = static_cast<int>(p.chunk);
    if constexpr (PerChannel) {
      for (int part = 0; part < kWideSlice; part += kSlice) {
        const int block = threadIdx.x / kSlice, c = threadIdx.x % kSlice, channel = c0 + part + c;
        float* k_rows = work + 16 * block * kWideSliceLd + part + c;
        const float product = gates(k_rows, kWideSliceLd, channel, 16 * block);
        __syncthreads();
        totals[threadIdx.x] = product;
        __syncthreads();
        if (block == 0)
          decay[channel] = totals[c] * totals[kSlice + c] * totals[2 * kSlice + c] * totals[3 * kSlice + c];
        if (16 * block >= C) continue;
        float run = 1.0f;
        for (int b = 3; b > block; --b) run *= totals[b * kSlice + c];
#pragma unroll 2
        for (int r = 15; r >= 0; --r) {
          const int i = 16 * block + r;
          const float k = i < chunk.rows && channel < K ? key(i)[channel] * factor(kKeyNorm, i) : 0.0f;
          const float alpha = k_rows[r * kWideSliceLd];
          k_rows[r * kWideSliceLd] = operand<O>(k * run);
          run *= alpha;
        }
      }
    } else {
      const float total = factor(kFromStart, C - 1);
      if (threadIdx.x < kWideSlice) decay[c0 + threadIdx.x] = total;
      for (int u = threadIdx.x; u < C * (kWideSlice / 8); u += kDeltaThreads) {
        const int i = u / (kWideSlice / 8), c = u % (kWideSlice / 8) * 8;
        float x[8] = {};
        if (i < chunk.rows) {
          read8(key(i), c0 + c, K, x);
          const float scale = factor(kKeyNorm, i) * factor(kToEnd, i);
#pragma unroll
          for (int n = 0; n < 8; ++n) x[n] *= scale;
        }
        store8_operands<O>(work + i * kWideSliceLd + c, x);
      }
    }
  }
};

// Asks for what the next chunk's loads will wait for, into the L2 cache: rows from token `first` on, and `floats` numbers
// from `intra` on.
__device__ __forceinline__ void prefetch_chunk(const DeltaInputs& p, const DeltaSequence& own, int64_t first,
                                               int64_t hv, int v0, int width, const float* intra, int64_t floats) {
  constexpr int kLine = 128;
  const int count = static_cast<int>(min(p.chunk, own.end - first));
  const auto rows = [&](const DeltaRows& x, int64_t head, int64_t from, int64_t numbers) {
    if (!x.p) return;
    const int bytes = x.dtype == DType::f32 ? 4 : 2;
    const int lines = static_cast<int>(numbers * bytes + kLine - 1) / kLine;
    for (int u = threadIdx.x; u < count * lines; u += kDeltaThreads) {
      const DeltaRow row = row_of(x, own.b, first + u / lines, head);
      ptx::prefetch_l2(static_cast<const uint8_t*>(row.p) + from * bytes + u % lines * kLine);
    }
  };
  rows(p.q, hv / (p.HV / p.H), 0, p.K);
  rows(p.k, hv / (p.HV / p.H), 0, p.K);
  rows(p.v, hv, v0, width);
  rows(p.write, hv, v0, width);
  rows(p.erase, hv, 0, p.K);
  if (p.vector_gate) rows(p.g, hv, 0, p.K);
  for (int64_t i = threadIdx.x * (kLine / 4); i < floats; i += kDeltaThreads * (kLine / 4)) ptx::prefetch_l2(intra + i);
}

// Grid (sequences, value heads, panels of V). With cu_seqlens there is a sequence more: the tokens that belong to none.
template <Operands O, bool PerChannel>
__global__ __launch_bounds__(kDeltaThreads, 2) void delta_scan_kernel(DeltaScan a, DeltaIntra intra) {
  KK_DYN_SMEM(float, smem);
  const DeltaInputs& p = a.in;
  const ScanLayout l(p.K, p.chunk);
  float *state = smem + l.state, *rows = smem + l.rows, *work = smem + l.work;
  const int C = static_cast<int>(p.chunk), K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const int64_t n = blockIdx.x, hv = blockIdx.y;
  const int v0 = blockIdx.z * kPanel, width = min(kPanel, V - v0);
  const bool exists = n < p.N;
  const DeltaSequence own = exists ? sequence_of(p, n) : DeltaSequence{0, p.cu_seqlens[p.N], p.T};

  const auto clear_checkpoints = [&](int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; ++slot)
      for (int i = threadIdx.x; i < K * width; i += kDeltaThreads)
        a.checkpoints[((slot * p.HV + hv) * K + i / width) * V + v0 + i % width] = 0.0f;
  };
  if (a.checkpoints && p.cu_seqlens) {
    const int64_t begun = own.begin / a.checkpoint_every, whole = (own.end - own.begin) / a.checkpoint_every;
    clear_checkpoints(begun + (exists ? whole : 0), own.end / a.checkpoint_every);
  }
  if (!exists) {
    for (int64_t t = own.begin; a.o && t < own.end; ++t)
      for (int c = threadIdx.x; c < width; c += kDeltaThreads)
        write_number(p.q.dtype, a.o, (t * p.HV + hv) * V + v0 + c, 0.0f);
    return;
  }

  // A warp's rows of S are 16 warp .. 16 warp + 15 of every 128; of the other products it has 16 rows and 16 columns.
  const int warp = threadIdx.x / 32, row_block = 16 * (warp % 4), column = 16 * (warp / 4);
  float s[kMaxDeltaDim / kWideSlice][1][kPanel / 8][4];
  const auto each_state = [&](float* global, auto f) {
#pragma unroll
    for (int m = 0; m < kMaxDeltaDim / kWideSlice; ++m)
      each(s[m], [&](int i, int j, float& x) {
        const int channel = kWideSlice * m + 16 * warp + i;
        f(channel, j, x, global + (channel * V + v0 + j), channel < K && j < width);
      });
  };
  const auto store_state = [&](float* global) {
    each_state(global, [](int, int, float x, float* to, bool inside) {
      if (inside) *to = x;
    });
  };
  const int64_t head_of_sequence = (n * p.HV + hv) * K * V;
  each_state(const_cast<float*>(p.initial_state) + (p.initial_state ? head_of_sequence : 0),
             [&](int, int, float& x, const float* from, bool inside) { x = p.initial_state && inside ? *from : 0.0f; });

  const int64_t first_slot = delta_slots(p, n, own.begin, C).begun;
  for (int64_t done = 0; done < own.end - own.begin; done += C) {
    const DeltaChunk chunk{own.b, own.begin + done, static_cast<int>(min(int64_t{C}, own.end - own.begin - done))};
    const int64_t slot = first_slot + done / C;
    const int used = (chunk.rows + 15) / 16 * 16;
    const bool active = row_block < used;
    if (a.states) store_state(a.states + (slot * p.HV + hv) * K * V);
    each_state(nullptr, [&](int channel, int j, float x, float*, bool) {
      if (channel < (K + 15) / 16 * 16) state[channel * kPanelLd + j] = operand<O>(x);
    });
    for (int i = threadIdx.x; i < kDeltaFactors * C; i += kDeltaThreads)
      smem[l.factors + i] = intra.factors(slot, hv)[i];
    const ChunkRows<O, PerChannel> in{p, chunk, hv, smem + l.factors, smem + l.totals, smem + l.decay};
    if (done + C < own.end - own.begin)
      prefetch_chunk(p, own, chunk.first + C, hv, v0, width, intra.inverse(slot + 1, hv), intra.size());
    float c[1][2][4] = {};
    if (active)
      each_pair(c, [&](int i, int j, float, float) {  // w; the same lane makes R of it
        i += row_block, j += column;
        float2 v = make_float2(0.0f, 0.0f);
        if (i < chunk.rows) {
          v = read2(row_of(p.v, chunk.b, chunk.first + i, hv), v0 + j, V);
          if (p.write.p) {
            const float2 factor = read2(row_of(p.write, chunk.b, chunk.first + i, hv), v0 + j, V);
            v.x *= factor.x, v.y *= factor.y;
          }
        }
        *reinterpret_cast<float2*>(rows + i * kPanelLd + j) = v;
      });
    __syncthreads();

    float x[2][2][4] = {};
    for (int c0 = 0; c0 < K; c0 += kSlice) {
      in.lookups(work, c0);
      __syncthreads();
      if (active)
        multiply_add<O>(x, Rows{work + 2 * row_block * kSliceLd, kSliceLd},
                        Rows{state + c0 * kPanelLd + column, kPanelLd}, min(kSlice, (K - c0 + 7) / 8 * 8));
      __syncthreads();
    }

    for (int i = 4 * threadIdx.x; i < C * C; i += 4 * kDeltaThreads) {
      float* to = work + i / C * kSliceLd + i % C;
      ptx::cp_async<16>(ptx::smem_u32(to), intra.inverse(slot, hv) + i);
      if (a.o) ptx::cp_async<16>(ptx::smem_u32(to + C * kSliceLd), intra.scores(slot, hv) + i);
    }
    ptx::cp_async_commit();
    if (active)
      each(x, [&](int i, int j, float& y) {
        const int row = row_block + i % 16;
        if (!PerChannel) y *= in.factor(kFromStart, row);
        float& r = rows[row * kPanelLd + column + j];
        if (i < 16) r = in.factor(kBeta, row) * (r - y);
      });
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (active)
      multiply_add<Operands::tf32x3>(c, Rows{work + row_block * kSliceLd, kSliceLd}, Rows{rows + column, kPanelLd},
                                     row_block + 16);
    __syncthreads();
    if (active)
      each(c, [&](int i, int j, float d) {
        i += row_block, j += column;
        rows[i * kPanelLd + j] = d;
        if (a.n && i < chunk.rows && j < width) a.n[((slot * p.HV + hv) * C + i) * V + v0 + j] = d;
      });
    __syncthreads();
    if (active && a.o) {
      float o[1][2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[0][j][i] = p.scale * x[1][j][i];
      multiply_add<Operands::tf32x3>(o, Rows{work + (C + row_block) * kSliceLd, kSliceLd},
                                     Rows{rows + column, kPanelLd}, row_block + 16);
      each_pair(o, [&](int i, int j, float y0, float y1) {
        i += row_block, j += column;
        if (i < chunk.rows && j < width)
          write2(p.q.dtype, a.o, ((chunk.b * p.T + chunk.first + i) * p.HV + hv) * V + v0 + j, y0, y1, j + 1 < width);
      });
    }
    __syncthreads();
    if (active) each(c, [&](int i, int j, float d) { rows[(row_block + i) * kPanelLd + column + j] = operand<O>(d); });

#pragma unroll
    for (int m = 0; m < kMaxDeltaDim / kWideSlice; ++m) {
      const int c0 = kWideSlice * m;
      if (c0 >= K) break;
      if (m > 0) __syncthreads();
      in.updates(work, c0);
      __syncthreads();
      if (c0 + 16 * warp < K) {
        each(s[m], [&](int i, int, float& y) { y *= smem[l.decay + c0 + 16 * warp + i]; });
        multiply_add<O>(s[m], Columns{work + 16 * warp, kWideSliceLd}, Rows{rows, kPanelLd}, used);
      }
    }
    if (a.checkpoints && (done + C) % a.checkpoint_every == 0 && chunk.rows == C) {
      const int64_t j = delta_slots(p, n, own.begin, a.checkpoint_every).whole + (done + C) / a.checkpoint_every - 1;
      store_state(a.checkpoints + (j * p.HV + hv) * K * V);
    }
    __syncthreads();
  }
  if (a.final_state) store_state(a.final_state + head_of_sequence);
}

}  // namespace

void delta_scan(const DeltaScan& p, const DeltaIntra& intra, const CudaExec& exec) {
  const DeltaInputs& in = p.in;
  const dim3 grid(static_cast<unsigned>(in.N + (in.cu_seqlens ? 1 : 0)), static_cast<unsigned>(in.HV),
                  static_cast<unsigned>((in.V + kPanel - 1) / kPanel));
  const size_t smem = ScanLayout(in.K, in.chunk).total * sizeof(float);
  const auto run = [&](auto kernel) { launch(kernel, grid, dim3(kDeltaThreads), smem, exec.stream, p, intra); };
  const bool per_channel = in.g.p && in.vector_gate;
  if (in.k.dtype == DType::f32)
    per_channel ? run(delta_scan_kernel<Operands::tf32x3, true>) : run(delta_scan_kernel<Operands::tf32x3, false>);
  else
    per_channel ? run(delta_scan_kernel<Operands::tf32, true>) : run(delta_scan_kernel<Operands::tf32, false>);
}

}  // namespace kk::cuda
