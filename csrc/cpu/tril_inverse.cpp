// One task: an interval of matrices, each in L2. A matrix is filled up to a multiple of 16 with ones on the diagonal.
#include "kvkernels/ops/tril_inverse.h"

#include "cpu/arena.h"
#include "cpu/delta_rows.h"
#include "cpu/entry.h"
#include "cpu/matmul.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

constexpr int64_t kLd = kMaxTrilSize, kBlock = 16, kHalf = kMaxTrilSize / 2;

// A factor of a merge as the sum of up to two terms of its method.
struct Terms {
  alignas(64) float big[kHalf * kHalf], small[kHalf * kHalf];
};

float rounded(float x, TrilMethod method) {
  if (method == TrilMethod::blocked_bf16x3) return bf16_to_float(float_to_bf16(x));
  return bits_float((float_bits(x) + 0x1000u) & ~0x1fffu);  // tf32: to nearest, ties away from zero, as cvt.rna
}

// `rows` x `columns` of x to y, both multiples of 16.
void split_terms(const float* x, int64_t rows, int64_t columns, TrilMethod method, Terms& y) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float v = x[i * kLd + j], big = method == TrilMethod::blocked ? v : rounded(v, method);
      y.big[i * kHalf + j] = big;
      if (method == TrilMethod::blocked_bf16x3) y.small[i * kHalf + j] = rounded(v - big, method);
    }
}

// c [m, n] = a [m, k] b [k, n].
void product(int64_t m, int64_t n, int64_t k, const Terms& a, const Terms& b, TrilMethod method, float* c) {
  const Left big{a.big, kHalf, 1}, small{a.small, kHalf, 1};
  matmul(m, n, k, big, b.big, kHalf, c, kLd);
  if (method != TrilMethod::blocked_bf16x3) return;
  matmul(m, n, k, big, b.small, kHalf, c, kLd, Start::add);
  matmul(m, n, k, small, b.big, kHalf, c, kLd, Start::add);
}

struct Room {
  alignas(64) float minus_l[kLd * kLd], x[kLd * kLd], between[kHalf * kLd];
  Terms left, right;
};

// x = (I + L)^-1 for n rows, a multiple of 16; x begins as I.
void invert(int64_t n, TrilMethod method, Room& r) {
  if (method == TrilMethod::substitution) {
    triangle_solve<Part::solve_lower>(n, n, {r.minus_l, kLd, 1}, r.x, kLd);
    return;
  }
  for (int64_t b = 0; b < n; b += kBlock)
    triangle_solve<Part::solve_lower>(kBlock, kBlock, {r.minus_l + b * kLd + b, kLd, 1}, r.x + b * kLd + b, kLd);
  for (int64_t size = kBlock; size < n; size *= 2)
    for (int64_t b = 0; b + size < n; b += 2 * size) {
      const int64_t low = b + size, rows = n - low < size ? n - low : size;
      split_terms(r.minus_l + low * kLd + b, rows, size, method, r.left);
      split_terms(r.x + b * kLd + b, size, size, method, r.right);
      product(rows, size, size, r.left, r.right, method, r.between);
      split_terms(r.x + low * kLd + low, rows, rows, method, r.left);
      split_terms(r.between, rows, size, method, r.right);
      product(rows, size, rows, r.left, r.right, method, r.x + low * kLd + b);
    }
}

template <DType T>
void one_matrix(const uint8_t* a, int64_t n, TrilMethod method, uint8_t* inverse, Room& r) {
  constexpr int64_t element = kElementBytes<T>;
  const int64_t padded = round_up(n, kBlock);
  memset(r.minus_l, 0, static_cast<size_t>(padded * kLd) * 4);
  memset(r.x, 0, static_cast<size_t>(padded * kLd) * 4);
  for (int64_t i = 0; i < padded; ++i) {
    r.x[i * kLd + i] = 1.0f;
    if (i == 0 || i >= n) continue;
    load_row<T>(a + i * n * element, i, r.minus_l + i * kLd);
    scale_row(r.minus_l + i * kLd, -1.0f, i);
  }
  invert(padded, method, r);
  for (int64_t i = 0; i < n; ++i) store_row<T>(r.x + i * kLd, n, inverse + i * n * element);
}

}  // namespace

void tril_inverse_cpu(const TrilInverseParams& p, const CpuExec& exec) {
  with_dtype(p.dtype, [&](auto type) {
    const int64_t grain = 1 + (1 << 18) / (p.n * p.n * p.n), bytes = p.n * p.n * kElementBytes<type.value>;
    split(exec, p.batch, grain, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      Room room;
      for (int64_t b = begin; b < end; ++b)
        one_matrix<type.value>(static_cast<const uint8_t*>(p.a) + b * bytes, p.n, p.method,
                               static_cast<uint8_t*>(p.inverse) + b * bytes, room);
    });
  });
}

KK_END

KK_CPU_ENTRY(tril_inverse, TrilInverseParams)
