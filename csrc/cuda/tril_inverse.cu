// One block per matrix, which is read once, written once and stays in shared memory in between: [n'][n' + 4], n' the next 16
// times a power of two. Rows of zeros, which stand for those of a unit matrix, complete it.
#include "kvkernels/ops/tril_inverse.h"

#include "cuda/delta_rows.cuh"
#include "cuda/tril_blocks.cuh"

namespace kk::cuda {
namespace {

constexpr int kThreads = 256;

// Row by row in place: row i of the inverse takes row i of L, and the rows of the inverse before it.
__device__ __forceinline__ void substitute(float* x, int ld, int n) {
  const int column = threadIdx.x;
  if (column < n) x[column] = column == 0 ? 1.0f : 0.0f;
  for (int i = 1; i < n; ++i) {
    float* row = x + i * ld;
    float sum = 0.0f;
    if (column < i) {
      sum = -row[column];
      for (int m = column + 1; m < i; ++m) sum = fmaf(-row[m], x[m * ld + column], sum);
    }
    __syncthreads();
    if (column < n) row[column] = column < i ? sum : column == i ? 1.0f : 0.0f;
    __syncthreads();
  }
}

template <TrilMethod M>
__global__ __launch_bounds__(kThreads) void tril_inverse_kernel(TrilInverseParams p, int padded) {
  KK_DYN_SMEM(float, x);
  const int n = static_cast<int>(p.n), ld = padded + 4;
  const int64_t first = blockIdx.x * p.n * p.n;
  for (int i = threadIdx.x; i < padded * padded; i += kThreads) {
    const int row = i / padded, column = i % padded;
    x[row * ld + column] = row < n && column < row ? read_number(p.dtype, p.a, first + row * n + column) : 0.0f;
  }
  __syncthreads();
  if constexpr (M == TrilMethod::substitution) {
    substitute(x, ld, n);
  } else {
    constexpr Operands kOperands = M == TrilMethod::blocked        ? Operands::fp32
                                   : M == TrilMethod::blocked_tf32 ? Operands::tf32
                                                                   : Operands::bf16x3;
    invert_unit_lower<kOperands>(x, ld, x + padded * ld, padded);
  }
  for (int i = threadIdx.x; i < n * n; i += kThreads)
    write_number(p.dtype, p.inverse, first + i, x[i / n * ld + i % n]);
}

}  // namespace

void tril_inverse(const TrilInverseParams& p, const CudaExec& exec) {
  if (p.batch == 0) return;
  if (p.batch >> 31) fail("tril_inverse: too many matrices for one launch on CUDA");
  int padded = 16;
  while (padded < p.n) padded *= 2;
  const size_t floats = padded * (padded + 4) + (padded > 16 ? tril_scratch(padded) : 0);
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kThreads), floats * sizeof(float), exec.stream, p,
           padded);
  };
  switch (p.method) {
    case TrilMethod::substitution:
      return run(tril_inverse_kernel<TrilMethod::substitution>);
    case TrilMethod::blocked:
      return run(tril_inverse_kernel<TrilMethod::blocked>);
    case TrilMethod::blocked_tf32:
      return run(tril_inverse_kernel<TrilMethod::blocked_tf32>);
    case TrilMethod::blocked_bf16x3:
      return run(tril_inverse_kernel<TrilMethod::blocked_bf16x3>);
  }
}

}  // namespace kk::cuda
