// Rows of the rotated formats: what core/token_codes.h, core/halves.h and pool.h say in scalar code, done with F. A row passes
// through fp32 in the stored basis, so that the code for a grid and that for a tensor's dtype need not know of each other.
#pragma once
#include "cpu/codec.h"

KK_BEGIN

// ---- tensor <-> stored basis

#if defined(__AVX512F__)
// Of N vectors the one that bits of `from` tell, lane by lane: bit `bit` the lowest.
template <int N, int bit>
KK_INLINE F select_by_bit(F* t, __m512i from) {
  if constexpr (N == 1) {
    return t[0];
  } else {
    const __mmask16 odd = _mm512_test_epi32_mask(from, _mm512_set1_epi32(bit));
    each<N / 2>([&](auto j) { t[j] = _mm512_mask_blend_ps(odd, t[2 * j].v, t[2 * j + 1].v); });
    return select_by_bit<N / 2, 2 * bit>(t, from);
  }
}
#endif

// v[j] <- v[order[j]], channels of N vectors.
template <int N>
KK_INLINE void permute(F* v, const int32_t* order) {
#if defined(__AVX512F__)  // a gather takes three times as long
  F out[N];
  each<N>([&](auto i) {
    const __m512i from = _mm512_loadu_si512(order + i * F::W);
    F t[N / 2];
    each<N / 2>([&](auto j) { t[j] = _mm512_permutex2var_ps(v[2 * j].v, from, v[2 * j + 1].v); });
    out[i] = select_by_bit<N / 2, 2 * F::W>(t, from);
  });
  each<N>([&](auto i) { v[i] = out[i]; });
#else
  alignas(64) float x[N * F::W];
  each<N>([&](auto i) { v[i].store(x + i * F::W); });
#if defined(__AVX2__)
  each<N>([&](auto i) {
    v[i] = _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order + i * F::W)), 4);
  });
#else
  for (int i = 0; i < N; ++i) v[i] = F::each([&](int j) { return x[order[i * F::W + j]]; });
#endif
#endif
}

template <DType T, int D, int parts>
struct RotatedRows {
  static constexpr int N = D / F::W, M = N / parts;

  // H of each part, scaled. Pairs of vectors split into even and odd elements -> natural order.
  KK_INLINE static void rotate(F* v) {
    each<parts>([&](auto p) { fwht_split<M>(v + p * M); });
    const F scale = F::fill(fwht_scale(D / parts));
    each<N>([&](auto i) { v[i] = v[i] * scale; });
  }

  // H (diag(t) (x - mu))[order]
  static void to_stored(const Row& row, float* x) {
    const KeyTransform& t = row.transform;
    F v[N];
    if constexpr (parts == 1) {
      constexpr int64_t step = 2 * F::W;
      each<N / 2>([&](auto i) { load_split<T>(row.x + i * step * kElementBytes<T>, v[2 * i], v[2 * i + 1]); });
      if (t.centre)
        each<N / 2>([&](auto i) {
          F even = F::load(t.centre + i * step), odd = F::load(t.centre + i * step + F::W);
          deinterleave(even, odd);
          v[2 * i] = v[2 * i] - even;
          v[2 * i + 1] = v[2 * i + 1] - odd;
        });
      if (t.balance)
        each<N / 2>([&](auto i) {
          F even = F::load(t.balance + i * step), odd = F::load(t.balance + i * step + F::W);
          deinterleave(even, odd);
          v[2 * i] = v[2 * i] * even;
          v[2 * i + 1] = v[2 * i + 1] * odd;
        });
    } else {
      each<N>([&](auto i) { v[i] = load<T>(row.x + i * F::W * kElementBytes<T>); });
      if (t.centre) each<N>([&](auto i) { v[i] = v[i] - F::load(t.centre + i * F::W); });
      if (t.balance) each<N>([&](auto i) { v[i] = v[i] * F::load(t.balance + i * F::W); });
      if (t.order) permute<N>(v, t.order);
      each<N / 2>([&](auto i) { deinterleave(v[2 * i], v[2 * i + 1]); });
    }
    rotate(v);
    each<N>([&](auto i) { v[i].store(x + i * F::W); });
  }

  // The way back, x overwritten.
  static void from_stored(float* x, const Row& row) {
    const KeyTransform& t = row.transform;
    F v[N];
    each<N>([&](auto i) { v[i] = F::load(x + i * F::W); });
    each<N / 2>([&](auto i) { deinterleave(v[2 * i], v[2 * i + 1]); });
    rotate(v);
    if constexpr (parts > 1)
      if (t.order) {
        alignas(64) float ordered[D];
        each<N>([&](auto i) { v[i].store(ordered + i * F::W); });
        for (int i = 0; i < D; ++i) x[t.order[i]] = ordered[i];
        each<N>([&](auto i) { v[i] = F::load(x + i * F::W); });
      }
    if (t.balance) each<N>([&](auto i) { v[i] = v[i] / F::load(t.balance + i * F::W); });
    if (t.centre) each<N>([&](auto i) { v[i] = v[i] + F::load(t.centre + i * F::W); });
    each<N>([&](auto i) { store<T>(v[i], row.x + i * F::W * kElementBytes<T>); });
  }
};

// ---- stored basis <-> codes

// N vectors onto one, halves onto halves: what core/fwht.h fold_sum does before the halves get shorter than a vector.
template <int N, typename Op>
KK_INLINE F fold(F* v, Op op) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    each<N / 2>([&](auto i) { v[i] = op(v[i], v[i + N / 2]); });
    return fold<N / 2>(v, op);
  }
}

// Rows that are encoded together: one per 128 bits, so that what is computed once per row (sums, roots, quotients) takes one
// instruction for all of them and no row waits for its own.
constexpr int kRows = F::W / 4;
// Rows between two steps of the encoder: 8 KB of fp32 at D = 128, and enough to hide the latency of a root and two quotients.
constexpr int64_t kBlock = 16;

// The rest of fold_sum: lanes 4r .. 4r+3 of the result all hold the fold of the lanes of v[r].
template <typename Op>
KK_INLINE F fold_rows(const F* v, Op op) {
#if defined(__AVX512F__)
  const F ab = op(F(_mm512_shuffle_f32x4(v[0].v, v[1].v, 0x44)), F(_mm512_shuffle_f32x4(v[0].v, v[1].v, 0xee)));
  const F cd = op(F(_mm512_shuffle_f32x4(v[2].v, v[3].v, 0x44)), F(_mm512_shuffle_f32x4(v[2].v, v[3].v, 0xee)));
  const F rows = op(F(_mm512_shuffle_f32x4(ab.v, cd.v, 0x88)), F(_mm512_shuffle_f32x4(ab.v, cd.v, 0xdd)));
  const F twos = op(rows, F(_mm512_permute_ps(rows.v, 0x4e)));
  return op(twos, F(_mm512_permute_ps(twos.v, 0xb1)));
#elif defined(__AVX2__)
  const F rows = op(F(_mm256_permute2f128_ps(v[0].v, v[1].v, 0x20)), F(_mm256_permute2f128_ps(v[0].v, v[1].v, 0x31)));
  const F twos = op(rows, F(_mm256_permute_ps(rows.v, 0x4e)));
  return op(twos, F(_mm256_permute_ps(twos.v, 0xb1)));
#else
  const F::Vec x = v[0].v;
  const F twos = op(v[0], F(F::Vec{x[2], x[3], x[0], x[1]}));
  return op(twos, F(F::Vec{twos.v[1], twos.v[0], twos.v[3], twos.v[2]}));
#endif
}

// The level of core/grid.h next to y.
template <typename Grid>
KK_INLINE F grid_level(F y) {
  if constexpr (Grid::bits == 0) {
    const F inside = min(max(y + F::fill(0.5f), F::fill(-1.0f)), F::fill(1.0f));
    return floor_small(inside);
  } else {
#if defined(__AVX512F__)  // one instruction clamps both ways, to the float below half_levels
    const F inside = _mm512_range_ps(y.v, _mm512_set1_ps(Grid::half_levels * 0.99999994f), 2);
#else
    const F inside = min(max(y, F::fill(-Grid::half_levels)), F::fill(Grid::half_levels - 1.0f));
#endif
    return floor_small(inside) + F::fill(0.5f);
  }
}

// ScaleE5M3::from_float in fp16: what it decodes to.
inline uint16_t round_e5m3(unsigned half) { return static_cast<uint16_t>((half + 0x3fu + (half >> 7 & 1u)) & 0x7f80u); }

template <typename Grid, int len>
struct GroupRows {
  static constexpr int N = len / F::W;

  // encode_group of core/grid.h, each step for up to kBlock rows before the next: the roots and quotients of one row take longer
  // than all its other work, and here others fill the wait. x: rows n and up, to a multiple of kRows, hold finite numbers.
  static void encode(const Group& g, const float* x, int64_t stride, const Row* rows, int64_t n) {
    const auto plus = [](F a, F b) { return a + b; };
    const auto larger = [](F a, F b) { return max(a, b); };
    F sums[kBlock], tops[kBlock], squares[kBlock];  // tops, later: sums of l l
    alignas(64) float inv[kBlock * 4];

    const int64_t whole = (n + kRows - 1) / kRows * kRows;
    for (int64_t r = 0; r < whole; ++r) {
      F t[N];
      each<N>([&](auto i) {
        const F v = F::load(x + r * stride + i * F::W);
        t[i] = v * v;
      });
      sums[r] = fold<N>(t, plus);
      if constexpr (!Grid::from_rms) {
        each<N>([&](auto i) { t[i] = abs(F::load(x + r * stride + i * F::W)); });
        tops[r] = fold<N>(t, larger);
      }
    }

    bool ordinary = true;
    for (int64_t r = 0; r < whole; r += kRows) {
      squares[r] = fold_rows(sums + r, plus);
      ordinary &= all_finite(squares[r] * F::fill(1e26f));
      const F base = Grid::from_rms ? sqrt(squares[r] * F::fill(1.0f / len)) : fold_rows(tops + r, larger);
      const F start = min(max(base * F::fill(Grid::start), F::fill(kTinyScale)), F::fill(kMaxScale));
      (F::fill(1.0f) / start).store(inv + 4 * r);
    }
    if (!ordinary) {  // NaN, Inf, or a norm past 1e6, where codes before the clamp could pass 2^31
      for (int64_t r = 0; r < n; ++r) encode_any(g, x + r * stride, rows[r]);
      return;
    }

    for (int64_t r = 0; r < whole; ++r) {
      const F inv_r = F::fill(inv[4 * r]);
      F t[N], den = F::zero();
      each<N>([&](auto i) {
        const F v = F::load(x + r * stride + i * F::W), level = grid_level<Grid>(v * inv_r);
        t[i] = v * level;
        den = fma(level, level, den);  // exact, so fusing changes nothing
      });
      sums[r] = fold<N>(t, plus);
      tops[r] = den;
    }

    for (int64_t r = 0; r < whole; r += kRows) {
      const F den = fold_rows(tops + r, plus), s = where_positive(den, fold_rows(sums + r, plus) / den);
      const F divisor = g.unbiased ? max(s, F::fill(kTinyScale)) : store_scales(g, rows + r, n - r, s);
      where_positive(divisor, F::fill(1.0f) / divisor).store(inv + 4 * r);
    }

    for (int64_t r = 0; r < n; ++r) {
      const F inv_r = F::fill(inv[4 * r]);
      F c[N];
      each<N>([&](auto i) { c[i] = F::load(x + r * stride + i * F::W) * inv_r; });
      pack_row<Grid, N>(c, low(g, rows[r]), high(g, rows[r]));
      if (!g.unbiased) continue;
      each<N>([&](auto i) { c[i] = F::load(x + r * stride + i * F::W) * grid_level<Grid>(c[i]); });
      sums[r] = fold<N>(c, plus);
    }
    if (!g.unbiased) return;
    for (int64_t r = 0; r < whole; r += kRows) {
      const F dot = fold_rows(sums + r, plus);
      store_scales(g, rows + r, n - r, where_positive(dot, squares[r] / dot));
    }
  }

  static void decode(const Group& g, const Row* rows, int64_t n, float* x, int64_t stride) {
    for (const Row* row = rows; row < rows + n; ++row, x += stride) {
      F c[N];
      unpack_row<Grid, N>(low(g, *row), high(g, *row), c);
      const uint8_t* stored = row->side + g.scale + row->token * g.scale_stride;
      const F s = F::fill(half_value(g.short_scale ? static_cast<uint16_t>(*stored << 7) : load_u16(stored)));
      each<N>([&](auto i) { (s * (c[i] - F::fill(Grid::offset))).store(x + i * F::W); });
    }
  }

 private:
  static uint8_t* low(const Group& g, const Row& r) { return r.side + g.low + r.token * g.low_stride; }
  static uint8_t* high(const Group& g, const Row& r) { return r.side + g.high + r.token * g.high_stride; }

  // s: that of row r in lanes 4r .. 4r+3. Returns what the stored ones decode to.
  KK_INLINE static F store_scales(const Group& g, const Row* rows, int64_t n, F s) {
    alignas(64) uint16_t half[F::W];
    min(s, F::fill(g.short_scale ? ScaleE5M3::largest : ScaleF16::largest)).store_f16(half);
    if (g.short_scale)
      for (int i = 0; i < F::W; ++i) half[i] = round_e5m3(half[i]);
    for (int64_t r = 0; r < kRows && r < n; ++r) {
      uint8_t* stored = rows[r].side + g.scale + rows[r].token * g.scale_stride;
      if (g.short_scale)
        *stored = static_cast<uint8_t>(half[4 * r] >> 7);
      else
        store_u16(half[4 * r], stored);
    }
    return F::load_f16(half);
  }

  // One row, whatever it holds.
  [[gnu::cold, gnu::noinline]] static void encode_any(const Group& g, const float* x, const Row& row) {
    uint8_t code[len];
    uint8_t* stored = row.side + g.scale + row.token * g.scale_stride;
    if (g.short_scale)
      *stored = encode_group<Grid, ScaleE5M3>(x, len, g.unbiased, code);
    else
      store_u16(encode_group<Grid, ScaleF16>(x, len, g.unbiased, code), stored);
    Grid::pack(code, len, low(g, row), high(g, row));
  }
};

KK_END
