// A chunk of the delta rule, up to where the state comes in: rows of keys and queries, decays, L and P (delta.h). The
// forward pass and the backward pass both begin with it.
#pragma once
#include "cpu/arena.h"
#include "cpu/delta_tasks.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/matmul_bf16.h"
#include "cpu/matmul_i16.h"

KK_BEGIN

constexpr int64_t kDeltaPanel = 64;  // columns of a state that are worked on together: [K][64] of it stay in L1
constexpr int64_t kDeltaBlock = 16;  // tokens whose mutual decays per channel are formed pair by pair

// A row of n elements, and zeros up to `ld`.
inline void load_padded_row(const DeltaRows& x, int64_t batch, int64_t token, int64_t head, int64_t n, int64_t ld,
                            float* row) {
  for (int64_t i = n; i < ld; ++i) row[i] = 0.0f;
  load_row(x, batch, token, head, n, row);
}

// y = x o f; y may be x.
inline void row_times(const float* x, const float* f, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += F::W) (F::load(x + i) * F::load(f + i)).store(y + i);
}

// What a chunk of one key head is to all its value heads. Matrices of tokens have `C` rows, those beyond `tokens` zero
// up to a multiple of 16 in k; rows of channels are `ld` long, zero beyond K.
struct DeltaKeys {
  int64_t C, K, ld, tokens = 0;
  float *k, *q;                // [C][ld] k after l2norm, q as it was given; null where `rounded`
  float *k_factor, *q_factor;  // [C] what l2norm multiplies k and q by, or 1
  float* k_square;             // [C] sum k^2, for kaczmarz only
  float* k_t;                  // [ld][C] transposed; null where `rounded`
  float *kk, *qk;              // [C][C] K K^T (without erase), Q K^T in lower blocks of 16; one gate per head only

  // Whole numbers for products with the state (matmul_i16.h), null where not `rounded`: [C][round_up(K, 32)], k as it was
  // given, and k transposed [.. K][C].
  bool rounded;
  int16_t *k_whole = nullptr, *q_whole = nullptr, *k_t_whole = nullptr;
  float *k_unit = nullptr, *q_unit = nullptr;  // [C] of rows; that of k times what l2norm multiplies by
  float n_most = 0.0f;                         // of elements of columns that k_t_whole is multiplied by

  // `may_round`: products with the state are not asked for in fp32.
  DeltaKeys(const DeltaInputs& p, Arena& arena, [[maybe_unused]] bool may_round = false)
      : C(p.chunk), K(p.K), ld(round_up(p.K, 16)) {
    bf16_ = p.k.dtype == DType::bf16 && !p.vector_gate && cpu::has_avx512bf16();
    rounded = false;
#if defined(__AVX512VNNI__)
    rounded = may_round && bf16_ && !p.erase.p && K % 2 == 0;
#endif
    k = rounded ? nullptr : arena.take<float>(C * ld);
    q = rounded || !p.q.p ? nullptr : arena.take<float>(C * ld);
    k_factor = arena.take<float>(C);
    q_factor = arena.take<float>(C);
    k_square = arena.take<float>(C);
    k_t = rounded ? nullptr : arena.take<float>(ld * C);
    kk = p.vector_gate || p.erase.p ? nullptr : arena.take<float>(C * C);
    qk = p.vector_gate || !p.q.p ? nullptr : arena.take<float>(C * C);
    if (!bf16_) return;
    given_ = arena.take<uint16_t>(C * given_ld());
    words_ = arena.take<uint32_t>(given_ld() / 2 * C);
    if (!rounded) return;
    k_whole = arena.take<int16_t>(C * given_ld());
    q_whole = arena.take<int16_t>(p.q.p ? C * given_ld() : 0);
    k_t_whole = arena.take<int16_t>(given_ld() * C);
    k_unit = arena.take<float>(C);
    q_unit = arena.take<float>(C);
    sums_ = arena.take<float>(given_ld());
  }

  void read(const DeltaInputs& p, const DeltaSequence& s, int64_t from, int64_t head) {
    tokens = s.end - from < C ? s.end - from : C;
#if defined(__AVX512VNNI__)
    if (rounded) return read_rounded(p, s, from, head);
#endif
    for (int64_t i = 0; i < tokens; ++i) {
      float* row = k + i * ld;
      load_padded_row(p.k, s.batch, from + i, head, K, ld, row);
      k_factor[i] = p.l2norm ? l2norm(row, K) : 1.0f;
      if (p.rule == BetaRule::kaczmarz) k_square[i] = dot(row, row, K);
      if (!q) continue;
      row = q + i * ld;
      load_padded_row(p.q, s.batch, from + i, head, K, ld, row);
      q_factor[i] = p.l2norm ? l2norm_factor(dot(row, row, K)) : 1.0f;
    }
    const int64_t rows = round_up(tokens, 16);
    memset(k + tokens * ld, 0, static_cast<size_t>((rows - tokens) * ld) * 4);
    transpose(rows, ld, k, ld, k_t, C);
#if defined(__AVX512F__)
    if (bf16_) {
      copy_given(p.k, s, from, head);
      multiply_keys(p.l2norm);
      if (qk) {
        copy_given(p.q, s, from, head);
        multiply_queries(p.l2norm);
      }
      return;
    }
#endif
    if (kk) lower_blocks_matmul(tokens, K, 16, {k, ld, 1}, k_t, C, kk, C);
    if (qk) lower_blocks_matmul(tokens, K, 16, {q, ld, 1}, k_t, C, qk, C);
  }

 private:
  bool bf16_;        // products among keys from the bf16 numbers as they were given, which are exact
  uint16_t* given_;  // [C][given_ld] rows with zeros after them
  uint32_t* words_;  // [given_ld / 2][C] pairs of channels of the keys
  float* sums_;      // [given_ld] of magnitudes of k_whole
  int64_t given_ld() const { return round_up(K, 32); }

#if defined(__AVX512F__)
  void copy_given(const DeltaRows& x, const DeltaSequence& s, int64_t from, int64_t head) {
    const int64_t n = given_ld();
    for (int64_t i = 0; i < tokens; ++i) {
      memcpy(given_ + i * n, delta_row(x, s.batch, from + i, head), static_cast<size_t>(K) * 2);
      if (n > K) memset(given_ + i * n + K, 0, static_cast<size_t>(n - K) * 2);
    }
    memset(given_ + tokens * n, 0, static_cast<size_t>((round_up(tokens, 16) - tokens) * n) * 2);
  }
  // words_[p][i] = channels 2p and 2p + 1 of row i.
  void pair_channels(const void* rows) {
    const int64_t n = given_ld() / 2;
    transpose(round_up(tokens, 16), n, static_cast<const float*>(rows), n, reinterpret_cast<float*>(words_), C);
  }
  // Of the keys in given_.
  void multiply_keys(bool factors) {
    const int64_t n = given_ld(), rows = round_up(tokens, 16);
    pair_channels(given_);
    for (int64_t i = tokens; i < rows; ++i) k_factor[i] = 0.0f;
    if (!kk) return;
    bf16_lower_blocks_matmul(tokens, n, given_, n, words_, C, kk, C);
    if (!factors) return;
    for (int64_t i = 0; i < tokens; ++i) {
      row_times(kk + i * C, k_factor, i + 1, kk + i * C);
      scale_row(kk + i * C, k_factor[i], i + 1);
    }
  }
  // Of the queries in given_.
  void multiply_queries(bool factors) {
    const int64_t n = given_ld();
    bf16_lower_blocks_matmul(tokens, n, given_, n, words_, C, qk, C);
    if (!factors) return;
    for (int64_t i = 0; i < tokens; ++i) row_times(qk + i * C, k_factor, i + 1, qk + i * C);
  }
#endif

#if defined(__AVX512VNNI__)
  void read_rounded(const DeltaInputs& p, const DeltaSequence& s, int64_t from, int64_t head) {
    const int64_t n = given_ld(), rows = round_up(tokens, 16);
    const auto round = [&](int16_t* whole, float* unit, float* factor, float* square) {
      for (int64_t i = 0; i < tokens; ++i) {
        const RoundedRow row = round_row(given_ + i * n, n, whole + i * n, sums_);
        unit[i] = row.unit;
        factor[i] = p.l2norm ? l2norm_factor(row.square) : 1.0f;
        if (square) square[i] = row.square * factor[i] * factor[i];
      }
    };
    copy_given(p.k, s, from, head);
    memset(sums_, 0, static_cast<size_t>(n) * 4);
    round(k_whole, k_unit, k_factor, k_square);
    F most = F::fill(1.0f);
    for (int64_t c = 0; c < n; c += F::W) most = max(F::load(sums_ + c), most);
    n_most = column_most(most.fold_max());
    for (int64_t i = 0; i < rows; ++i) k_unit[i] = i < tokens ? k_unit[i] * k_factor[i] : 0.0f;
    memset(k_whole + tokens * n, 0, static_cast<size_t>((rows - tokens) * n) * 2);

    pair_channels(k_whole);
    const auto store = [](int16_t* to, __m512i x) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
    };
    for (int64_t c = 0; c < n; c += 2)
      for (int64_t i = 0; i < rows; i += 16) {
        const __m512i pairs = _mm512_loadu_si512(words_ + c / 2 * C + i);
        store(k_t_whole + c * C + i, pairs);
        store(k_t_whole + (c + 1) * C + i, _mm512_srli_epi32(pairs, 16));
      }
    multiply_keys(p.l2norm);
    if (qk) {
      copy_given(p.q, s, from, head);
      round(q_whole, q_unit, q_factor, nullptr);
      multiply_queries(p.l2norm);
    }
  }
#endif
};

// What a chunk of one value head is:
//   N = (I + L)^-1 (w - e_factor (e S))       o = q_factor (q S) + P N       S <- whole S + keys_t (tail N)
// where factors multiply rows. With keys.rounded e, q and keys_t are the whole numbers of the key head, and their units
// are in the factors.
struct DeltaHead {
  float* beta;                 // [C] after its rule
  float* alpha;                // [C], or [C][ld] with vector_gate
  float* start;                // [C] a_i, one gate per head only
  float* decay;                // [C][C] D with zeros above the diagonal; one gate per head only
  float* erased;               // [C][ld] erase o k where erase is given
  float *minus_l, *p;          // [C][C] -L and P; what is above the diagonal means nothing
  const float *e, *q;          // [C][ld] with vector_gate times the decays from the start of the chunk
  float *e_factor, *q_factor;  // [C]
  const float* keys_t;         // [ld][C] with vector_gate times the decays to the end of the chunk
  float* tail;                 // [C] D_Cj, 1 with vector_gate
  float* whole;                // [ld] the product of all decays

  DeltaHead(const DeltaInputs& in, Arena& arena) {
    const int64_t C = in.chunk, ld = round_up(in.K, 16);
    beta = arena.take<float>(C);
    alpha = arena.take<float>(in.vector_gate ? C * ld : C);
    start = in.vector_gate ? nullptr : arena.take<float>(C);
    decay = in.vector_gate ? nullptr : arena.take<float>(C * C);
    erased = in.erase.p ? arena.take<float>(C * ld) : nullptr;
    minus_l = arena.take<float>(C * C);
    p = in.q.p ? arena.take<float>(C * C) : nullptr;
    e_factor = arena.take<float>(C);
    q_factor = arena.take<float>(C);
    tail = arena.take<float>(C);
    whole = arena.take<float>(ld);
    e = q = keys_t = nullptr;
    if (in.vector_gate) {
      e = e_decayed_ = arena.take<float>(C * ld);
      q = q_decayed_ = in.q.p ? arena.take<float>(C * ld) : nullptr;
      keys_t = k_decayed_ = arena.take<float>(ld * C);
      pairs_ = arena.take<float>(kDeltaBlock * ld);
      prefix_ = arena.take<float>(ld);
    }
  }

  void form(const DeltaInputs& in, const DeltaKeys& key, const DeltaSequence& s, int64_t from, int64_t head) {
    for (int64_t i = 0; i < key.tokens; ++i) {
      const float given = in.beta.p ? load_scalar(in.beta, s.batch, from + i, head) : 1.0f;
      beta[i] = beta_value(in.rule, given, key.k_square[i]);
    }
    if (erased) {
      for (int64_t i = 0; i < key.tokens; ++i) {
        float* row = erased + i * key.ld;
        load_padded_row(in.erase, s.batch, from + i, head, key.K, key.ld, row);
        row_times(row, key.k + i * key.ld, key.ld, row);
      }
    }
    if (in.vector_gate)
      form_vector_gate(in, key, s, from, head);
    else
      form_scalar_gate(in, key, s, from, head);
  }

 private:
  float *e_decayed_, *q_decayed_, *k_decayed_;
  float* pairs_;   // [16][ld] keys of a block times the decays from them to the token that is looked at
  float* prefix_;  // [ld] decays from the start of a block

  void form_scalar_gate(const DeltaInputs& in, const DeltaKeys& key, const DeltaSequence& s, int64_t from,
                        int64_t head) {
    const int64_t C = key.C, n = key.tokens;
    for (int64_t i = 0; i < round_up(n, 16); ++i)
      alpha[i] = in.g.p && i < n ? load_scalar(in.g, s.batch, from + i, head) : 0.0f;
    for (int64_t i = 0; i < n; i += F::W) exp_gate(F::load(alpha + i)).store(alpha + i);

    e = erased ? erased : key.k;
    q = key.q;
    keys_t = key.k_t;
    const float* e_k = key.kk;
    if (erased) {
      lower_blocks_matmul(n, key.K, 16, {erased, key.ld, 1}, key.k_t, C, minus_l, C);
      e_k = minus_l;
    }
    float a = 1.0f;
    for (int64_t i = 0; i < n; ++i) {
      a *= alpha[i];
      start[i] = a;
      e_factor[i] = a * beta[i] * (key.rounded ? key.k_unit[i] : 1.0f);
      const float q_scale = p ? in.scale * key.q_factor[i] : 0.0f;
      q_factor[i] = a * q_scale * (p && key.rounded ? key.q_unit[i] : 1.0f);
      const F by = F::fill(alpha[i]), minus_beta = F::fill(-beta[i]), scale = F::fill(q_scale);
      float* d = decay + i * C;
      for (int64_t j = 0; j < C; j += F::W) (i ? F::load(d - C + j) * by : F::zero()).store(d + j);
      d[i] = 1.0f;
      for (int64_t j = 0; j <= i; j += F::W) {
        const F x = F::load(d + j);
        (F::load(e_k + i * C + j) * (x * minus_beta)).store(minus_l + i * C + j);
        if (p) (F::load(key.qk + i * C + j) * (x * scale)).store(p + i * C + j);
      }
    }
    memcpy(tail, decay + (n - 1) * C, static_cast<size_t>(C) * 4);
    if (key.rounded) row_times(tail, key.k_unit, n, tail);
    for (int64_t c = 0; c < key.ld; ++c) whole[c] = a;
  }

  // Rows i of L and P times -beta_i and q_factor_i, j in [begin, end).
  void scale_rows(const DeltaKeys& key, int64_t i, int64_t begin, int64_t end) {
    scale_row(minus_l + i * key.C + begin, -beta[i], end - begin);
    if (p) scale_row(p + i * key.C + begin, q_factor[i], end - begin);
  }

  void form_vector_gate(const DeltaInputs& in, const DeltaKeys& key, const DeltaSequence& s, int64_t from,
                        int64_t head) {
    const int64_t C = key.C, n = key.tokens, ld = key.ld;
    for (int64_t i = 0; i < n; ++i) {
      float* row = alpha + i * ld;
      load_padded_row(in.g, s.batch, from + i, head, key.K, ld, row);
      for (int64_t c = 0; c < ld; c += F::W) exp_gate(F::load(row + c)).store(row + c);
      e_factor[i] = beta[i];
      q_factor[i] = key.q ? in.scale * key.q_factor[i] : 0.0f;
      tail[i] = 1.0f;
    }
    const float* e_rows = erased ? erased : key.k;
    for (int64_t c = 0; c < ld; ++c) whole[c] = 1.0f;
    for (int64_t b = 0; b < n; b += kDeltaBlock) {
      const int64_t rows = n - b < kDeltaBlock ? n - b : kDeltaBlock;
      diagonal_block(key, e_rows, b, rows);
      for (int64_t i = b; i < b + rows; ++i) scale_rows(key, i, b, b + kDeltaBlock);

      // Earlier keys come decayed to the end of the block before this one, tokens of this one decayed from there.
      for (int64_t i = b; i < b + rows; ++i) {
        for (int64_t c = 0; c < ld; c += F::W) {
          const F x = F::load(alpha + i * ld + c);
          (i == b ? x : F::load(prefix_ + c) * x).store(prefix_ + c);
        }
        row_times(e_rows + i * ld, prefix_, ld, e_decayed_ + i * ld);
        if (key.q) row_times(key.q + i * ld, prefix_, ld, q_decayed_ + i * ld);
      }
      if (b) {
        careful_matmul(rows, b, key.K, {e_decayed_ + b * ld, ld, 1}, k_decayed_, C, minus_l + b * C, C);
        if (p) careful_matmul(rows, b, key.K, {q_decayed_ + b * ld, ld, 1}, k_decayed_, C, p + b * C, C);
        for (int64_t i = b; i < b + rows; ++i) {
          scale_rows(key, i, 0, b);
          row_times(e_decayed_ + i * ld, whole, ld, e_decayed_ + i * ld);
          if (key.q) row_times(q_decayed_ + i * ld, whole, ld, q_decayed_ + i * ld);
        }
        for (int64_t c = 0; c < key.K; ++c) scale_row(k_decayed_ + c * C, prefix_[c], b);
      }
      row_times(whole, prefix_, ld, whole);
      transpose(kDeltaBlock, ld, pairs_, ld, k_decayed_ + b, C);
    }
  }

  // L and P without their factors among the tokens [b, b + rows), and the keys decayed to the last of them in pairs_.
  void diagonal_block(const DeltaKeys& key, const float* e_rows, int64_t b, int64_t rows) {
    constexpr int kFolded = F::W / kFold, kGroups = 4 / kFold;
    const int64_t C = key.C, ld = key.ld;
    memset(pairs_, 0, static_cast<size_t>(kDeltaBlock * ld) * 4);
    for (int64_t i = 0; i < rows; ++i) {
      const float *a = alpha + (b + i) * ld, *x = e_rows + (b + i) * ld, *k = key.k + (b + i) * ld;
      const float* y = key.q ? key.q + (b + i) * ld : x;
      float* l = minus_l + (b + i) * C + b;
      float* pq = p ? p + (b + i) * C + b : nullptr;
      for (int64_t j0 = 0; j0 < kDeltaBlock; j0 += F::W) {
        F l_sums[kFolded], p_sums[kFolded];
        for (int f = 0; f < kFolded; ++f) l_sums[f] = p_sums[f] = F::zero();
        for (int64_t j = j0; j < j0 + F::W && j < i; j += 4) {
          F l_acc[4], p_acc[4];
          for (int t = 0; t < 4; ++t) l_acc[t] = p_acc[t] = F::zero();
          float* w = pairs_ + j * ld;
          for (int64_t c = 0; c < ld; c += F::W) {
            const F by = F::load(a + c), xc = F::load(x + c), yc = F::load(y + c);
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) {
              const F v = F::load(w + t * ld + c) * by;
              v.store(w + t * ld + c);
              l_acc[t] = fma(xc, v, l_acc[t]);
              p_acc[t] = fma(yc, v, p_acc[t]);
            }
          }
          for (int f = 0; f < kGroups; ++f) {
            l_sums[(j - j0) / kFold + f] = fold(l_acc + f * kFold);
            p_sums[(j - j0) / kFold + f] = fold(p_acc + f * kFold);
          }
        }
        sum_folded(l_sums).store(l + j0);
        if (pq) sum_folded(p_sums).store(pq + j0);
      }
      if (pq) pq[i] = dot(y, k, ld);
      memcpy(pairs_ + i * ld, k, static_cast<size_t>(ld) * 4);
    }
  }
};

KK_END
