#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

constexpr int64_t kMaxTrilSize = 128;

// How (I + L)^-1 is found. substitution: forward substitution by rows. The others substitute within 16 x 16 blocks on the
// diagonal and merge them pairwise, inv_21 = -inv_22 L_21 inv_11, with products of
//   blocked       fp32
//   blocked_tf32  operands rounded to 10 mantissa bits
//   blocked_bf16x3  operands as two bf16 terms, the product of the small terms left out
// Sums are fp32. No powers of L are formed: those explode for similar keys though the inverse is tame.
// Source: Sobczyk et al. 2026, arXiv:2605.21325.
enum class TrilMethod : int32_t { substitution = 0, blocked = 1, blocked_tf32 = 2, blocked_bf16x3 = 3 };

// inverse_b = (I + tril(a_b, -1))^-1; what a has on and above the diagonal is not read.
struct TrilInverseParams {
  const void* a;     // [batch, n, n] contiguous, dtype
  void* inverse;     // [batch, n, n] contiguous, dtype; zeros above the diagonal
  int64_t batch, n;  // n 1 .. kMaxTrilSize
  DType dtype;       // f32 f16 bf16
  TrilMethod method;
};

namespace cpu {
void tril_inverse(const TrilInverseParams& p, const CpuExec& exec);
}
namespace cuda {
void tril_inverse(const TrilInverseParams& p, const CudaExec& exec);
}

}  // namespace kk
