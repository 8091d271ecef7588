#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Rotate, quantise, pack and scatter new keys and values into the pages of one pool.
struct WriteKvParams {
  const void* k;  // [T, Hkv, D] dtype, strides in elements
  const void* v;  // [T, Hkv, D] dtype
  int64_t k_token, k_head, v_token, v_head;
  DType dtype;           // f32 f16 bf16
  const int64_t* slots;  // [T]  page * page_size + offset; < 0: the token is skipped
  int64_t T, Hkv, D, page_size;
  Pool pool;  // per-token formats only (bind refuses kivi2 keys)
  KeyTransform transform;
};

namespace cpu {
void write_kv(const WriteKvParams& p, const CpuExec& exec);
}
namespace cuda {
void write_kv(const WriteKvParams& p, const CudaExec& exec);
}

}  // namespace kk
