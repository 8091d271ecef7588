// The delta rule token by token: delta_rule_step and mode="recurrent".
//
// A block has 32 columns of a value head's state, in registers for as long as there are tokens: thread 8 r + c of 128 has
// columns 4 c ... 4 c + 3 of rows r, r + 16, r + 32 ... Both products of a token with the state are sums over rows,
//   x = (alpha o S)^T e      y = (alpha o S)^T q      then  d = w - x,  S = alpha o S + k d^T,  o = scale (y + (k.q) d)
// so that a token costs one pass for the sums, one barrier and one pass for the new state. What a token brings is made
// ready during the pass of the one before: with three buffers for it, and two for the sums, that barrier is the only one.
// A state is read once and written once, whatever the number of tokens.
#pragma once
#include "cuda/delta_rows.cuh"
#include "kvkernels/ops/delta_rule_step.h"

namespace kk::cuda {

constexpr int kTokenThreads = 128, kTokenWarps = kTokenThreads / 32;
constexpr int kTokenColumns = 32, kTokenRowGroups = kTokenThreads / 8;

struct DeltaTokenArgs {
  DeltaInputs in;
  DeltaGate gate;
  void* o;
  DType state_dtype;
  bool vector;  // four columns of a state can be read at once
};

namespace {

struct TokenBuffer {
  float4 rows[kMaxDeltaDim];  // alpha, e, q, k
  float w[kTokenColumns];
};

__device__ __forceinline__ float log_decay(const DeltaGate& gate, int64_t hv, int64_t bias, float g) {
  if (!gate.A_log) return g;
  const float x = gate.dt_bias ? g + gate.dt_bias[bias] : g, rate = expf(gate.A_log[hv]);
  if (gate.lower_bound < 0.0f) return gate.lower_bound * sigmoid(rate * x);
  return -rate * (x > 20.0f ? x : log1pf(expf(x)));
}

// A token as it is in memory. All warps read all of q and k, for sums over channels without a barrier; of what is only
// stored for the block, warp w has channels 32 w ... 32 w + 31 of every 128.
template <int R>
struct TokenReads {
  static constexpr int kChannels = R * kTokenRowGroups / 32, kOwn = kChannels / kTokenWarps;

  float q[kChannels], k[kChannels], g[kOwn], erase[kOwn];
  float beta, w;

  __device__ __forceinline__ void read(const DeltaInputs& p, int64_t b, int64_t t, int64_t hv, int64_t column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.K);
    const int64_t h = hv / (p.HV / p.H);
    const DeltaRow keys = row_of(p.k, b, t, h), queries = row_of(p.q, b, t, h);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int c = lane + 32 * i;
      k[i] = c < K ? keys[c] : 0.0f;
      q[i] = c < K && p.q.p ? queries[c] : 0.0f;
    }
    const DeltaRow gates = row_of(p.g, b, t, hv), erases = row_of(p.erase, b, t, hv);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = lane + 32 * (warp + kTokenWarps * i);
      g[i] = p.g.p && c < K ? gates[p.vector_gate ? c : 0] : 0.0f;
      erase[i] = p.erase.p && c < K ? erases[c] : 1.0f;
    }
    beta = p.beta.p ? row_of(p.beta, b, t, hv)[0] : 1.0f;
    if (warp == 0) {
      w = column + lane < p.V ? row_of(p.v, b, t, hv)[column + lane] : 0.0f;
      if (p.write.p && column + lane < p.V) w *= row_of(p.write, b, t, hv)[column + lane];
    }
  }

  // Returns k.q.
  __device__ __forceinline__ float put(const DeltaTokenArgs& a, int64_t hv, TokenBuffer& to) {
    const DeltaInputs& p = a.in;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.K);
    if (p.l2norm) {
      float kk = 0.0f, qq = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) kk = fmaf(k[i], k[i], kk), qq = fmaf(q[i], q[i], qq);
      const float k_factor = l2norm_factor(sum_of_warp(kk)), q_factor = l2norm_factor(sum_of_warp(qq));
#pragma unroll
      for (int i = 0; i < kChannels; ++i) k[i] *= k_factor, q[i] *= q_factor;
    }
    float kk = 0.0f, kq = 0.0f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) kk = fmaf(k[i], k[i], kk), kq = fmaf(k[i], q[i], kq);
    const float b = beta_value(p.rule, beta, p.rule == BetaRule::kaczmarz ? sum_of_warp(kk) : 0.0f);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int c = lane + 32 * i, own = i / kTokenWarps;
      if (i % kTokenWarps != warp || c >= K) continue;
      const float alpha = p.g.p ? expf(log_decay(a.gate, hv, p.vector_gate ? hv * K + c : hv, g[own])) : 1.0f;
      to.rows[c] = make_float4(alpha, b * erase[own] * k[i], q[i], k[i]);
    }
    if (warp == 0) to.w[lane] = b * w;
    return sum_of_warp(kq);
  }
};

// The thread's part of a state.
template <int R>
struct TokenState {
  float s[R][4];

  static __device__ __forceinline__ int row(int r) { return static_cast<int>(threadIdx.x) / 8 + kTokenRowGroups * r; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[r][i] = 0.0f;
  }

  // `head`: [K, V], of which the thread has columns `column` ... column + 3.
  __device__ __forceinline__ void read(const DeltaTokenArgs& a, const void* head, int column) {
    const int K = static_cast<int>(a.in.K), V = static_cast<int>(a.in.V);
    clear();
    if (column >= V) return;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row(r) >= K) continue;
      const int at = row(r) * V + column;
      if (!a.vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (column + i < V) s[r][i] = read_number(a.state_dtype, head, at + i);
      } else if (a.state_dtype == DType::f32) {
        const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(head) + at);
        s[r][0] = x.x, s[r][1] = x.y, s[r][2] = x.z, s[r][3] = x.w;
      } else {
        const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(head) + at);
        s[r][0] = bits_float(x.x << 16), s[r][1] = bits_float(x.x & 0xffff0000u);
        s[r][2] = bits_float(x.y << 16), s[r][3] = bits_float(x.y & 0xffff0000u);
      }
    }
  }

  __device__ __forceinline__ void write(const DeltaTokenArgs& a, void* head, int column) const {
    const int K = static_cast<int>(a.in.K), V = static_cast<int>(a.in.V);
    if (column >= V) return;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row(r) >= K) continue;
      const int at = row(r) * V + column;
      if (!a.vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (column + i < V) write_number(a.state_dtype, head, at + i, s[r][i]);
      } else if (a.state_dtype == DType::f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(head) + at) = make_float4(s[r][0], s[r][1], s[r][2], s[r][3]);
      } else {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = float_bits(s[r][i]) >> 16;  // rounded after the token
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(head) + at) = make_uint2(x[0] | x[1] << 16, x[2] | x[3] << 16);
      }
    }
  }

  // alpha o S is left; x and y are the sums of the rows of a warp.
  __device__ __forceinline__ void look_up(int K, const TokenBuffer& token, float (&x)[4], float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = y[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row(r) >= K) continue;
      const float4 t = token.rows[row(r)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[r][i] *= t.x;
        x[i] = fmaf(t.y, s[r][i], x[i]);
        y[i] = fmaf(t.z, s[r][i], y[i]);
      }
    }
#pragma unroll
    for (int h = 8; h < 32; h *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] += __shfl_xor_sync(0xffffffffu, x[i], h);
        y[i] += __shfl_xor_sync(0xffffffffu, y[i], h);
      }
  }

  __device__ __forceinline__ void add(int K, bool bf16, const TokenBuffer& token, const float (&d)[4]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row(r) >= K) continue;
      const float k = token.rows[row(r)].w;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[r][i] = fmaf(k, d[i], s[r][i]);
        if (bf16) s[r][i] = bf16_to_float(float_to_bf16(s[r][i]));
      }
    }
  }
};

// States: which sequence a block has, and where states come from and go to. R: rows of a thread, K <= 16 R.
template <int R, typename States>
__global__ __launch_bounds__(kTokenThreads,
                             R == 8 ? 4 : 2) void delta_token_kernel(__grid_constant__ const DeltaTokenArgs a,
                                                                     __grid_constant__ const States states) {
  KK_SHARED(TokenBuffer, tokens, [3]);
  KK_SHARED(float4, sums, [2][kTokenWarps][2][8]);  // x and y
  const DeltaInputs& p = a.in;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), panels = (V + kTokenColumns - 1) / kTokenColumns;
  const int64_t n = blockIdx.x / panels / p.HV, hv = blockIdx.x / panels % p.HV;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = static_cast<int>(blockIdx.x % panels) * kTokenColumns, column = first + lane % 8 * 4;

  const auto put_out = [&](int64_t b, int64_t t, const float (&o)[4]) {
    if (!a.o || threadIdx.x >= 8) return;
    const int64_t at = ((b * p.T + t) * p.HV + hv) * V + column;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < V) write_number(p.q.dtype, a.o, at + i, o[i]);
  };

  TokenState<R> state;
  const DeltaSequence own = states.sequence(a, n);
  if (!states.exists(a, n)) {
    for (int64_t t = own.begin; t < own.end; ++t) put_out(own.b, t, {0.0f, 0.0f, 0.0f, 0.0f});
    state.clear();
    states.without_tokens(a, own, hv, state, column);
    return;
  }
  if (const void* from = states.initial(a, n, hv))
    state.read(a, from, column);
  else
    state.clear();

  TokenReads<R> reads;
  float kq = 0.0f;
  if (own.begin < own.end) {
    reads.read(p, own.b, own.begin, hv, first);
    kq = reads.put(a, hv, tokens[0]);
  }
  __syncthreads();
  for (int64_t t = own.begin; t < own.end; ++t) {
    const int at = static_cast<int>((t - own.begin) % 3), part = static_cast<int>((t - own.begin) % 2);
    const bool more = t + 1 < own.end;
    if (more) reads.read(p, own.b, t + 1, hv, first);
    if (const void* from = states.parent(a, n, hv, t)) state.read(a, from, column);

    float x[4], y[4];
    state.look_up(K, tokens[at], x, y);
    if (lane < 8) {
      sums[part][warp][0][lane] = make_float4(x[0], x[1], x[2], x[3]);
      sums[part][warp][1][lane] = make_float4(y[0], y[1], y[2], y[3]);
    }
    const float now = kq;
    if (more) kq = reads.put(a, hv, tokens[(at + 1) % 3]);
    __syncthreads();

    float d[4], o[4];
    const float4 w = *reinterpret_cast<const float4*>(&tokens[at].w[lane % 8 * 4]);
    const auto total = [&](int which, float (&to)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < kTokenWarps; ++i) {
        const float4 s = sums[part][i][which][lane % 8];
        to[0] += s.x, to[1] += s.y, to[2] += s.z, to[3] += s.w;
      }
    };
    total(0, d);
    d[0] = w.x - d[0], d[1] = w.y - d[1], d[2] = w.z - d[2], d[3] = w.w - d[3];
    if (threadIdx.x < 8) {
      total(1, o);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] = p.scale * fmaf(now, d[i], o[i]);
      put_out(own.b, t, o);
    }
    state.add(K, a.state_dtype == DType::bf16, tokens[at], d);
    states.after_token(a, n, hv, own, t, state, column);
  }
  states.after_last(a, n, hv, own, state, column);
}

// `sequences` of States, with whatever else it counts as one.
template <typename States>
void launch_delta_tokens(const char* op, const DeltaTokenArgs& a, const States& states, int64_t sequences,
                         const CudaExec& exec) {
  const int64_t panels = (a.in.V + kTokenColumns - 1) / kTokenColumns, blocks = sequences * a.in.HV * panels;
  if (blocks >> 31) fail((std::string(op) + ": too many states for one launch on CUDA").c_str());
  if (blocks == 0) return;
  const auto run = [&](auto rows) {
    constexpr int R = static_cast<int>(rows);
    launch(delta_token_kernel<R, States>, dim3(static_cast<unsigned>(blocks)), dim3(kTokenThreads), 0, exec.stream, a,
           states);
  };
  a.in.K <= 8 * kTokenRowGroups ? run(Int<8>{}) : run(Int<16>{});
}

}  // namespace
}  // namespace kk::cuda
