// One token after the other on a state: decode, and mode="recurrent". A block of columns of S is read once for both
// sums, x = (alpha o e)^T S and y = scale (alpha o q)^T S, and then changed, S <- alpha S + k d^T with d = w - x. The
// new state is not read again: o = y + scale (q . k) d.
#pragma once
#include "cpu/delta_rows.h"
#include "kvkernels/core/one_of.h"
#include "kvkernels/ops/delta_rule_step.h"

KK_BEGIN

// log(1 + u) for u in [0, 1], 2 ulp: 2 atanh(s) with s = u / (2 + u) <= 1/3, so that eight terms are enough.
inline F log1p_unit(F u) {
  const F s = u / (F::fill(2.0f) + u), z = s * s;
  F p = F::fill(1.0f / 15.0f);
  for (int n = 13; n > 1; n -= 2) p = fma(p, z, F::fill(1.0f / static_cast<float>(n)));
  const F twice = s + s;
  return fma(twice * z, p, twice);
}

// Gates of DeltaGate from x = g + dt_bias; rate = exp(A_log).
inline F gate_value(F x, float rate, float lower_bound) {
  if (lower_bound == 0.0f) {  // log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))
    const F softplus = max(x, F::zero()) + log1p_unit(exp_neg(F::zero() - abs(x)));
    return F::fill(-rate) * softplus;
  }
  // 1 / (1 + exp(-y)), or exp(y) / (1 + exp(y)) where y < 0
  const F y = x * F::fill(rate), z = exp_neg(F::zero() - abs(y)), one = F::fill(1.0f);
  return F::fill(lower_bound) * ((z + where_positive(y, one - z)) / (one + z));
}

// What a token does to some columns of a value head's state. Rows are padded to whole vectors.
struct DeltaToken {
  static constexpr int64_t kPad = kMaxDeltaDim + 16;
  alignas(64) float k[kPad], alpha[kPad];
  alignas(64) float forget_e[kPad], forget_q[kPad];  // alpha o e, scale * alpha o q
  alignas(64) float w[kPad];                         // of the columns
  float qk;                                          // scale * sum q k
};

// `gate` may be null: g is the gate.
inline void load_token(const DeltaInputs& p, const DeltaGate* gate, int64_t b, int64_t t, int64_t head, int64_t from,
                       int64_t to, DeltaToken& x) {
  const int64_t key_head = head / (p.HV / p.H), K = p.K;
  load_row(p.k, b, t, key_head, K, x.k);
  if (p.l2norm) l2norm(x.k, K);
  const float given = p.beta.p ? load_scalar(p.beta, b, t, head) : 1.0f;
  const float kk = p.rule == BetaRule::kaczmarz ? dot(x.k, x.k, K) : 0.0f;
  const F beta = F::fill(beta_value(p.rule, given, kk));

  float* g = x.alpha;
  if (p.vector_gate) {
    load_row(p.g, b, t, head, K, g);
  } else {
    F::fill(p.g.p ? load_scalar(p.g, b, t, head) : 0.0f).store(g);
  }
  const bool raw = gate && gate->A_log;
  const float rate = raw ? ::expf(gate->A_log[head]) : 0.0f;
  alignas(64) float bias[DeltaToken::kPad];
  if (raw && gate->dt_bias) {
    if (p.vector_gate)
      load_row<DType::f32>(reinterpret_cast<const uint8_t*>(gate->dt_bias + head * K), K, bias);
    else
      F::fill(gate->dt_bias[head]).store(bias);
  }
  const auto alpha = [&](int64_t i) {
    F y = F::load(g + i);
    if (raw) y = gate_value(gate->dt_bias ? y + F::load(bias + i) : y, rate, gate->lower_bound);
    return exp_gate(y);
  };
  if (p.vector_gate) {
    for (int64_t i = 0; i < K; i += F::W) alpha(i).store(x.alpha + i);
  } else {
    const F a = p.g.p ? alpha(0) : F::fill(1.0f);
    for (int64_t i = 0; i < K; i += F::W) a.store(x.alpha + i);
  }

  if (p.erase.p)
    load_row(p.erase, b, t, head, K, x.forget_e);
  else
    for (int64_t i = 0; i < K; i += F::W) F::fill(1.0f).store(x.forget_e + i);
  for (int64_t i = 0; i < K; i += F::W) {
    const F e = beta * F::load(x.forget_e + i) * F::load(x.k + i);
    (e * F::load(x.alpha + i)).store(x.forget_e + i);
  }

  x.qk = 0.0f;
  if (p.q.p) {
    load_row(p.q, b, t, key_head, K, x.forget_q);
    if (p.l2norm) l2norm(x.forget_q, K);
    scale_row(x.forget_q, p.scale, K);
    x.qk = dot(x.forget_q, x.k, K);
  }
  for (int64_t i = 0; i < K; i += F::W)
    (p.q.p ? F::load(x.forget_q + i) * F::load(x.alpha + i) : F::zero()).store(x.forget_q + i);

  load_columns(p.v, b, t, head, from, to, x.w);
  if (p.write.p) {
    alignas(64) float write[DeltaToken::kPad];
    load_columns(p.write, b, t, head, from, to, write);
    for (int64_t i = 0; i < to - from; i += F::W) (F::load(x.w + i) * F::load(write + i)).store(x.w + i);
  }
  for (int64_t i = 0; i < to - from; i += F::W) (F::load(x.w + i) * beta).store(x.w + i);
}

// A vector of a bf16 state is rounded by the instruction made for it where there is one: twelve others do the same.
// (NaN keeps its payload; denormals are zeros already.)
template <DType S, bool CONVERT>
KK_INLINE void store_state(F x, uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (CONVERT) {
    __m256i y;
    asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x.v));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), y);
  }
#endif
  store<S>(x, p);
}

// 2W columns of a row of the state in two vectors. Those of a bf16 state are the even and the odd ones: a word holds one of
// each, and to tell them apart, and to put them together, takes half the instructions.
template <DType S, bool CONVERT>
struct StatePair {
#if defined(__AVX512F__)
  static constexpr bool kSplit = CONVERT;
#else
  static constexpr bool kSplit = false;
#endif
  KK_INLINE static void load(const uint8_t* p, F& a, F& b) {
    if constexpr (kSplit) return load_split<S>(p, a, b);
    a = kk::load<S>(p), b = kk::load<S>(p + F::W * kElementBytes<S>);
  }
  KK_INLINE static void store(F a, F b, uint8_t* p) {
#if defined(__AVX512F__)
    if constexpr (kSplit) {
      alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      __m512i x;  // the even ones, then the odd ones
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(x) : "v"(b.v), "v"(a.v));
      return _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x));
    }
#endif
    store_state<S, CONVERT>(a, p), store_state<S, CONVERT>(b, p + F::W * kElementBytes<S>);
  }
  // Between the order of the two vectors and that of the columns.
  KK_INLINE static void from_columns(F& a, F& b) {
    if constexpr (kSplit) deinterleave(a, b);
  }
  KK_INLINE static void to_columns([[maybe_unused]] F& a, [[maybe_unused]] F& b) {
#if defined(__AVX512F__)
    if constexpr (kSplit) {
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const F first = _mm512_permutex2var_ps(a.v, low, b.v);
      b = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b.v);
      a = first;
    }
#endif
  }
};

// Lines [from, to) of a row of the block that comes next. Only bf16 states gain: 20 % where they come from memory, for 4 %
// where they are in L2. Of fp32 rows the processor finds as many as it can wait for by itself, and it costs 15 to 30 % where
// they lie in L3.
template <DType S>
[[gnu::always_inline]] inline void ask_for_state(const uint8_t* row, int64_t from, int64_t to) {
  if constexpr (S != DType::f32) {
    if (!row) return;
    for (int64_t byte = from; byte < to; byte += 64) __builtin_prefetch(row + byte, 0, 3);
  }
}

// N vectors of columns, an even number or one, which may have only `last` columns (PART). S is read at src and written at
// dst (null: nowhere), which may be the same. w becomes o. `ahead`, rows as at src, is read next (null: not known).
template <DType S, bool CONVERT, int N, bool PART>
inline void token_block(const DeltaToken& x, int64_t K, const uint8_t* src, int64_t src_row, uint8_t* dst,
                        int64_t dst_row, int64_t last, float* w, const uint8_t* ahead) {
  static_assert(N % 2 == 0 || N == 1);
  static_assert(N == 1 || !PART);
  using Pair = StatePair<S, CONVERT>;
  constexpr int64_t step = F::W * kElementBytes<S>;
  const auto ask = [&](int64_t c, int64_t half) __attribute__((always_inline)) {
    ask_for_state<S>(ahead ? ahead + c * src_row : nullptr, half * N * step / 2, (half + 1) * N * step / 2);
  };
  const auto read_one = [&](const uint8_t* row)
                            __attribute__((always_inline)) { return PART ? load_part<S>(row, last) : load<S>(row); };
  F d[N], o[N];
  each<N>([&](auto i) {
    const int j = static_cast<int>(i);
    d[j] = F::zero(), o[j] = F::zero();
  });
  for (int64_t c = 0; c < K; ++c) {
    const F e = F::fill(x.forget_e[c]), q = F::fill(x.forget_q[c]);
    const uint8_t* row = src + c * src_row;
    ask(c, 0);
    each<N / 2>([&](auto i) {
      const int j = 2 * static_cast<int>(i);
      F a, b;
      Pair::load(row + j * step, a, b);
      d[j] = fma(e, a, d[j]), d[j + 1] = fma(e, b, d[j + 1]);
      o[j] = fma(q, a, o[j]), o[j + 1] = fma(q, b, o[j + 1]);
    });
    if constexpr (N == 1) {
      const F a = read_one(row);
      d[0] = fma(e, a, d[0]), o[0] = fma(q, a, o[0]);
    }
  }
  const F qk = F::fill(x.qk);
  each<N / 2>([&](auto i) {
    const int j = 2 * static_cast<int>(i);
    F a = F::load(w + j * F::W), b = F::load(w + (j + 1) * F::W);
    Pair::from_columns(a, b);
    d[j] = a - d[j], d[j + 1] = b - d[j + 1];
    a = fma(qk, d[j], o[j]), b = fma(qk, d[j + 1], o[j + 1]);
    Pair::to_columns(a, b);
    a.store(w + j * F::W), b.store(w + (j + 1) * F::W);
  });
  if constexpr (N == 1) {
    d[0] = F::load(w) - d[0];
    fma(qk, d[0], o[0]).store(w);
  }
  if (!dst) return;
  for (int64_t c = 0; c < K; ++c) {
    const F alpha = F::fill(x.alpha[c]), k = F::fill(x.k[c]);
    const uint8_t* row = src + c * src_row;
    uint8_t* to = dst + c * dst_row;
    ask(c, 1);
    each<N / 2>([&](auto i) {
      const int j = 2 * static_cast<int>(i);
      F a, b;
      Pair::load(row + j * step, a, b);
      Pair::store(fma(k, d[j], alpha * a), fma(k, d[j + 1], alpha * b), to + j * step);
    });
    if constexpr (N == 1) {
      const F s = fma(k, d[0], alpha * read_one(row));
      if constexpr (PART)
        store_part<S>(s, to, last);
      else
        store_state<S, CONVERT>(s, to);
    }
  }
}

// `n` columns. `ahead`: those that are read after them, of rows src_row apart.
template <DType S, bool CONVERT>
inline void token_columns(const DeltaToken& x, int64_t K, const uint8_t* src, int64_t src_row, uint8_t* dst,
                          int64_t dst_row, int64_t n, float* w, const uint8_t* ahead) {
  int64_t i = 0;
  const auto blocks = [&](auto N, auto part) {
    constexpr int kN = N.value;
    const int64_t columns = part.value ? n - i : kN * F::W, at = i * kElementBytes<S>;
    const uint8_t* next = i + columns < n ? src + at + columns * kElementBytes<S> : ahead;
    token_block<S, CONVERT, kN, part.value>(x, K, src + at, src_row, dst ? dst + at : nullptr, dst_row, columns, w + i,
                                            next);
    i += columns;
  };
  constexpr int kMost = F::W == 16 ? 8 : 4;  // two sums of each vector stay in registers
  const auto whole = [&](auto N) {
    while (n - i >= N.value * F::W) blocks(N, Int<0>{});
  };
  whole(Int<kMost>{});
  whole(Int<kMost / 2>{});
  whole(Int<1>{});
  if (i < n) blocks(Int<1>{}, Int<1>{});
}

// Tokens [begin, end) of batch row b on columns [from, to) of the fp32 state of one value head, S [K, lds] from column
// `from` on. o as in DeltaRuleParams, or null.
inline void delta_tokens(const DeltaInputs& p, int64_t b, int64_t begin, int64_t end, int64_t head, int64_t from,
                         int64_t to, float* S, int64_t lds, void* o) {
  DeltaToken x;
  uint8_t* state = reinterpret_cast<uint8_t*>(S);
  for (int64_t t = begin; t < end; ++t) {
    load_token(p, nullptr, b, t, head, from, to, x);
    token_columns<DType::f32, false>(x, p.K, state, lds * 4, state, lds * 4, to - from, x.w, nullptr);
    if (o) store_row(p.q.dtype, x.w, to - from, o, ((b * p.T + t) * p.HV + head) * p.V + from);
  }
}

KK_END
