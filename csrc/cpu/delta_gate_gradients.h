// Where one gate per channel stands between the rows of a chunk and what was made of them: gradients of the decayed
// rows -> gradients of the rows themselves and of the gates. Blocks of 16 tokens from the last to the first, as the
// decays were formed: between a block and the tokens before it through products with the start of the block as their
// anchor, within a block pair by pair. Sums of a gate's gradient are only ever added to, so that a strong gate's small
// gradient is not the difference of two large numbers.
#pragma once
#include "cpu/delta_chunk.h"

KK_BEGIN

class DeltaGateGradients {
 public:
  DeltaGateGradients(const DeltaInputs& in, Arena& arena) : C_(in.chunk), ld_(round_up(in.K, 16)) {
    const int64_t blocks = C_ / kDeltaBlock;
    anchored_ = arena.take<float>(kDeltaBlock * blocks * (blocks - 1) / 2 * ld_);
    before_ = arena.take<float>(blocks * ld_);
    through_ = arena.take<float>(blocks * ld_);
    prefix_ = arena.take<float>(kDeltaBlock * ld_);
    rows_ = arena.take<float>(2 * kDeltaBlock * ld_);
    held_ = arena.take<float>(ld_);
  }

  // d_e, d_q, d_k [tokens][ld]: on entry the gradients of e, q decayed from the start of the chunk and of k decayed to
  // its end, on return those of beta o e, scale o q, k. dL, dP [C][C], zero where there is no pair; dP and d_q may be
  // null. `whole` [ld] the gradient of the product of all gates times it; dg [tokens][ld].
  void run(const DeltaKeys& key, const DeltaHead& head, const float* scale, const float* dL, const float* dP,
           const float* whole, float* d_e, float* d_q, float* d_k, float* dg) {
    const int64_t n = key.tokens, last = (n - 1) / kDeltaBlock;
    const float* e_rows = head.erased ? head.erased : key.k;
    anchor_keys(key, head, last);
    memcpy(held_, whole, static_cast<size_t>(ld_) * 4);
    for (int64_t b = last; b >= 0; --b) {
      const int64_t s = b * kDeltaBlock, rows = n - s < kDeltaBlock ? n - s : kDeltaBlock;
      const float *alpha = head.alpha + s * ld_, *before = before_ + b * ld_, *through = through_ + b * ld_;
      float *e = rows_, *q = rows_ + rows * ld_;  // decayed from the start of the block
      for (int64_t i = 0; i < rows; ++i) {
        const F beta = F::fill(head.beta[s + i]), by_q = F::fill(d_q ? scale[s + i] : 0.0f);
        float* a = prefix_ + i * ld_;
        for (int64_t c = 0; c < ld_; c += F::W) {
          const F x = F::load(alpha + i * ld_ + c), p = i ? F::load(a - ld_ + c) * x : x;
          p.store(a + c);
          (F::load(e_rows + (s + i) * ld_ + c) * (p * beta)).store(e + i * ld_ + c);
          if (d_q) (F::load(key.q + (s + i) * ld_ + c) * (p * by_q)).store(q + i * ld_ + c);
        }
      }
      // What the tokens before the block hold of this one's rows, and what this block's tokens hold of keys before it.
      alignas(64) float start[kMaxDeltaDim], across[kMaxDeltaDim];
      for (int64_t c = 0; c < ld_; c += F::W) {
        F sum = F::zero();
        const F w = F::load(before + c);
        for (int64_t i = 0; i < rows; ++i) {
          const auto pull = [&](float* d, const float* x) {
            const F y = F::load(d + (s + i) * ld_ + c) * w;
            y.store(d + (s + i) * ld_ + c);
            sum = fma(y, F::load(x + i * ld_ + c), sum);
          };
          pull(d_e, e);
          if (d_q) pull(d_q, q);
        }
        sum.store(start + c);
        F crossing = F::load(held_ + c);
        const F t = F::load(through + c);
        const float* keys = anchored(b);
        for (int64_t j = 0; j < s; ++j) {
          const F h = F::load(d_k + j * ld_ + c) * t;
          h.store(d_k + j * ld_ + c);
          crossing = fma(h, F::load(keys + j * ld_ + c), crossing);
        }
        crossing.store(across + c);
      }
      if (b) {
        matmul(rows, ld_, s, {dL + s * C_, C_, 1}, anchored(b), ld_, d_e + s * ld_, ld_, Start::add);
        matmul(s, ld_, rows, {dL + s * C_, 1, C_}, e, ld_, d_k, ld_, Start::add);
        if (d_q) {
          matmul(rows, ld_, s, {dP + s * C_, C_, 1}, anchored(b), ld_, d_q + s * ld_, ld_, Start::add);
          matmul(s, ld_, rows, {dP + s * C_, 1, C_}, q, ld_, d_k, ld_, Start::add);
        }
      }
      for (int64_t c = 0; c < ld_; c += F::W) {
        F suffix = F::load(across + c);
        for (int64_t i = rows - 1; i >= 0; --i) {
          const F p = F::load(prefix_ + i * ld_ + c);
          const auto pull = [&](float* d, const float* x) {
            const F y = F::load(d + (s + i) * ld_ + c);
            suffix = fma(y, F::load(x + i * ld_ + c), suffix);
            (y * p).store(d + (s + i) * ld_ + c);
          };
          pull(d_e, e);
          if (d_q) pull(d_q, q);
          suffix.store(dg + (s + i) * ld_ + c);
        }
        (F::load(held_ + c) + F::load(start + c)).store(held_ + c);
      }
      within_block(key, head, e_rows, scale, dL, dP, s, rows, d_e, d_q, d_k, dg);
    }
  }

 private:
  int64_t C_, ld_;
  float* anchored_;  // for every block but the first: the keys before it, decayed to its start
  float* before_;    // [blocks][ld] products of the gates before a block
  float* through_;   // [blocks][ld] products of a block's gates
  float* prefix_;    // [16][ld] products from the start of a block
  float* rows_;
  float* held_;  // gradients that every token from the block looked at backwards holds

  float* anchored(int64_t block) const { return anchored_ + kDeltaBlock * block * (block - 1) / 2 * ld_; }

  void anchor_keys(const DeltaKeys& key, const DeltaHead& head, int64_t last) {
    for (int64_t c = 0; c < ld_; ++c) before_[c] = 1.0f;
    for (int64_t b = 0; b <= last; ++b) {
      const int64_t s = b * kDeltaBlock, end = s + kDeltaBlock < key.tokens ? s + kDeltaBlock : key.tokens;
      float* through = through_ + b * ld_;
      for (int64_t c = 0; c < ld_; c += F::W) {
        F product = F::fill(1.0f);
        for (int64_t j = end - 1; j >= s; --j) {
          if (b < last) (F::load(key.k + j * ld_ + c) * product).store(anchored(b + 1) + j * ld_ + c);
          product = product * F::load(head.alpha + j * ld_ + c);
        }
        product.store(through + c);
        if (b == last) continue;
        (F::load(before_ + b * ld_ + c) * product).store(before_ + (b + 1) * ld_ + c);
        for (int64_t j = 0; j < s; ++j)
          (F::load(anchored(b) + j * ld_ + c) * product).store(anchored(b + 1) + j * ld_ + c);
      }
    }
  }

  // Key j decays pair by pair through the tokens i after it, and its gradient h back again.
  void within_block(const DeltaKeys& key, const DeltaHead& head, const float* e_rows, const float* scale,
                    const float* dL, const float* dP, int64_t s, int64_t rows, float* d_e, float* d_q, float* d_k,
                    float* dg) const {
    for (int64_t c = 0; c < ld_; c += F::W) {
      F alpha[kDeltaBlock + 1], e[kDeltaBlock], q[kDeltaBlock], de[kDeltaBlock], dq[kDeltaBlock], sum[kDeltaBlock];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (s + i) * ld_ + c;
        alpha[i] = F::load(head.alpha + at);
        e[i] = F::load(e_rows + at) * F::fill(head.beta[s + i]);
        q[i] = d_q ? F::load(key.q + at) * F::fill(scale[s + i]) : F::zero();
        de[i] = F::load(d_e + at);
        dq[i] = d_q ? F::load(d_q + at) : F::zero();
        sum[i] = F::load(dg + at);
      }
      alpha[rows] = F::fill(1.0f);
      for (int64_t j = 0; j < rows; ++j) {
        const float* l = dL + s * C_ + s + j;
        const float* p = d_q ? dP + s * C_ + s + j : nullptr;
        F decayed[kDeltaBlock];
        decayed[j] = F::load(key.k + (s + j) * ld_ + c);
        for (int64_t i = j + 1; i < rows; ++i) decayed[i] = decayed[i - 1] * alpha[i];
        F h = F::load(d_k + (s + j) * ld_ + c);
        for (int64_t i = rows - 1; i > j; --i) {
          const F li = F::fill(l[i * C_]), v = decayed[i];
          F x = li * e[i];
          de[i] = fma(li, v, de[i]);
          if (p) {
            const F pi = F::fill(p[i * C_]);
            x = fma(pi, q[i], x);
            dq[i] = fma(pi, v, dq[i]);
          }
          h = fma(alpha[i + 1], h, x);
          sum[i] = fma(h, v, sum[i]);
        }
        h = h * alpha[j + 1];
        if (p) {
          const F pj = F::fill(p[j * C_]);
          h = fma(pj, q[j], h);
          dq[j] = fma(pj, decayed[j], dq[j]);
        }
        h.store(d_k + (s + j) * ld_ + c);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (s + i) * ld_ + c;
        de[i].store(d_e + at);
        if (d_q) dq[i].store(d_q + at);
        sum[i].store(dg + at);
      }
    }
  }
};

KK_END
