#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Decode tokens of one pool, un-rotated and with the key transform undone: k = (H k') / t + mu, v = H v'.
struct ReadKvParams {
  void* k;               // [T, Hkv, D] contiguous, dtype
  void* v;               // [T, Hkv, D] contiguous
  DType dtype;           // f32 f16 bf16
  const int64_t* slots;  // [T]  page * page_size + offset; < 0: the row is zero
  int64_t T, Hkv, D, page_size;
  Pool pool;
  KeyTransform transform;
};

namespace cpu {
void read_kv(const ReadKvParams& p, const CpuExec& exec);
}
namespace cuda {
void read_kv(const ReadKvParams& p, const CudaExec& exec);
}

}  // namespace kk
