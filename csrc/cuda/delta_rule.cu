#include "kvkernels/ops/delta_rule.h"

#include "cuda/delta_recurrent.cuh"
#include "cuda/delta_scan.cuh"

namespace kk::cuda {

int64_t delta_rule_workspace(const DeltaRuleParams& p, const CudaExec&) {
  return p.recurrent ? 0 : delta_intra_bytes(p.in);
}

void delta_rule(const DeltaRuleParams& p, const CudaExec& exec) {
  if (p.recurrent) return delta_rule_recurrent(p, exec);
  delta_scan({p, nullptr, nullptr}, delta_intra(p.in, p.workspace, exec), exec);
}

}  // namespace kk::cuda
