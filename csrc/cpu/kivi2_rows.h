// Rows of kivi2 (formats/kivi2.h), done with F.
#pragma once
#include "cpu/codec.h"

KK_BEGIN

// kivi2::code as pack_codes<2> wants it.
KK_INLINE F kivi2_code(F x, F zero, F inv) {
  return min(max(rint((x - zero) * inv), F::zero()), F::fill(3.0f)) - F::fill(2.0f);  // max drops NaN
}
inline float kivi2_inv(uint16_t scale) {
  const float s = half_value(scale);
  return s > 0.0f ? 1.0f / s : 0.0f;
}

template <DType T, int D>
struct Kivi2Values {
  static constexpr int N = D / F::W, M = static_cast<int>(kivi2::v_group) / F::W, groups = N / M;

  static uint8_t* codes(const Row& r) { return r.side + r.token * (D / 4); }
  static uint8_t* scales(const Row& r, const RowCodec& at) {
    return r.side + kivi2::scale_offset(at.page_size, D) + r.token * groups * 2;
  }
  static uint8_t* zeros(const Row& r, const RowCodec& at) {
    return r.side + kivi2::zero_offset(Side::V, at.page_size, D) + r.token * groups * 2;
  }

  static void encode(const RowCodec& at, const Row* rows, int64_t n, int64_t) {
    for (const Row* r = rows; r < rows + n; ++r) {
      F c[N];
      for (int g = 0; g < groups; ++g) {
        F v[M], lo = F::fill(INFINITY), hi = F::fill(-INFINITY), odd = F::zero();
        each<M>([&](auto i) {
          v[i] = load<T>(r->x + (g * M + i) * F::W * kElementBytes<T>);
          lo = min(lo, v[i]);
          hi = max(hi, v[i]);
          odd = odd + v[i] * F::zero();  // NaN where v is not finite
        });
        const kivi2::Affine a = kivi2::affine(-(F::zero() - lo).fold_max(), hi.fold_max(), all_finite(odd));
        store_u16(a.scale, scales(*r, at) + g * 2);
        store_u16(a.zero, zeros(*r, at) + g * 2);
        const F zero = F::fill(half_value(a.zero)), inv = F::fill(kivi2_inv(a.scale));
        each<M>([&](auto i) { c[g * M + i] = kivi2_code(v[i], zero, inv); });
      }
      each<N / 4>([&](auto i) { pack_codes<2>(c + i * 4, codes(*r) + i * F::W, nullptr); });
    }
  }

  static void decode(const RowCodec& at, const Row* rows, int64_t n) {
    for (const Row* r = rows; r < rows + n; ++r) {
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(codes(*r) + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = F::fill(half_value(load_u16(scales(*r, at) + i / M * 2)));
        const F zero = F::fill(half_value(load_u16(zeros(*r, at) + i / M * 2)));
        store<T>(zero + s * c[i], r->x + i * F::W * kElementBytes<T>);
      }
    }
  }
};

template <DType T, int D>
struct Kivi2Keys {
  static constexpr int N = D / F::W;

  // A channel's tokens are coded at once: `load_token(token, float x[D])` is asked for every token of the page, twice.
  template <typename LoadToken>
  static void encode_page(LoadToken&& load_token, uint8_t* side, int64_t page_size) {
    float x[D], lo[D], hi[D], odd[D];
    for (int i = 0; i < D; ++i) lo[i] = INFINITY, hi[i] = -INFINITY, odd[i] = 0.0f;
    for (int64_t token = 0; token < page_size; ++token) {
      load_token(token, x);
      for (int i = 0; i < D; i += F::W) {
        const F v = F::load(x + i);
        min(F::load(lo + i), v).store(lo + i);
        max(F::load(hi + i), v).store(hi + i);
        (F::load(odd + i) + v * F::zero()).store(odd + i);  // NaN where v is not finite
      }
    }
    float *zero = lo, *inv = hi;
    for (int i = 0; i < D; ++i) {
      const kivi2::Affine a = kivi2::affine(lo[i], hi[i], odd[i] == 0.0f);
      store_u16(a.scale, side + kivi2::scale_offset(page_size, D) + i * 2);
      store_u16(a.zero, side + kivi2::zero_offset(Side::K, page_size, D) + i * 2);
      zero[i] = half_value(a.zero);
      inv[i] = kivi2_inv(a.scale);
    }
    for (int64_t token = 0; token < page_size; ++token) {
      load_token(token, x);
      F c[N];
      for (int i = 0; i < N; ++i)
        c[i] = kivi2_code(F::load(x + i * F::W), F::load(zero + i * F::W), F::load(inv + i * F::W));
      for (int i = 0; i < N; i += 4) pack_codes<2>(c + i, side + token * (D / 4) + i / 4 * F::W, nullptr);
    }
  }

  static void decode(const RowCodec& at, const Row* rows, int64_t n) {
    for (const Row* r = rows; r < rows + n; ++r) {
      const uint8_t* scales = r->side + kivi2::scale_offset(at.page_size, D);
      const uint8_t* zeros = r->side + kivi2::zero_offset(Side::K, at.page_size, D);
      F c[N];
      each<N / 4>([&](auto i) { unpack_codes<2>(r->side + r->token * (D / 4) + i * F::W, nullptr, c + i * 4); });
      for (int i = 0; i < N; ++i) {
        const F s = load<DType::f16>(scales + i * F::W * 2), zero = load<DType::f16>(zeros + i * F::W * 2);
        store<T>(zero + s * c[i], r->x + i * F::W * kElementBytes<T>);
      }
    }
  }
};

KK_END
