// What delta_rule, its backward and delta_rule_step are given alike.
#pragma once
#include <optional>

#include "bind/check.h"
#include "kvkernels/delta.h"

namespace kk::bind {

struct DeltaTensors {
  const std::optional<Tensor>& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& beta;
  const std::optional<Tensor>& g;
  const std::optional<Tensor>& erase;
  const std::optional<Tensor>& write;
};

// Binds B T H K HV V. Without `several` the tensors lack the dim T, which is then 1.
DeltaInputs check_delta(Check& c, const DeltaTensors& t, bool several, double scale, bool l2norm, int64_t rule);

// Of [B, T, heads, n], or [B, heads, n] without `several`; of a View{} none.
DeltaRows delta_rows(const View& v, bool several);

// The sequences, their first states, and the chunk, a divisor of `every`; none given: the fastest one here that is.
void check_sequences(Check& c, DeltaInputs& in, const std::optional<Tensor>& initial_state,
                     const std::optional<Tensor>& cu_seqlens, std::optional<int64_t> chunk, int64_t every);

// For an op to write and return, contiguous.
Tensor new_like(Check& c, const char* name, const View& like);
Tensor new_f32(Check& c, const char* name, const int64_t* size, int64_t dim);
// What an op returns for a tensor that was not asked for: [0], since no output may be absent.
Tensor no_tensor(const Check& c);

}  // namespace kk::bind
