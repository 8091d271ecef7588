// One task: an interval of rows. Bound by reading `outs` once; every row is summed in fp32.
#include "kvkernels/ops/merge_states.h"

#include "cpu/entry.h"
#include "cpu/row_vectors.h"
#include "cpu/split.h"

KK_BEGIN

namespace {

constexpr int64_t kBlock = 256;  // channels whose sums stay in L1

float weighed_lse(const MergeStatesParams& p, int64_t s, int64_t row) {
  const float lse = p.num_parts ? p.lses[s][row] : p.lses[0][s * p.N + row];
  if (lse == -INFINITY) return lse;  // not 0 * -inf
  return lse * (p.scale ? p.scale[s] : 1.0f) * (p.temperature ? p.temperature[s] : 1.0f);
}

template <DType T>
void merge_row(const MergeStatesParams& p, int64_t row) {
  constexpr int64_t element = kElementBytes<T>;
  const auto out_of = [&](int64_t s) {
    const void* part = p.num_parts ? p.outs[s] : p.outs[0];
    return static_cast<const uint8_t*>(part) + ((p.num_parts ? 0 : s * p.N) + row) * p.D * element;
  };
  uint8_t* out = static_cast<uint8_t*>(p.out) + row * p.D * element;
  float top = -INFINITY;
  bool nan = false;
  for (int64_t s = 0; s < p.S; ++s) {
    const float lse = weighed_lse(p, s, row);
    nan |= lse != lse;
    if (lse > top) top = lse;
  }
  // All states empty: (-inf) - (-inf) is NaN, so say plainly that none of them weighs anything.
  if (top == -INFINITY && !nan) {
    memset(out, 0, static_cast<size_t>(p.D * element));
    p.lse[row] = -INFINITY;
    return;
  }
  float sum = 0.0f;
  for (int64_t s = 0; s < p.S; ++s) sum += ::expf(weighed_lse(p, s, row) - top);
  p.lse[row] = top + ::logf(sum);
  const float inv = 1.0f / sum;
  for (int64_t begin = 0; begin < p.D; begin += kBlock) {
    const int64_t n = p.D - begin < kBlock ? p.D - begin : kBlock, whole = n / F::W * F::W;
    alignas(64) float acc[kBlock + F::W] = {};
    for (int64_t s = 0; s < p.S; ++s) {
      const float weight = ::expf(weighed_lse(p, s, row) - top) * inv;
      if (weight == 0.0f) continue;  // not 0 * out: an empty state's out may be NaN
      const uint8_t* x = out_of(s) + begin * element;
      const F w = F::fill(weight);
      for (int64_t i = 0; i < whole; i += F::W) fma(w, load<T>(x + i * element), F::load(acc + i)).store(acc + i);
      if (whole < n) {
        alignas(64) uint8_t tail[F::W * element] = {};
        memcpy(tail, x + whole * element, static_cast<size_t>((n - whole) * element));
        fma(w, load<T>(tail), F::load(acc + whole)).store(acc + whole);
      }
    }
    uint8_t* y = out + begin * element;
    for (int64_t i = 0; i < whole; i += F::W) store<T>(F::load(acc + i), y + i * element);
    if (whole < n) {
      alignas(64) uint8_t tail[F::W * element];
      store<T>(F::load(acc + whole), tail);
      memcpy(y + whole * element, tail, static_cast<size_t>((n - whole) * element));
    }
  }
}

}  // namespace

void merge_states_cpu(const MergeStatesParams& p, const CpuExec& exec) {
  with_dtype(p.dtype, [&](auto type) {
    const int64_t elements_per_thread = 1 << 16, per_row = p.S * p.D + 1;
    split(exec, p.N, (elements_per_thread + per_row - 1) / per_row, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_row<type.value>(p, row);
    });
  });
}

KK_END

KK_CPU_ENTRY(merge_states, MergeStatesParams)
