// One task: an interval of rows. n = M * p with p = 2^k: butterflies within each of the M parts, then H_M across the parts.
#include "kvkernels/ops/fwht.h"

#include <cstdlib>

#include "cpu/entry.h"
#include "cpu/row_vectors.h"
#include "cpu/split.h"
#include "kvkernels/core/hadamard.h"

KK_BEGIN

namespace {

constexpr int64_t kInL1 = 4096;  // elements

inline double load_at(const double* x) { return *x; }
inline F load_at(const float* x) { return F::load(x); }
inline void store_at(double v, double* x) { *x = v; }
inline void store_at(F v, float* x) { v.store(x); }

// Stages h and 2h in one pass over n elements.
template <int W, typename Real>
void two_stages(Real* x, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 4 * h)
    for (int64_t j = i; j < i + h; j += W) {
      const auto a = load_at(x + j), b = load_at(x + j + h), c = load_at(x + j + 2 * h), d = load_at(x + j + 3 * h);
      const auto ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
      store_at(ab + cd, x + j);
      store_at(a_b + c_d, x + j + h);
      store_at(ab - cd, x + j + 2 * h);
      store_at(a_b - c_d, x + j + 3 * h);
    }
}

template <int W, typename Real>
void one_stage(Real* x, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 2 * h)
    for (int64_t j = i; j < i + h; j += W) {
      const auto a = load_at(x + j), b = load_at(x + j + h);
      store_at(a + b, x + j);
      store_at(a - b, x + j + h);
    }
}

// Stages `first` .. n/2. Quarters that fit L1 go first; every element still sees its stages from small strides upwards.
template <int W, typename Real>
void stages(Real* x, int64_t n, int64_t first) {
  if (n > kInL1) {
    for (int64_t i = 0; i < n; i += n / 4) stages<W>(x + i, n / 4, first);
    two_stages<W>(x, n, n / 4);
    return;
  }
  int64_t h = first;
  for (; 4 * h <= n; h *= 4) two_stages<W>(x, n, h);
  if (h < n) one_stage<W>(x, n, h);
}

// H_p of p elements at src (dtype T) -> x in fp32.
template <DType T>
void part(const uint8_t* src, int64_t p, float* x) {
  constexpr int64_t block = 8 * F::W;
  const auto blocks = [&](auto N) {
    for (int64_t i = 0; i < p; i += N * F::W) {
      F v[N.value];
      each<N / 2>([&](auto j) { load_split<T>(src + (i + j * 2 * F::W) * kElementBytes<T>, v[2 * j], v[2 * j + 1]); });
      fwht_split<N.value>(v);
      each<N.value>([&](auto j) { v[j].store(x + i + j * F::W); });
    }
  };
  if (p >= block) {
    blocks(Int<8>{});
    stages<F::W>(x, p, block);
  } else if (p == 4 * F::W) {
    blocks(Int<4>{});
  } else if (p == 2 * F::W) {
    blocks(Int<2>{});
  } else {
    for (int64_t i = 0; i < p; ++i) {
      if constexpr (T == DType::f32) memcpy(x + i, src + i * 4, 4);
      if constexpr (T == DType::f16) x[i] = f16_to_float(load_u16(src + i * 2));
      if constexpr (T == DType::bf16) x[i] = bf16_to_float(load_u16(src + i * 2));
    }
    fwht(x, p);
  }
}
void part(const double* src, int64_t p, double* x) {
  memcpy(x, src, static_cast<size_t>(p) * 8);
  stages<1>(x, p, 1);
}

template <int M, typename Real>
struct Signs {
  Real at[M][M];
};
template <int M, typename Real>
constexpr Signs<M, Real> make_signs() {
  Signs<M, Real> s{};
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < M; ++j) s.at[i][j] = kHadamard<M>.row[i] >> j & 1u ? -1 : 1;
  return s;
}
template <int M, typename Real>
constexpr Signs<M, Real> kSigns = make_signs<M, Real>();

// H_M across M parts of p elements, in place.
template <int M, typename Real>
void across(Real* x, int64_t p) {
  int64_t c = 0;
  if constexpr (sizeof(Real) == 4)
    for (; c + F::W <= p; c += F::W) {
      F v[M];
      for (int i = 0; i < M; ++i) v[i] = F::load(x + i * p + c);
      each<M>([&](auto i) {
        F sum = kHadamard<M>.row[i] & 1u ? F::zero() - v[0] : v[0];
        each<M - 1>([&](auto k) {
          const int j = static_cast<int>(k) + 1;
          sum = kHadamard<M>.row[i] >> j & 1u ? sum - v[j] : sum + v[j];
        });
        sum.store(x + i * p + c);
      });
    }
  for (; c < p; ++c) {
    Real sum[M] = {};
    for (int j = 0; j < M; ++j)
      for (int i = 0; i < M; ++i) sum[i] += kSigns<M, Real>.at[j][i] * x[j * p + c];
    for (int i = 0; i < M; ++i) x[i * p + c] = sum[i];
  }
}

template <typename Real>
void across(Real* x, int64_t m, int64_t p) {
  if (m == 12) across<12>(x, p);
  if (m == 20) across<20>(x, p);
  if (m == 28) across<28>(x, p);
}

template <DType T>
void finish(const float* x, int64_t n, float scale, uint8_t* y) {
  const F s = F::fill(scale);
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) store<T>(F::load(x + i) * s, y + i * kElementBytes<T>);
  for (; i < n; ++i) {
    const float r = x[i] * scale;
    if constexpr (T == DType::f32) memcpy(y + i * 4, &r, 4);
    if constexpr (T == DType::f16) store_u16(float_to_f16(r), y + i * 2);
    if constexpr (T == DType::bf16) store_u16(float_to_bf16(r), y + i * 2);
  }
}

template <DType T>
void row(const uint8_t* x, int64_t m, int64_t p, float scale, float* work, uint8_t* y) {
  for (int64_t i = 0; i < m; ++i) part<T>(x + i * p * kElementBytes<T>, p, work + i * p);
  across(work, m, p);
  finish<T>(work, m * p, scale, y);
}

}  // namespace

void fwht_cpu(const FwhtParams& q, const CpuExec& exec) {
  int64_t p = 1;
  while (q.n % (2 * p) == 0) p *= 2;
  const int64_t m = q.n == p ? 1 : q.n / p * 4;  // the odd factor is 3, 5 or 7, and H_12 = 3 * 4 takes two of the twos
  if (m > 1) p /= 4;
  if (m != 1 && m != 12 && m != 20 && m != 28)
    fail("fwht: the last dim of x must be m * 2^k with m one of 1, 12, 20, 28");
  const int64_t grain = 1 + (1 << 16) / q.n;

  if (q.dtype == DType::f64) {
    split(exec, q.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        double* y = static_cast<double*>(q.y) + r * q.n;
        for (int64_t i = 0; i < m; ++i) part(static_cast<const double*>(q.x) + r * q.x_stride + i * p, p, y + i * p);
        across(y, m, p);
        for (int64_t i = 0; i < q.n; ++i) y[i] *= q.scale;
      }
    });
    return;
  }

  bool out_of_memory = false;
  with_dtype(q.dtype, [&](auto type) {
    constexpr DType T = type.value;
    constexpr int64_t element = kElementBytes<T>;
    split(exec, q.rows, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float stack[kInL1];
      float* heap = nullptr;
      if (T != DType::f32 && q.n > kInL1) {
        heap = static_cast<float*>(malloc(static_cast<size_t>(q.n) * 4));
        if (!heap) return __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      }
      for (int64_t r = begin; r < end; ++r) {
        uint8_t* y = static_cast<uint8_t*>(q.y) + r * q.n * element;
        float* work = T == DType::f32 ? reinterpret_cast<float*>(y) : heap ? heap : stack;
        row<T>(static_cast<const uint8_t*>(q.x) + r * q.x_stride * element, m, p, static_cast<float>(q.scale), work, y);
      }
      free(heap);
    });
  });
  if (out_of_memory) fail("fwht: out of memory");
}

KK_END

KK_CPU_ENTRY(fwht, FwhtParams)
