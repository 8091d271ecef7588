#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

// Re-encode whole pages: dst[pairs[i][1]] = encode(decode(src[pairs[i][0]])), all KV heads, decoded to fp32.
struct PackPagesParams {
  Pool src, dst;
  const int32_t* pairs;  // [N, 2]  source page, destination page; a pair with a negative entry is skipped
  int64_t N, Hkv, D, page_size;
  KeyTransform transform;
};

namespace cpu {
void pack_pages(const PackPagesParams& p, const CpuExec& exec);
}
namespace cuda {
void pack_pages(const PackPagesParams& p, const CudaExec& exec);
}

}  // namespace kk
