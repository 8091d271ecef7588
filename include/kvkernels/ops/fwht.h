#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// y = scale * H x over the last dim, H symmetric with entries +-1. n = m * 2^k with m in {1, 12, 20, 28}: H = H_m (x) H_2^k,
// H_m the symmetric Paley-II matrix (core/hadamard.h). 40 * 2^k is 20 * 2^(k+1).
struct FwhtParams {
  const void* x;  // [rows, n], rows x_stride elements apart
  void* y;        // [rows, n] contiguous, same dtype
  int64_t rows, n, x_stride;
  DType dtype;  // f32 f16 bf16 f64; computed in fp32 (f64: in fp64)
  double scale;
};

namespace cpu {
void fwht(const FwhtParams& p, const CpuExec& exec);
}
namespace cuda {
void fwht(const FwhtParams& p, const CudaExec& exec);
}

}  // namespace kk
