// The state is serial in the chunks of a sequence, and its columns do not know of each other: a block takes a value head
// of a sequence and 32 columns, and goes through the chunks. What does not depend on the state was made before, for all
// chunks at once (delta_intra.cuh).
//
//   X = [k^; q^] S      R = w - X_k      N = T R      o = scale X_q + P N      S <- diag(a_C) S + k-^T N
//
// S [K][32] lies in registers, as sums of the last product; a copy rounded to operands lies in shared memory. Everything
// else passes through shared memory in pieces of 64 channels (X), or 128 (the last product):
//   state   [K][40]      work  X: [k^ rows 0-15, q^ rows 0-15, k^ rows 16-31, ...][68]    T, P: [C][68] each    k-: [C][136]
//   rows    [C][40]  R, then N
// The sums of T R and P N cancel where keys are alike: these two take the three products of tf32x3 for any input. With
// T, P and N rounded to tf32 the error of o is four times as large on positive fp16 keys (2e-3 instead of 5e-4).
// A token costs 6 K V + C (V + ...) multiply-adds in matrix instructions: at 8 of them to 12 words read of shared memory,
// that is what bounds the kernel, if there are enough heads to fill the GPU.
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

  // Channels from c0 on of [k^; q^] (k with erase; with one gate per head without a_i), 16 rows of the one and of the
  // other in turn.
  __device__ __forceinline__ void lookups(float* work, int c0) const {
    const int K = static_cast<int>(p.K), C = static_cast<int>(p.chunk);
    if constexpr (PerChannel) {
      const int block = threadIdx.x / kSlice, c = threadIdx.x % kSlice, channel = c0 + c;
      float alpha[16], run = 1.0f;
      channel_gates(p, chunk, hv, channel, 16 * block, alpha);
#pragma unroll
      for (int r = 0; r < 16; ++r) run *= alpha[r];
      totals[threadIdx.x] = run;
      __syncthreads();
      run = 1.0f;
      for (int b = 0; b < block; ++b) run *= totals[b * kSlice + c];
      if (16 * block >= C) return;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        const int i = 16 * block + r;
        const bool exists = i < chunk.rows && channel < K;
        run *= alpha[r];
        float k = exists ? key(i)[channel] * factor(kKeyNorm, i) : 0.0f;
        if (exists && p.erase.p) k *= erase(i)[channel];
        const float q = exists && p.q.p ? query(i)[channel] * factor(kQueryNorm, i) : 0.0f;
        work[(32 * block + r) * kSliceLd + c] = operand<O>(k * run);
        work[(32 * block + 16 + r) * kSliceLd + c] = operand<O>(q * run);
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
        float alpha[16], run = 1.0f;
        channel_gates(p, chunk, hv, channel, 16 * block, alpha);
#pragma unroll
        for (int r = 0; r < 16; ++r) run *= alpha[r];
        __syncthreads();
        totals[threadIdx.x] = run;
        __syncthreads();
        if (block == 0)
          decay[c0 + part + c] = totals[c] * totals[kSlice + c] * totals[2 * kSlice + c] * totals[3 * kSlice + c];
        run = 1.0f;
        for (int b = 3; b > block; --b) run *= totals[b * kSlice + c];
        if (16 * block >= C) continue;
#pragma unroll
        for (int r = 15; r >= 0; --r) {
          const int i = 16 * block + r;
          const bool exists = i < chunk.rows && channel < K;
          const float k = exists ? key(i)[channel] * factor(kKeyNorm, i) : 0.0f;
          work[i * kWideSliceLd + part + c] = operand<O>(k * run);
          run *= alpha[r];
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

// Grid (sequences, value heads, panels of V). With cu_seqlens there is a sequence more: the tokens that belong to none.
template <Operands O, bool PerChannel>
__global__ __launch_bounds__(kDeltaThreads) void delta_scan_kernel(DeltaScan a, DeltaIntra intra) {
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
        f(channel, j, x, global + static_cast<int64_t>(channel) * V + v0 + j, channel < K && j < width);
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
    __syncthreads();
    const ChunkRows<O, PerChannel> in{p, chunk, hv, smem + l.factors, smem + l.totals, smem + l.decay};

    float x[2][2][4] = {};
    for (int c0 = 0; c0 < K; c0 += kSlice) {
      in.lookups(work, c0);
      __syncthreads();
      if (active)
        multiply_add<O>(x, Rows{work + 2 * row_block * kSliceLd, kSliceLd},
                        Rows{state + c0 * kPanelLd + column, kPanelLd}, min(kSlice, (K - c0 + 7) / 8 * 8));
      __syncthreads();
    }

    for (int i = threadIdx.x; i < C * C; i += kDeltaThreads) {
      const int at = i / C * kSliceLd + i % C;
      work[at] = intra.inverse(slot, hv)[i];
      if (a.o) work[C * kSliceLd + at] = intra.scores(slot, hv)[i];
    }
    float c[1][2][4] = {};
    if (active) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[0][j][i] = x[0][j][i];
      each(c, [&](int i, int j, float& x_k) {
        i += row_block, j += column;
        float r = 0.0f;
        if (i < chunk.rows && j < width) {
          const int64_t token = chunk.first + i;
          float w = row_of(p.v, chunk.b, token, hv)[v0 + j];
          if (p.write.p) w *= row_of(p.write, chunk.b, token, hv)[v0 + j];
          r = in.factor(kBeta, i) * (w - (PerChannel ? x_k : in.factor(kFromStart, i) * x_k));
        }
        rows[i * kPanelLd + j] = r;
        x_k = 0.0f;
      });
    }
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
        for (int i = 0; i < 4; ++i) o[0][j][i] = x[1][j][i];
      each(o, [&](int i, int, float& x_q) {
        x_q *= PerChannel ? p.scale : p.scale * in.factor(kFromStart, row_block + i);
      });
      multiply_add<Operands::tf32x3>(o, Rows{work + (C + row_block) * kSliceLd, kSliceLd},
                                     Rows{rows + column, kPanelLd}, row_block + 16);
      each(o, [&](int i, int j, float y) {
        i += row_block, j += column;
        if (i < chunk.rows && j < width)
          write_number(p.q.dtype, a.o, ((chunk.b * p.T + chunk.first + i) * p.HV + hv) * V + v0 + j, y);
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
