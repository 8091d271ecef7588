// The part of a chunked delta rule that is serial in the chunks: states, outputs, and what the backward pass wants of them.
#pragma once
#include "cuda/delta_intra.cuh"
#include "kvkernels/ops/delta_rule.h"

namespace kk::cuda {

// Every output may be null, o with a q too.
struct DeltaScan : DeltaRuleParams {
  float* n;       // [delta_begun_slots][HV][C][V] N of each chunk; rows past its last token are not written
  float* states;  // [delta_begun_slots][HV][K][V] the state before each chunk
};
// `intra` is what delta_intra() made of p.in.
void delta_scan(const DeltaScan& p, const DeltaIntra& intra, const CudaExec& exec);

}  // namespace kk::cuda
