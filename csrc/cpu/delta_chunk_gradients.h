// What the backward pass does with a chunk of one value head: the state goes forwards through it, its gradient
// backwards, and from both come the gradients of the tokens. States lie transposed, [V][K]: so every product finds its
// right matrix as it is, but for matrices of a chunk's size. Rows [from, to) of states and columns [from, to) of V may
// be worked on apart: only gradients() sums over V.
#pragma once
#include "cpu/delta_ahead.h"
#include "cpu/delta_chunk.h"
#include "cpu/delta_gate_gradients.h"
#include "kvkernels/ops/delta_rule_backward.h"

KK_BEGIN

// Rows of K and of V are ld and ldv long.
struct DeltaBackwardSizes {
  int64_t C, K, V, ld, ldv, state;
  explicit DeltaBackwardSizes(const DeltaInputs& in)
      : C(in.chunk), K(in.K), V(in.V), ld(round_up(in.K, 16)), ldv(round_up(in.V, 16)), state(ldv * ld) {}
};

// x [K, V] of the caller, or null for zeros -> rows [from, to) of y [ldv][ld], zeros around it; and back.
inline void turn_in(const DeltaBackwardSizes& z, const float* x, int64_t from, int64_t to, float* y) {
  memset(y + from * z.ld, 0, static_cast<size_t>((to - from) * z.ld) * 4);
  if (!x) return;
  if (to > z.V) to = z.V;
  const int64_t K = round_down(z.K, 16), end = from + round_down(to - from, 16);
  transpose(K, end - from, x + from, z.V, y + from * z.ld, z.ld);
  for (int64_t c = 0; c < z.K; ++c)
    for (int64_t v = c < K ? end : from; v < to; ++v) y[v * z.ld + c] = x[c * z.V + v];
}
inline void turn_out(const DeltaBackwardSizes& z, const float* x, int64_t from, int64_t to, float* y) {
  if (to > z.V) to = z.V;
  const int64_t K = round_down(z.K, 16), end = from + round_down(to - from, 16);
  transpose(end - from, K, x + from * z.ld, z.ld, y + from, z.V);
  for (int64_t c = 0; c < z.K; ++c)
    for (int64_t v = c < K ? end : from; v < to; ++v) y[c * z.V + v] = x[v * z.ld + c];
}

// y = f x
inline void scaled_row(const float* x, float f, int64_t n, float* y) {
  const F by = F::fill(f);
  for (int64_t i = 0; i < n; i += F::W) (F::load(x + i) * by).store(y + i);
}
// y += f x
inline void add_row(const float* x, float f, int64_t n, float* y) {
  const F by = F::fill(f);
  for (int64_t i = 0; i < n; i += F::W) fma(by, F::load(x + i), F::load(y + i)).store(y + i);
}

class DeltaChunkGradients {
 public:
  DeltaChunkGradients(const DeltaRuleBackwardParams& p, Arena& arena)
      : p_(p),
        in_(p.in),
        z_(p.in),
        has_out_(p.in.q.p && p.d_out.p),
        no_q_(without_q(p.in)),
        state_keys_(no_q_, arena),
        keys_(p.in, arena),
        state_head_(no_q_, arena),
        head_(p.in, arena),
        gates_(p.in, arena) {
    const int64_t C = z_.C, ld = z_.ld, ldv = z_.ldv;
    dq_ = arena.take<float>(C * ld);
    dk_ = arena.take<float>(C * ld);
    rows_ = arena.take<float>(2 * C * ld);
    d_rows_ = arena.take<float>(2 * C * ld);
    d_keys_ = arena.take<float>(C * ld);
    turned_ = arena.take<float>(ldv * C);
    dL_ = arena.take<float>(C * C);
    dP_ = arena.take<float>(C * C);
    coefficient_ = arena.take<float>(C * C);
    v_ = arena.take<float>(ldv);
    write_ = arena.take<float>(ldv);
    q_scale_ = arena.take<float>(C);
    pairs_ = arena.take<float>(C);
    d_beta_ = arena.take<float>(C);
    dg_ = arena.take<float>(in_.vector_gate ? C * ld : C);
    whole_ = arena.take<float>(ld);
  }

  // ---- forwards: no queries

  void read_forwards(const DeltaSequence& s, int64_t at, int64_t key_head) { state_keys_.read(no_q_, s, at, key_head); }

  // N [C][ldv] of a chunk from the state S before it, and unless `next` is null the state after it; `next` may be S.
  void forwards(const DeltaSequence& s, int64_t at, int64_t head, int64_t from, int64_t to, const float* S, float* N,
                float* next) {
    const int64_t group = in_.HV / in_.H;
    const DeltaAhead ahead(no_q_, s, at + z_.C, at + z_.C, head, from, to, head % group, group, 4);
    ahead.take(0);
    state_head_.form(no_q_, state_keys_, s, at, head);
    ahead.take(1);
    solve(s, at, head, from, to, S, N);
    ahead.take(2);
    if (next) advance(from, to, S, N, next);
    ahead.take(3);
  }

  // ---- backwards

  void read(const DeltaSequence& s, int64_t at, int64_t key_head) {
    keys_.read(in_, s, at, key_head);
    memset(dk_, 0, static_cast<size_t>(z_.C * z_.ld) * 4);
    memset(dq_, 0, static_cast<size_t>(z_.C * z_.ld) * 4);
  }

  void form(const DeltaSequence& s, int64_t at, int64_t head) {
    head_.form(in_, keys_, s, at, head);
    const int64_t n = keys_.tokens, ld = z_.ld;
    for (int64_t i = 0; i < n; ++i) {
      scaled_row(head_.e + i * ld, head_.e_factor[i], ld, rows_ + i * ld);
      if (has_out_) scaled_row(head_.q + i * ld, head_.q_factor[i], ld, rows_ + (n + i) * ld);
      q_scale_[i] = has_out_ ? in_.scale * keys_.q_factor[i] : 0.0f;
    }
  }

  // From dS of the state after a chunk: `next` of the state before it, and the rows -dR and dO of its tokens, one after
  // the other in `rows` [2 C][ldv]. dR stands there with its sign turned because it has that sign in all sums it shares
  // with dO.
  void scan(const DeltaSequence& s, int64_t at, int64_t head, int64_t from, int64_t to, const float* dS, float* rows,
            float* next) {
    const int64_t C = z_.C, ld = z_.ld, ldv = z_.ldv, n = keys_.tokens, columns = to - from;
    float *dR = rows + from, *dO = rows + n * ldv + from;
    matmul(columns, n, z_.K, {dS + from * ld, ld, 1}, head_.keys_t, C, turned_, C);
    transpose(columns, round_up(n, 16), turned_, C, dR, ldv);
    for (int64_t i = 0; i < n; ++i) scale_row(dR + i * ldv, head_.tail[i], columns);
    if (has_out_) {
      for (int64_t i = 0; i < n; ++i) load_padded(p_.d_out, s, at + i, head, from, to, dO + i * ldv);
      triangle_matmul<Part::upper>(n, columns, {head_.p, 1, C}, dO, ldv, dR, ldv, Start::add);
    }
    triangle_solve<Part::solve_upper>(n, columns, {head_.minus_l, 1, C}, dR, ldv);
    for (int64_t i = 0; i < n; ++i) scale_row(dR + i * ldv, -1.0f, columns);

    for (int64_t v = from; v < to; ++v) row_times(dS + v * ld, head_.whole, ld, next + v * ld);
    const int64_t end = to < z_.V ? to : z_.V;
    matmul(end - from, ld, has_out_ ? 2 * n : n, {dR, 1, ldv}, rows_, ld, next + from * ld, ld, Start::add);
  }

  // All but dq and dk, which are summed over the value heads; from the states before the chunk, N, dS of the state
  // after it and the rows of scan().
  void gradients(const DeltaSequence& s, int64_t at, int64_t head, const float* S, const float* N, const float* dS,
                 const float* rows) {
    const int64_t C = z_.C, ld = z_.ld, ldv = z_.ldv, n = keys_.tokens;
    const float *dR = rows, *dO = rows + n * ldv;
    ask_for_chunk_before(s, at, head, 0);
    value_gradients(s, at, head, dR);
    ask_for_chunk_before(s, at, head, 1);

    transpose(round_up(n, 16), ldv, N, ldv, turned_, C);
    lower_blocks_matmul(n, z_.V, 16, {dR, ldv, 1}, turned_, C, dL_, C);
    clear_above(dL_, 0);
    if (has_out_) {
      lower_blocks_matmul(n, z_.V, 16, {dO, ldv, 1}, turned_, C, dP_, C);
      clear_above(dP_, 1);
    }
    float *de = d_rows_, *dq = has_out_ ? d_rows_ + n * ld : nullptr;
    ask_for_chunk_before(s, at, head, 2);
    matmul(has_out_ ? 2 * n : n, ld, z_.V, {rows, ldv, 1}, S, ld, d_rows_, ld);
    ask_for_chunk_before(s, at, head, 3);
    matmul(n, ld, z_.V, {N, ldv, 1}, dS, ld, d_keys_, ld);
    if (p_.dg) state_gate(S, dS);

    const float* e = head_.erased ? head_.erased : keys_.k;
    if (in_.vector_gate)
      gates_.run(keys_, head_, q_scale_, dL_, dP_, whole_, de, dq, d_keys_, dg_);
    else
      scalar_gate(e, de, dq);
    for (int64_t i = 0; i < n; ++i) {
      d_beta_[i] += dot(de + i * ld, e + i * ld, ld);
      key_gradients(s, at + i, head, i, de + i * ld);
      if (dq) add_row(dq + i * ld, in_.scale, ld, dq_ + i * ld);
    }
    write_gate_gradients(s, at, head);
  }

  // dq and dk, through l2norm y = f x, dx = f (dy - y (y . dy)), of q and k as they were given.
  void write_key_gradients(const DeltaSequence& s, int64_t at, int64_t key_head) {
    for (int64_t i = 0; i < keys_.tokens; ++i) {
      const int64_t row = ((s.batch * in_.T + at + i) * in_.H + key_head) * z_.K;
      if (p_.dk) {
        float* d = dk_ + i * z_.ld;
        if (in_.l2norm) {
          add_row(keys_.k + i * z_.ld, -dot(d, keys_.k + i * z_.ld, z_.ld), z_.ld, d);
          scale_row(d, keys_.k_factor[i], z_.ld);
        }
        store_row(in_.k.dtype, d, z_.K, p_.dk, row);
      }
      if (p_.dq) {
        float* d = dq_ + i * z_.ld;
        if (in_.l2norm) {
          const float f = keys_.q_factor[i];
          add_row(keys_.q + i * z_.ld, -f * f * dot(d, keys_.q + i * z_.ld, z_.ld), z_.ld, d);
          scale_row(d, f, z_.ld);
        }
        store_row(in_.q.dtype, d, z_.K, p_.dq, row);
      }
    }
  }

 private:
  const DeltaRuleBackwardParams& p_;
  const DeltaInputs& in_;
  DeltaBackwardSizes z_;
  bool has_out_;
  DeltaInputs no_q_;
  DeltaKeys state_keys_, keys_;
  DeltaHead state_head_, head_;
  DeltaGateGradients gates_;
  float *dq_, *dk_;          // [C][ld] of a key head
  float* rows_;              // [2 C][ld] e and q with all their factors; forwards: keys decayed to the end of the chunk
  float *d_rows_, *d_keys_;  // gradients of those
  float* turned_;            // [ldv][C] what is about to be transposed, or has been
  float *dL_, *dP_;          // [C][C] zero where there is no pair
  float* coefficient_;       // [C][C]
  float *v_, *write_;        // [ldv]
  float *q_scale_, *pairs_;  // [C]
  float *d_beta_, *dg_, *whole_;

  static DeltaInputs without_q(DeltaInputs in) {
    in.q.p = nullptr;
    return in;
  }

  // A fourth of the rows that the chunk before this one reads and writes.
  [[gnu::always_inline]] void ask_for_chunk_before(const DeltaSequence& s, int64_t at, int64_t head,
                                                   int64_t step) const {
    if (at - z_.C < s.begin) return;
    const auto ask = [&](const DeltaRows& x, int64_t h, int64_t n) __attribute__((always_inline)) {
      ask_for_rows(x, s.batch, at - z_.C + z_.C / 4 * step, z_.C / 4, h, 0, n);
    };
    const auto ask_for_result =
        [&](void* p, int64_t heads, int64_t h, int64_t n, DType type)
            __attribute__((always_inline)) { ask({p, in_.T * heads * n, heads * n, n, type}, h, n); };
    ask(in_.v, head, z_.V);
    ask(p_.d_out, head, z_.V);
    ask_for_result(p_.dv, in_.HV, head, z_.V, in_.v.dtype);
    if (in_.vector_gate) {
      ask(in_.g, head, z_.K);
      ask_for_result(p_.dg, in_.HV, head, z_.K, DType::f32);
    }
    const int64_t group = in_.HV / in_.H, key_head = head / group;
    if (head % group) return;
    ask(in_.q, key_head, z_.K);
    ask(in_.k, key_head, z_.K);
    ask_for_result(p_.dq, in_.H, key_head, z_.K, in_.q.dtype);
    ask_for_result(p_.dk, in_.H, key_head, z_.K, in_.k.dtype);
  }

  // Columns [from, to) of a row, zeros beyond V.
  void load_padded(const DeltaRows& x, const DeltaSequence& s, int64_t t, int64_t head, int64_t from, int64_t to,
                   float* row) const {
    for (int64_t i = z_.V - from; i < to - from; ++i) row[i] = 0.0f;
    load_columns(x, s.batch, t, head, from, to < z_.V ? to : z_.V, row);
  }

  // Columns [from, to) of v, times write where that is given; v itself is in v_.
  const float* value(const DeltaSequence& s, int64_t t, int64_t head, int64_t from, int64_t to) {
    load_padded(in_.v, s, t, head, from, to, v_);
    if (!in_.write.p) return v_;
    load_padded(in_.write, s, t, head, from, to, write_);
    row_times(v_, write_, to - from, write_);
    return write_;
  }

  // N = (I + L)^-1 (w - e_factor (e S))
  void solve(const DeltaSequence& s, int64_t at, int64_t head, int64_t from, int64_t to, const float* S, float* N) {
    const DeltaHead& h = state_head_;
    const int64_t C = z_.C, ldv = z_.ldv, n = state_keys_.tokens, rows = round_up(n, 16), columns = to - from;
    const float* e_t = state_keys_.k_t;
    if (h.e != state_keys_.k) {
      transpose(rows, z_.ld, h.e, z_.ld, rows_, C);
      e_t = rows_;
    }
    matmul(columns, n, z_.K, {S + from * z_.ld, z_.ld, 1}, e_t, C, turned_, C);
    transpose(columns, rows, turned_, C, N + from, ldv);
    for (int64_t i = 0; i < n; ++i) {
      const float* v = value(s, at + i, head, from, to);
      const F beta = F::fill(h.beta[i]), minus = F::fill(-h.e_factor[i]);
      float* x = N + i * ldv + from;
      for (int64_t c = 0; c < columns; c += F::W) fma(minus, F::load(x + c), beta * F::load(v + c)).store(x + c);
    }
    triangle_solve<Part::solve_lower>(n, columns, {h.minus_l, C, 1}, N + from, ldv);
  }

  // next = whole S + keys N
  void advance(int64_t from, int64_t to, const float* S, const float* N, float* next) {
    const DeltaHead& h = state_head_;
    const int64_t n = state_keys_.tokens, ld = z_.ld;
    if (in_.vector_gate)
      transpose(ld, round_up(n, 16), h.keys_t, z_.C, rows_, ld);
    else
      for (int64_t i = 0; i < n; ++i) scaled_row(state_keys_.k + i * ld, h.tail[i], ld, rows_ + i * ld);
    for (int64_t v = from; v < to; ++v) row_times(S + v * ld, h.whole, ld, next + v * ld);
    const int64_t end = to < z_.V ? to : z_.V;
    matmul(end - from, ld, n, {N + from, 1, z_.ldv}, rows_, ld, next + from * ld, ld, Start::add);
  }

  // dv, dwrite and their part of dbeta, from rows of -dR.
  void value_gradients(const DeltaSequence& s, int64_t at, int64_t head, const float* minus_dR) {
    for (int64_t i = 0; i < keys_.tokens; ++i) {
      const float *d = minus_dR + i * z_.ldv, *w = value(s, at + i, head, 0, z_.ldv);
      const float beta = head_.beta[i];
      const int64_t row = ((s.batch * in_.T + at + i) * in_.HV + head) * z_.V;
      d_beta_[i] = -dot(d, w, z_.ldv);
      alignas(64) float out[kMaxDeltaDim];
      if (p_.dwrite) {
        row_times(d, v_, z_.ldv, out);
        scale_row(out, -beta, z_.ldv);
        store_row(DType::f32, out, z_.V, p_.dwrite, row);
      }
      if (p_.dv) {
        scaled_row(d, -beta, z_.ldv, out);
        if (in_.write.p) {
          load_padded(in_.write, s, at + i, head, 0, z_.ldv, write_);
          row_times(out, write_, z_.ldv, out);
        }
        store_row(in_.v.dtype, out, z_.V, p_.dv, row);
      }
    }
  }

  // Zeros where j >= i (diagonal = 0) or j > i (1), up to the end of the block of 16 on the diagonal.
  void clear_above(float* x, int64_t diagonal) const {
    for (int64_t i = 0; i < keys_.tokens; ++i)
      for (int64_t j = i + diagonal; j < round_up(i + 1, 16); ++j) x[i * z_.C + j] = 0.0f;
  }

  // The product of all gates times its gradient, per channel.
  void state_gate(const float* S, const float* dS) {
    vector_tiles(z_.ld, [&](auto N, int64_t c) {
      constexpr int kN = N.value;
      F sum[kN];
      for (int j = 0; j < kN; ++j) sum[j] = F::zero();
      for (int64_t v = 0; v < z_.V; ++v)
        for (int j = 0; j < kN; ++j) {
          const int64_t i = v * z_.ld + c + j * F::W;
          sum[j] = fma(F::load(dS + i), F::load(S + i), sum[j]);
        }
      for (int j = 0; j < kN; ++j) {
        const int64_t i = c + j * F::W;
        (sum[j] * F::load(head_.whole + i)).store(whole_ + i);
      }
    });
  }

  // One gate per head: as DeltaGateGradients::run, decays being factors of rows and of L and P.
  void scalar_gate(const float* e, float* de, float* dq) {
    const int64_t C = z_.C, ld = z_.ld, n = keys_.tokens;
    if (p_.dg) gate_sums(de, dq);
    float* x = coefficient_;
    const auto times_decays = [&](const float* d) {
      for (int64_t i = 0; i < n; ++i) row_times(d + i * C, head_.decay + i * C, round_up(i + 1, 16), x + i * C);
    };
    const auto times_factors = [&](const float* f) {
      for (int64_t i = 0; i < n; ++i) scale_row(x + i * C, f[i], round_up(i + 1, 16));
    };
    for (int64_t i = 0; i < n; ++i) scale_row(d_keys_ + i * ld, head_.tail[i], ld);
    times_decays(dL_);
    triangle_matmul<Part::lower>(n, ld, {x, C, 1}, keys_.k, ld, de, ld, Start::scaled, head_.start);
    times_factors(head_.beta);
    triangle_matmul<Part::upper>(n, ld, {x, 1, C}, e, ld, d_keys_, ld, Start::add);
    if (!dq) return;
    times_decays(dP_);
    triangle_matmul<Part::lower>(n, ld, {x, C, 1}, keys_.k, ld, dq, ld, Start::scaled, head_.start);
    times_factors(q_scale_);
    triangle_matmul<Part::upper>(n, ld, {x, 1, C}, keys_.q, ld, d_keys_, ld, Start::add);
  }

  // dg of one gate per head: over the pairs of tokens i >= t > j, the rows i >= t that meet the state before the chunk,
  // the keys j < t that go to the state after it, and what the state itself is scaled by. Nothing is subtracted: a
  // strong gate's small gradient is not the difference of two large sums.
  void gate_sums(const float* de, const float* dq) {
    const int64_t C = z_.C, ld = z_.ld, n = keys_.tokens;
    F channels = F::zero();
    for (int64_t c = 0; c < ld; c += F::W) channels = channels + F::load(whole_ + c);
    const float state = channels.fold_sum();
    float suffix = 0.0f, prefix = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      dg_[i] = state + prefix;
      prefix += head_.tail[i] * dot(d_keys_ + i * ld, keys_.k + i * ld, ld);
    }
    memset(pairs_, 0, static_cast<size_t>(C) * 4);  // sums over rows i >= t
    for (int64_t t = n - 1; t >= 0; --t) {
      suffix += dot(de + t * ld, rows_ + t * ld, ld);
      if (dq) suffix += dot(dq + t * ld, rows_ + (n + t) * ld, ld);
      F sum = F::zero();
      for (int64_t j = 0; j < t; j += F::W) {
        F x = F::zero() - F::load(dL_ + t * C + j) * F::load(head_.minus_l + t * C + j);
        if (dq) x = fma(F::load(dP_ + t * C + j), F::load(head_.p + t * C + j), x);
        const int before = t - j < F::W ? static_cast<int>(t - j) : F::W;
        x = F::load(pairs_ + j) + first(before, x, F::zero());
        x.store(pairs_ + j);
        sum = sum + first(before, x, F::zero());
      }
      dg_[t] += suffix + sum.fold_sum();
    }
  }

  // From e = beta erase o k, and from beta's rule, to erase and k.
  void key_gradients(const DeltaSequence& s, int64_t t, int64_t head, int64_t i, float* de) {
    const float* k = keys_.k + i * z_.ld;
    const float beta = head_.beta[i];
    float* sum = dk_ + i * z_.ld;
    add_row(d_keys_ + i * z_.ld, 1.0f, z_.ld, sum);
    scale_row(de, beta, z_.ld);
    if (in_.erase.p) {
      alignas(64) float row[kMaxDeltaDim];
      if (p_.derase) {
        row_times(de, k, z_.ld, row);
        store_row(DType::f32, row, z_.K, p_.derase, ((s.batch * in_.T + t) * in_.HV + head) * z_.K);
      }
      load_padded_row(in_.erase, s.batch, t, head, z_.K, z_.ld, row);
      row_times(de, row, z_.ld, de);
    }
    add_row(de, 1.0f, z_.ld, sum);
    float& d = d_beta_[i];
    if (in_.rule == BetaRule::kaczmarz) {
      d /= keys_.k_square[i] + kKaczmarzEps;
      add_row(k, -2.0f * d * beta, z_.ld, sum);
    } else if (in_.rule == BetaRule::sigmoid) {
      d *= beta * (1.0f - beta);
    } else if (in_.rule == BetaRule::sigmoid2) {
      d *= beta * (1.0f - 0.5f * beta);
    }
  }

  void write_gate_gradients(const DeltaSequence& s, int64_t at, int64_t head) {
    for (int64_t i = 0; i < keys_.tokens; ++i) {
      const int64_t number = (s.batch * in_.T + at + i) * in_.HV + head;
      if (p_.dbeta) p_.dbeta[number] = d_beta_[i];
      if (p_.dg && in_.vector_gate)
        store_row(DType::f32, dg_ + i * z_.ld, z_.K, p_.dg, number * z_.K);
      else if (p_.dg)
        p_.dg[number] = dg_[i];
    }
  }
};

KK_END
