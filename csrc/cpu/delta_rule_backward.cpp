// One task: a sequence and a key head, whose dq and dk are sums over its value
// heads in their order. A sequence is taken in segments from the last to the
// first. A segment goes forward once more, keeping the state before every chunk
// and N of all tokens, and then back through its chunks. States lie transposed
// here, [V][K]: so all products find their right matrix as it is but for
// matrices of a chunk's size.
#include "kvkernels/ops/delta_rule_backward.h"

#include "cpu/delta_chunk.h"
#include "cpu/delta_gate_gradients.h"
#include "cpu/entry.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

namespace {

constexpr int64_t kSegment = 512;  // most tokens whose states before every chunk are kept

struct Sizes {
  int64_t C, K, V, ld, ldv, group,
      state;                  // rows of K and of V are ld and ldv long; state = ldv * ld
  int64_t chunks, stretches;  // most in a segment; most segments from one
                              // checkpoint to the next
  explicit Sizes(const DeltaRuleBackwardParams& p)
      : C(p.in.chunk),
        K(p.in.K),
        V(p.in.V),
        ld(round_up(p.in.K, 16)),
        ldv(round_up(p.in.V, 16)),
        group(p.in.HV / p.in.H),
        state(ldv * ld) {
    const int64_t apart = p.checkpoints && p.checkpoint_every < p.in.T ? p.checkpoint_every : p.in.T;
    stretches = (apart + kSegment - 1) / kSegment;
    chunks = ((apart < kSegment ? apart : kSegment) + C - 1) / C;
  }
};

DeltaInputs without_q(DeltaInputs in) {
  in.q.p = nullptr;
  return in;
}

// What one thread works with.
struct Room {
  DeltaInputs no_q;  // what the way forwards needs
  DeltaKeys state_keys, keys;
  DeltaHead state_head, head;
  DeltaGateGradients gates;
  float* starts;       // [stretches][group][ldv][ld] states where segments start
  float* states;       // [chunks][group][ldv][ld] states where chunks start
  float* N;            // [chunks][group][C][ldv]
  float* d_state;      // [group][ldv][ld]
  float *dq, *dk;      // [C][ld] of a key head
  float* tokens;       // [2 C][ldv] -dR, dO
  float* rows;         // [2 C][ld] e^ and q^; keys times their decays to the end of the
                       // chunk
  float* d_rows;       // [2 C][ld] gradients of e^ and q^
  float* d_keys;       // [C][ld] gradients of those keys
  float* turned;       // [max(ld, ldv)][C] a matrix on its way to being transposed
  float* dL;           // [2 C][C] dL, dP
  float* coefficient;  // [C][C]
  float *v, *write;    // [ldv]
  float *q_scale, *held;
  float *dg, *d_beta, *whole;

  Room(const DeltaRuleBackwardParams& p, const Sizes& z, Arena& arena)
      : no_q(without_q(p.in)),
        state_keys(no_q, arena),
        keys(p.in, arena),
        state_head(no_q, arena),
        head(p.in, arena),
        gates(p.in, arena) {
    starts = arena.take<float>(z.stretches * z.group * z.state);
    states = arena.take<float>(z.chunks * z.group * z.state);
    N = arena.take<float>(z.chunks * z.group * z.C * z.ldv);
    d_state = arena.take<float>(z.group * z.state);
    dq = arena.take<float>(z.C * z.ld);
    dk = arena.take<float>(z.C * z.ld);
    tokens = arena.take<float>(2 * z.C * z.ldv);
    rows = arena.take<float>(2 * z.C * z.ld);
    d_rows = arena.take<float>(2 * z.C * z.ld);
    d_keys = arena.take<float>(z.C * z.ld);
    turned = arena.take<float>((z.ld > z.ldv ? z.ld : z.ldv) * z.C);
    dL = arena.take<float>(2 * z.C * z.C);
    coefficient = arena.take<float>(z.C * z.C);
    v = arena.take<float>(z.ldv);
    write = arena.take<float>(z.ldv);
    q_scale = arena.take<float>(z.C);
    held = arena.take<float>(z.C);
    dg = arena.take<float>(p.in.vector_gate ? z.C * z.ld : z.C);
    d_beta = arena.take<float>(z.C);
    whole = arena.take<float>(z.ld);
  }
};

// x [K, V] of the caller -> [ldv][ld], zeros around it, or zeros if null; and back.
void turn_in(const Sizes& z, const float* x, float* y) {
  memset(y, 0, static_cast<size_t>(z.state) * 4);
  if (!x) return;
  const int64_t K = round_down(z.K, 16), V = round_down(z.V, 16);
  transpose(K, V, x, z.V, y, z.ld);
  for (int64_t c = 0; c < z.K; ++c)
    for (int64_t j = c < K ? V : 0; j < z.V; ++j) y[j * z.ld + c] = x[c * z.V + j];
}
void turn_out(const Sizes& z, const float* x, float* y) {
  const int64_t K = round_down(z.K, 16), V = round_down(z.V, 16);
  transpose(V, K, x, z.ld, y, z.V);
  for (int64_t c = 0; c < z.K; ++c)
    for (int64_t j = c < K ? V : 0; j < z.V; ++j) y[c * z.V + j] = x[j * z.ld + c];
}

// to = f x
void scaled_row(const float* x, float f, int64_t n, float* to) {
  const F by = F::fill(f);
  for (int64_t i = 0; i < n; i += F::W) (F::load(x + i) * by).store(to + i);
}
// to += f x
void add_row(const float* x, float f, int64_t n, float* to) {
  const F by = F::fill(f);
  for (int64_t i = 0; i < n; i += F::W) fma(by, F::load(x + i), F::load(to + i)).store(to + i);
}

class Backward {
 public:
  Backward(const DeltaRuleBackwardParams& p, const Sizes& z, Room& room)
      : p_(p), in_(p.in), z_(z), r_(room), has_out_(p.in.q.p && p.d_out.p) {}

  void run(int64_t n, int64_t key_head) {
    const DeltaSequence s(in_, n);
    key_head_ = key_head;
    n_ = n;
    const auto head_state = [&](const float* x, int64_t number, int64_t g) {
      return x ? x + (number * in_.HV + first_head() + g) * z_.K * z_.V : nullptr;
    };
    for (int64_t g = 0; g < z_.group; ++g) turn_in(z_, head_state(p_.d_final, n, g), r_.d_state + g * z_.state);

    const int64_t length = s.end - s.begin;
    const int64_t apart = p_.checkpoints && p_.checkpoint_every < length ? p_.checkpoint_every : length;
    for (int64_t j = length ? (length - 1) / apart : -1; j >= 0; --j) {
      const int64_t begin = s.begin + j * apart, end = begin + apart < s.end ? begin + apart : s.end;
      const int64_t segments = (end - begin + kSegment - 1) / kSegment;
      for (int64_t g = 0; g < z_.group; ++g)
        turn_in(z_,
                j ? head_state(p_.checkpoints, delta_slots(in_, n, s.begin, apart).whole + j - 1, g)
                  : head_state(in_.initial_state, n, g),
                r_.starts + g * z_.state);
      for (int64_t i = 0; i + 1 < segments; ++i) skip_segment(s, begin + i * kSegment, start(i), start(i + 1));
      for (int64_t i = segments - 1; i >= 0; --i) {
        const int64_t from = begin + i * kSegment, to = from + kSegment < end ? from + kSegment : end;
        segment(s, from, to, start(i));
      }
    }
    if (p_.dinitial)
      for (int64_t g = 0; g < z_.group; ++g)
        turn_out(z_, r_.d_state + g * z_.state, p_.dinitial + (n * in_.HV + first_head() + g) * z_.K * z_.V);
  }

 private:
  const DeltaRuleBackwardParams& p_;
  const DeltaInputs& in_;
  const Sizes& z_;
  Room& r_;
  bool has_out_;
  int64_t key_head_ = 0, n_ = 0;

  int64_t first_head() const { return key_head_ * z_.group; }
  float* start(int64_t segment) const { return r_.starts + segment * z_.group * z_.state; }

  // N of a chunk, and the state after it unless `next` is null. `next` may be S.
  void forward(const DeltaSequence& s, int64_t at, int64_t g, const float* S, float* N, float* next) {
    r_.state_head.form(r_.no_q, r_.state_keys, s, at, first_head() + g);
    solve(s, at, g, S, N);
    if (next) advance(S, N, next);
  }

  // States after kSegment tokens from those before them.
  void skip_segment(const DeltaSequence& s, int64_t begin, const float* from, float* to) {
    for (int64_t at = begin; at < begin + kSegment; at += z_.C) {
      r_.state_keys.read(r_.no_q, s, at, key_head_);
      for (int64_t g = 0; g < z_.group; ++g)
        forward(s, at, g, (at == begin ? from : to) + g * z_.state, r_.N, to + g * z_.state);
    }
  }

  void segment(const DeltaSequence& s, int64_t begin, int64_t end, const float* from) {
    const int64_t chunks = (end - begin + z_.C - 1) / z_.C, all = z_.group * z_.state;
    memcpy(r_.states, from, static_cast<size_t>(all) * 4);
    const auto N_of = [&](int64_t c, int64_t g) { return r_.N + (c * z_.group + g) * z_.C * z_.ldv; };
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = begin + c * z_.C;
      r_.state_keys.read(r_.no_q, s, at, key_head_);
      for (int64_t g = 0; g < z_.group; ++g) {
        float* S = r_.states + c * all + g * z_.state;
        forward(s, at, g, S, N_of(c, g), c + 1 < chunks ? S + all : nullptr);
      }
    }
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t at = begin + c * z_.C;
      r_.keys.read(in_, s, at, key_head_);
      memset(r_.dk, 0, static_cast<size_t>(z_.C * z_.ld) * 4);
      memset(r_.dq, 0, static_cast<size_t>(z_.C * z_.ld) * 4);
      for (int64_t g = 0; g < z_.group; ++g) {
        r_.head.form(in_, r_.keys, s, at, first_head() + g);
        chunk(s, at, g, r_.states + c * all + g * z_.state, N_of(c, g), r_.d_state + g * z_.state);
      }
      write_key_gradients(s, at);
    }
  }

  // The row of v, times write where given, of token `at + i`.
  const float* value(const DeltaSequence& s, int64_t at, int64_t g) {
    load_padded_row(in_.v, s.batch, at, first_head() + g, z_.V, z_.ldv, r_.v);
    if (!in_.write.p) return r_.v;
    load_padded_row(in_.write, s.batch, at, first_head() + g, z_.V, z_.ldv, r_.write);
    row_times(r_.v, r_.write, z_.ldv, r_.write);
    return r_.write;
  }

  // N = (I + L)^-1 (w - e_factor (e S))
  void solve(const DeltaSequence& s, int64_t at, int64_t g, const float* S, float* N) {
    const DeltaHead& h = r_.state_head;
    const int64_t n = r_.state_keys.tokens, rows = round_up(n, 16);
    const float* e_t = r_.state_keys.k_t;
    if (h.e != r_.state_keys.k) {
      transpose(rows, z_.ld, h.e, z_.ld, r_.rows, z_.C);
      e_t = r_.rows;
    }
    matmul(z_.ldv, n, z_.K, {S, z_.ld, 1}, e_t, z_.C, r_.turned, z_.C);
    transpose(z_.ldv, rows, r_.turned, z_.C, N, z_.ldv);
    for (int64_t i = 0; i < n; ++i) {
      const float* v = value(s, at + i, g);
      const F beta = F::fill(h.beta[i]), minus = F::fill(-h.e_factor[i]);
      float* x = N + i * z_.ldv;
      for (int64_t c = 0; c < z_.ldv; c += F::W) fma(minus, F::load(x + c), beta * F::load(v + c)).store(x + c);
    }
    triangle_solve<Part::solve_lower>(n, z_.ldv, {h.minus_l, z_.C, 1}, N, z_.ldv);
  }

  // next = whole S + keys N
  void advance(const float* S, const float* N, float* next) {
    const DeltaHead& h = r_.state_head;
    const int64_t n = r_.state_keys.tokens;
    if (in_.vector_gate)
      transpose(z_.ld, round_up(n, 16), h.keys_t, z_.C, r_.rows, z_.ld);
    else
      for (int64_t i = 0; i < n; ++i) scaled_row(r_.state_keys.k + i * z_.ld, h.tail[i], z_.ld, r_.rows + i * z_.ld);
    for (int64_t v = 0; v < z_.ldv; ++v) row_times(S + v * z_.ld, h.whole, z_.ld, next + v * z_.ld);
    matmul(z_.V, z_.ld, n, {N, 1, z_.ldv}, r_.rows, z_.ld, next, z_.ld, Start::add);
  }

  void chunk(const DeltaSequence& s, int64_t at, int64_t g, const float* S, const float* N, float* dS) {
    const DeltaKeys& key = r_.keys;
    const DeltaHead& h = r_.head;
    const int64_t C = z_.C, ld = z_.ld, ldv = z_.ldv, n = key.tokens, rows = round_up(n, 16);
    const int64_t both = has_out_ ? 2 * n : n;
    const float* e0 = h.erased ? h.erased : key.k;  // rows without beta and decays
    float *dR = r_.tokens, *dO = r_.tokens + n * ldv;

    matmul(ldv, n, z_.K, {dS, ld, 1}, h.keys_t, C, r_.turned, C);
    transpose(ldv, rows, r_.turned, C, dR, ldv);
    for (int64_t i = 0; i < n; ++i) scale_row(dR + i * ldv, h.tail[i], ldv);
    if (has_out_) {
      for (int64_t i = 0; i < n; ++i)
        load_padded_row(p_.d_out, s.batch, at + i, first_head() + g, z_.V, ldv, dO + i * ldv);
      triangle_matmul<Part::upper>(n, ldv, {h.p, 1, C}, dO, ldv, dR, ldv, Start::add);
    }
    triangle_solve<Part::solve_upper>(n, ldv, {h.minus_l, 1, C}, dR, ldv);
    value_gradients(s, at, g, dR);

    // From here on dR is -dR, so that it stands beside dO in all sums.
    float *dL = r_.dL, *dP = r_.dL + C * C;
    transpose(rows, ldv, N, ldv, r_.turned, C);
    lower_blocks_matmul(n, z_.V, 16, {dR, ldv, 1}, r_.turned, C, dL, C);
    if (has_out_) lower_blocks_matmul(n, z_.V, 16, {dO, ldv, 1}, r_.turned, C, dP, C);
    clear_above(dL, 0);
    if (has_out_) clear_above(dP, 1);
    float *de = r_.d_rows, *dq = has_out_ ? r_.d_rows + n * ld : nullptr, *dk = r_.d_keys;
    matmul(both, ld, z_.V, {r_.tokens, ldv, 1}, S, ld, r_.d_rows, ld);
    matmul(n, ld, z_.V, {N, ldv, 1}, dS, ld, dk, ld);

    float* e = r_.rows;
    float* q = r_.rows + n * ld;
    for (int64_t i = 0; i < n; ++i) {
      scaled_row(h.e + i * ld, h.e_factor[i], ld, e + i * ld);
      if (has_out_) scaled_row(h.q + i * ld, h.q_factor[i], ld, q + i * ld);
      r_.q_scale[i] = has_out_ ? in_.scale * key.q_factor[i] : 0.0f;
    }
    scale_d_state(S, dS);
    matmul(z_.V, ld, both, {r_.tokens, 1, ldv}, r_.rows, ld, dS, ld, Start::add);

    if (in_.vector_gate) {
      r_.gates.run(key, h, r_.q_scale, dL, has_out_ ? dP : nullptr, r_.whole, de, dq, dk, r_.dg);
    } else {
      scalar_gate(e0, dL, dP, de, dq, dk);
    }
    for (int64_t i = 0; i < n; ++i) {
      r_.d_beta[i] += dot(de + i * ld, e0 + i * ld, ld);
      key_gradients(s, at + i, g, i, de + i * ld, dk + i * ld);
      if (dq) add_row(dq + i * ld, in_.scale, ld, r_.dq + i * ld);
    }
    write_gate_gradients(s, at, g);
  }

  // dv, dwrite, their part of dbeta; dR <- -dR
  void value_gradients(const DeltaSequence& s, int64_t at, int64_t g, float* dR) {
    for (int64_t i = 0; i < r_.keys.tokens; ++i) {
      float* d = dR + i * z_.ldv;
      const float *w = value(s, at + i, g), beta = r_.head.beta[i];
      const int64_t row = ((s.batch * in_.T + at + i) * in_.HV + first_head() + g) * z_.V;
      r_.d_beta[i] = dot(d, w, z_.ldv);
      alignas(64) float out[kMaxDeltaDim];
      if (p_.dwrite) {
        row_times(d, r_.v, z_.ldv, out);
        scaled_row(out, beta, z_.ldv, out);
        store_row(DType::f32, out, z_.V, p_.dwrite, row);
      }
      if (p_.dv) {
        scaled_row(d, beta, z_.ldv, out);
        if (in_.write.p) {
          load_padded_row(in_.write, s.batch, at + i, first_head() + g, z_.V, z_.ldv, r_.write);
          row_times(out, r_.write, z_.ldv, out);
        }
        store_row(in_.v.dtype, out, z_.V, p_.dv, row);
      }
      scale_row(d, -1.0f, z_.ldv);
    }
  }

  // Zeros where j >= i (diagonal = 0) or j > i (1), up to the end of the block
  // of 16 on the diagonal.
  void clear_above(float* x, int64_t diagonal) const {
    for (int64_t i = 0; i < r_.keys.tokens; ++i)
      for (int64_t j = i + diagonal; j < round_up(i + 1, 16); ++j) x[i * z_.C + j] = 0.0f;
  }

  // r_.whole = the product of all gates times its gradient, per channel; dS <-
  // that product dS
  void scale_d_state(const float* S, float* dS) {
    vector_tiles(z_.ld, [&](auto N, int64_t c) {
      constexpr int kN = N.value;
      F whole[kN], sum[kN];
      for (int j = 0; j < kN; ++j) whole[j] = F::load(r_.head.whole + c + j * F::W), sum[j] = F::zero();
      for (int64_t v = 0; v < z_.V; ++v)
        for (int j = 0; j < kN; ++j) {
          const int64_t at = v * z_.ld + c + j * F::W;
          const F d = F::load(dS + at) * whole[j];
          d.store(dS + at);
          sum[j] = fma(d, F::load(S + at), sum[j]);
        }
      for (int j = 0; j < kN; ++j) sum[j].store(r_.whole + c + j * F::W);
    });
  }

  // One gate per head: as DeltaGateGradients::run, decays being factors of rows
  // and of L and P.
  void scalar_gate(const float* e0, const float* dL, const float* dP, float* de, float* dq, float* dk) {
    const DeltaKeys& key = r_.keys;
    const DeltaHead& h = r_.head;
    const int64_t C = z_.C, ld = z_.ld, n = key.tokens;
    if (p_.dg) gate_sums(dL, dP, de, dk);

    float* x = r_.coefficient;
    const auto times_decays = [&](const float* d) {
      for (int64_t i = 0; i < n; ++i) row_times(d + i * C, h.decay + i * C, round_up(i + 1, 16), x + i * C);
    };
    const auto times_factors = [&](const float* f) {
      for (int64_t i = 0; i < n; ++i) scale_row(x + i * C, f[i], round_up(i + 1, 16));
    };
    for (int64_t i = 0; i < n; ++i) scale_row(dk + i * ld, h.tail[i], ld);
    times_decays(dL);
    triangle_matmul<Part::lower>(n, ld, {x, C, 1}, key.k, ld, de, ld, Start::scaled, h.start);
    times_factors(h.beta);
    triangle_matmul<Part::upper>(n, ld, {x, 1, C}, e0, ld, dk, ld, Start::add);
    if (!has_out_) return;
    times_decays(dP);
    triangle_matmul<Part::lower>(n, ld, {x, C, 1}, key.k, ld, dq, ld, Start::scaled, h.start);
    times_factors(r_.q_scale);
    triangle_matmul<Part::upper>(n, ld, {x, 1, C}, key.q, ld, dk, ld, Start::add);
  }

  // dg of one gate per head: sums over the pairs of tokens i >= t > j, over the
  // rows i >= t that meet the state before the chunk, over the keys j < t that
  // go to the state after it, and what the state itself is scaled by.
  void gate_sums(const float* dL, const float* dP, const float* de, const float* dk) {
    const DeltaHead& h = r_.head;
    const int64_t C = z_.C, ld = z_.ld, n = r_.keys.tokens;
    float state = 0.0f, suffix = 0.0f, prefix = 0.0f;
    for (int64_t c = 0; c < z_.K; ++c) state += r_.whole[c];
    for (int64_t i = 0; i < n; ++i) {
      r_.dg[i] = state + prefix;
      prefix += h.tail[i] * dot(dk + i * ld, r_.keys.k + i * ld, ld);
    }
    float* pairs = r_.held;  // over rows i >= t
    memset(pairs, 0, static_cast<size_t>(C) * 4);
    for (int64_t t = n - 1; t >= 0; --t) {
      suffix += dot(de + t * ld, r_.rows + t * ld, ld);
      if (has_out_) suffix += dot(de + (n + t) * ld, r_.rows + (n + t) * ld, ld);
      F sum = F::zero();
      for (int64_t j = 0; j < t; j += F::W) {
        F x = F::zero() - F::load(dL + t * C + j) * F::load(h.minus_l + t * C + j);
        if (has_out_) x = fma(F::load(dP + t * C + j), F::load(h.p + t * C + j), x);
        const int before = t - j < F::W ? static_cast<int>(t - j) : F::W;
        x = F::load(pairs + j) + first(before, x, F::zero());
        x.store(pairs + j);
        sum = sum + first(before, x, F::zero());
      }
      r_.dg[t] += suffix + sum.fold_sum();
    }
  }

  // Of e = beta erase o k, and of beta's rule, to erase and k.
  void key_gradients(const DeltaSequence& s, int64_t t, int64_t g, int64_t i, float* de, const float* dk) {
    const float *k = r_.keys.k + i * z_.ld, beta = r_.head.beta[i];
    float* sum = r_.dk + i * z_.ld;
    add_row(dk, 1.0f, z_.ld, sum);
    scale_row(de, beta, z_.ld);
    if (in_.erase.p) {
      alignas(64) float row[kMaxDeltaDim];
      if (p_.derase) {
        row_times(de, k, z_.ld, row);
        store_row(DType::f32, row, z_.K, p_.derase, ((s.batch * in_.T + t) * in_.HV + first_head() + g) * z_.K);
      }
      load_padded_row(in_.erase, s.batch, t, first_head() + g, z_.K, z_.ld, row);
      row_times(de, row, z_.ld, de);
    }
    add_row(de, 1.0f, z_.ld, sum);
    float& d = r_.d_beta[i];
    if (in_.rule == BetaRule::kaczmarz) {
      d /= r_.keys.k_square[i] + kKaczmarzEps;
      add_row(k, -2.0f * d * beta, z_.ld, sum);
    } else if (in_.rule == BetaRule::sigmoid) {
      d *= beta * (1.0f - beta);
    } else if (in_.rule == BetaRule::sigmoid2) {
      d *= beta * (1.0f - 0.5f * beta);
    }
  }

  void write_gate_gradients(const DeltaSequence& s, int64_t at, int64_t g) {
    for (int64_t i = 0; i < r_.keys.tokens; ++i) {
      const int64_t number = (s.batch * in_.T + at + i) * in_.HV + first_head() + g;
      if (p_.dbeta) p_.dbeta[number] = r_.d_beta[i];
      if (p_.dg && in_.vector_gate)
        store_row(DType::f32, r_.dg + i * z_.ld, z_.K, p_.dg, number * z_.K);
      else if (p_.dg)
        p_.dg[number] = r_.dg[i];
    }
  }

  // Through l2norm y = f x, dx = f (dy - y (y . dy)), to q and k as they were
  // given.
  void write_key_gradients(const DeltaSequence& s, int64_t at) {
    const DeltaKeys& key = r_.keys;
    for (int64_t i = 0; i < key.tokens; ++i) {
      const int64_t row = ((s.batch * in_.T + at + i) * in_.H + key_head_) * z_.K;
      if (p_.dk) {
        float* d = r_.dk + i * z_.ld;
        if (in_.l2norm) {
          add_row(key.k + i * z_.ld, -dot(d, key.k + i * z_.ld, z_.ld), z_.ld, d);
          scale_row(d, key.k_factor[i], z_.ld);
        }
        store_row(in_.k.dtype, d, z_.K, p_.dk, row);
      }
      if (p_.dq) {
        float* d = r_.dq + i * z_.ld;
        if (in_.l2norm) {
          const float f = key.q_factor[i];
          add_row(key.q + i * z_.ld, -f * f * dot(d, key.q + i * z_.ld, z_.ld), z_.ld, d);
          scale_row(d, f, z_.ld);
        }
        store_row(in_.q.dtype, d, z_.K, p_.dq, row);
      }
    }
  }
};

struct Job {
  const DeltaRuleBackwardParams* p;
  const Sizes* z;
  uint8_t* rooms;
  int64_t room_bytes, tasks, next;
};

void work(Job& job, int64_t thread) {
  const FlushDenormals flush;
  Arena arena{job.rooms + thread * job.room_bytes};
  Room room(*job.p, *job.z, arena);
  Backward backward(*job.p, *job.z, room);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (task >= job.tasks) return;
    backward.run(task / job.p->in.H, task % job.p->in.H);
  }
}

// Gradients of the tokens that belong to no sequence.
void write_zeros(const DeltaRuleBackwardParams& p) {
  const DeltaInputs& in = p.in;
  if (!in.cu_seqlens) return;
  const int64_t end = in.cu_seqlens[in.N];
  const auto zeros = [&](void* x, int64_t row, DType type) {
    row *= type == DType::f32 ? 4 : 2;
    if (x) memset(static_cast<uint8_t*>(x) + end * row, 0, static_cast<size_t>((in.T - end) * row));
  };
  zeros(p.dq, in.H * in.K, in.q.dtype);
  zeros(p.dk, in.H * in.K, in.k.dtype);
  zeros(p.dv, in.HV * in.V, in.v.dtype);
  zeros(p.dbeta, in.HV, DType::f32);
  zeros(p.dg, in.vector_gate ? in.HV * in.K : in.HV, DType::f32);
  zeros(p.derase, in.HV * in.K, DType::f32);
  zeros(p.dwrite, in.HV * in.V, DType::f32);
}

int64_t threads_of(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  const int64_t tasks = p.in.N * p.in.H;
  return tasks < exec.threads ? tasks : exec.threads;
}

}  // namespace

int64_t delta_rule_backward_workspace_cpu(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  Arena room{nullptr};
  Room(p, Sizes(p), room);
  return threads_of(p, exec) * room.used;
}

void delta_rule_backward_cpu(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  const Sizes z(p);
  Arena room{nullptr};
  Room(p, z, room);
  write_zeros(p);
  Job job{&p, &z, static_cast<uint8_t*>(p.workspace), room.used, p.in.N * p.in.H, 0};
  const int64_t threads = threads_of(p, exec);
  if (threads == 1) return work(job, 0);
  if (threads > 1)
    exec.run(static_cast<int>(threads), [](void* arg, int i) { work(*static_cast<Job*>(arg), i); }, &job);
}

KK_END

KK_CPU_ENTRY_R(int64_t, delta_rule_backward_workspace, DeltaRuleBackwardParams)
KK_CPU_ENTRY(delta_rule_backward, DeltaRuleBackwardParams)
