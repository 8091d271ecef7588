// Four kernels, in fp32 workspaces: what does not depend on the states (delta_intra), the states and N again (delta_scan),
// their gradients (delta_reverse), and those of the inputs (delta_gradients). Two states a chunk are kept, 2 K V numbers
// for 64 tokens. Checkpoints are not read: the gradients of the states are as serial as the states.
#include "kvkernels/ops/delta_rule_backward.h"

#include "cuda/delta_gradients.cuh"
#include "cuda/delta_reverse.cuh"
#include "cuda/delta_scan.cuh"

namespace kk::cuda {
namespace {

bool per_channel(const DeltaInputs& in) { return in.g.p && in.vector_gate; }

DeltaRuleBackwardParams in_own_chunks(DeltaRuleBackwardParams p) {
  p.in.chunk = kBackwardChunk;
  return p;
}

// Places in the workspace, one after the other, of whole cache lines.
struct BackwardPlaces {
  int64_t intra, n, dr, states, dstates, dq, dk, bytes = 0;
  explicit BackwardPlaces(const DeltaInputs& in) {
    const int64_t slots = delta_begun_slots(in, kBackwardChunk), heads = slots * in.HV;
    const auto place = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 127) / 128 * 128;
      return at;
    };
    const int64_t f32 = sizeof(float);
    intra = place(delta_intra_bytes(in, !per_channel(in)));
    n = place(heads * kBackwardChunk * in.V * f32), dr = place(heads * kBackwardChunk * in.V * f32);
    states = place(heads * in.K * in.V * f32), dstates = place(heads * in.K * in.V * f32);
    dk = place(slots * in.H * kBackwardChunk * in.K * f32);
    dq = in.q.p ? place(slots * in.H * kBackwardChunk * in.K * f32) : dk;
  }
};

}  // namespace

int64_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& p, const CudaExec&) {
  return BackwardPlaces(in_own_chunks(p).in).bytes;
}

void delta_rule_backward(const DeltaRuleBackwardParams& p, const CudaExec& exec) {
  const DeltaRuleBackwardParams own = in_own_chunks(p);
  const DeltaInputs& in = own.in;
  const BackwardPlaces places(in);
  const auto at = [&](int64_t place) { return reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + place); };
  const DeltaIntra intra = delta_intra(in, at(places.intra), exec, !per_channel(in));
  DeltaScan scan{};
  scan.in = in, scan.n = at(places.n), scan.states = at(places.states);
  delta_scan(scan, intra, exec);

  const BackwardArgs a{
      own, {intra, at(places.n), at(places.dr), at(places.states), at(places.dstates), at(places.dq), at(places.dk)}};
  const unsigned heads = static_cast<unsigned>(in.HV), key_heads = static_cast<unsigned>(in.H);
  const unsigned panels = static_cast<unsigned>((in.V + kReversePanel - 1) / kReversePanel);
  const unsigned slots = static_cast<unsigned>(delta_begun_slots(in, in.chunk) + (in.cu_seqlens ? 1 : 0));
  const auto run = [&](auto reverse, auto gradients) {
    const dim3 threads(kDeltaThreads);
    launch(reverse, dim3(static_cast<unsigned>(in.N), heads, panels), threads,
           ReverseLayout(in.K).total * sizeof(float), exec.stream, a);
    if (slots > 0)
      launch(gradients, dim3(slots, key_heads), threads, GradientsLayout().total * sizeof(float), exec.stream, a);
  };
  const auto run_for = [&](auto channels) {
    constexpr bool PerChannel = channels.value != 0;
    if (in.k.dtype == DType::f32)
      run(delta_reverse_kernel<Operands::tf32x3, PerChannel>, delta_gradients_kernel<Operands::tf32x3, PerChannel>);
    else
      run(delta_reverse_kernel<Operands::tf32, PerChannel>, delta_gradients_kernel<Operands::tf32, PerChannel>);
  };
  per_channel(in) ? run_for(Int<1>{}) : run_for(Int<0>{});
}

}  // namespace kk::cuda
