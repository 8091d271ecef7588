// From the scores of a KV head's query rows to one number per item (page, segment, token): what the ops that score have in
// common.
//
//   RowReduction reduction(p, arena);             // of score_*_workspace and score_* alike
//   reduction.put(b, g, first, n, s, ld);         // from any thread, every item of a sequence once
//   reduction.finish(exec, [&](int64_t b) { return items of sequence b; });
//
// max and sum are done when an item is put. The softmax of a row needs all its items first, so their scores are kept, and
// finish() goes over them twice: for the rows' maximum and mass, and for out.
#pragma once
#include "cpu/arena.h"
#include "cpu/simd.h"
#include "cpu/split.h"
#include "kvkernels/score.h"

KK_BEGIN

// NaN where either is.
inline F max_or_nan(F a, F b) {
  const auto larger = max(a, b).v;  // b where either is NaN
  return a.v != a.v ? a.v : larger;
}

inline bool is_softmax(Reduce r) { return r == Reduce::softmax_max || r == Reduce::softmax_sum; }

class RowReduction {
 public:
  RowReduction(const ScoreCommon& params, Arena& arena)
      : p(params), rows_(p.Hkv > 0 ? p.Tq * (p.Hq / p.Hkv) : 0), ld_(round_up(p.n, 16)) {
    const int64_t kept = is_softmax(p.reduce) ? p.B * p.Hkv * rows_ : 0;
    scores_ = arena.take<float>(kept * ld_);
    softmax_ = arena.take<Softmax>(kept);
  }

  int64_t rows() const { return rows_; }  // of a KV head, in any order that stays

  // s[r * ld + i]: score of row r and item first + i of (b, g), i < n. Rows can be read to the next multiple of F::W.
  void put(int64_t b, int64_t g, int64_t first, int64_t n, const float* s, int64_t ld) const {
    if (is_softmax(p.reduce)) {
      float* kept = row(b * p.Hkv + g, 0) + first;
      for (int64_t r = 0; r < rows_; ++r) memcpy(kept + r * ld_, s + r * ld, sizeof(float) * static_cast<size_t>(n));
      return;
    }
    float* out = out_row(b * p.Hkv + g) + first;
    reduce_rows(s, ld, n, out, [](int64_t, F x) { return x; });
  }

  // items(b) <= n; out is -inf behind them.
  template <typename Items>
  void finish(const CpuExec& exec, const Items& items) const {
    if (is_softmax(p.reduce)) {
      const int64_t numbers_per_thread = 1 << 14;  // about 20 us
      split(exec, p.B * p.Hkv * rows_, numbers_per_thread / (p.n + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) softmax_[i] = softmax_of(row(0, i), items(i / rows_ / p.Hkv));
      });
      const int64_t blocks = (p.n + kBlockItems - 1) / kBlockItems,
                    work = rows_ * (p.n < kBlockItems ? p.n : kBlockItems);
      split(exec, p.B * p.Hkv * blocks, numbers_per_thread / (work + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i / blocks, first = i % blocks * kBlockItems, left = items(head / p.Hkv) - first;
          if (left > 0) write_masses(head, first, left < kBlockItems ? left : kBlockItems);
        }
      });
    }
    for (int64_t head = 0; head < p.B * p.Hkv; ++head)
      for (int64_t i = items(head / p.Hkv); i < p.n; ++i) out_row(head)[i] = -INFINITY;
  }

 private:
  static constexpr int64_t kBlockItems = 2048;
  struct Softmax {
    float top, inv;  // maximum, 1 / sum of exp(score - maximum)
  };
  const ScoreCommon& p;
  int64_t rows_, ld_;
  float* scores_;     // [B * Hkv * rows][ld]
  Softmax* softmax_;  // [B * Hkv * rows]

  float* row(int64_t head, int64_t r) const { return scores_ + (head * rows_ + r) * ld_; }
  float* out_row(int64_t head) const { return p.out + head * p.n; }

  // NaN scores make the mass NaN, and a row without any score above -inf too: as in torch.
  static Softmax softmax_of(const float* s, int64_t n) {
    const F none = F::fill(-INFINITY);
    const auto at = [&](int64_t i) {
      return n - i < F::W ? first(static_cast<int>(n - i), F::load(s + i), none) : F::load(s + i);
    };
    F top = none, mass = F::zero();
    for (int64_t i = 0; i < n; i += F::W) top = max(at(i), top);
    const float most = top.fold_max();
    const int64_t whole = round_down(n, F::W);
    for (int64_t i = 0; i < whole; i += F::W) mass = mass + exp_neg(F::load(s + i) - F::fill(most));
    if (whole < n)
      mass = mass + first(static_cast<int>(n - whole), exp_neg(F::load(s + whole) - F::fill(most)), F::zero());
    return {most, 1.0f / mass.fold_sum()};
  }

  void write_masses(int64_t head, int64_t begin, int64_t n) const {
    const float* s = row(head, 0) + begin;
    float* out = out_row(head) + begin;
    const Softmax* of = softmax_ + head * rows_;
    const auto mass = [&](int64_t r, F x) { return exp_neg(x - F::fill(of[r].top)) * F::fill(of[r].inv); };
    reduce_rows(s, ld_, n, out, mass);
  }

  // Of f(r, s[r][i]) over the rows.
  template <typename Of>
  void reduce_rows(const float* s, int64_t ld, int64_t n, float* out, const Of& f) const {
    if (p.reduce == Reduce::max || p.reduce == Reduce::softmax_max)
      reduce(s, ld, n, out, f, [](F a, F b) { return max_or_nan(a, b); });
    else
      reduce(s, ld, n, out, f, [](F a, F b) { return a + b; });
  }

  template <typename Of, typename Op>
  void reduce(const float* s, int64_t ld, int64_t n, float* out, const Of& f, const Op& op) const {
    for (int64_t i = 0; i < n; i += F::W) {
      F x = f(0, F::load(s + i));
      for (int64_t r = 1; r < rows_; ++r) x = op(x, f(r, F::load(s + r * ld + i)));
      if (n - i >= F::W) {
        x.store(out + i);
      } else {
        float last[F::W];
        x.store(last);
        memcpy(out + i, last, sizeof(float) * static_cast<size_t>(n - i));
      }
    }
  }
};

KK_END
