// One task: some columns of the state of one value head of one sequence, through all tokens of the call. Bound by
// reading and writing the states once.
#include "kvkernels/ops/delta_rule_step.h"

#include "cpu/arena.h"
#include "cpu/delta_token.h"
#include "cpu/entry.h"
#include "cpu/split.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

namespace {

constexpr int64_t kPanel = 64;  // columns that stay in L1 from token to token: 32 KB at K = 128
constexpr int64_t kLine = 16;   // columns in a cache line of fp32: threads share none

// A task.
struct Columns {
  int64_t b, head, from, to;
};

template <DType S>
uint8_t* state_of(const DeltaRuleStepParams& p, int64_t slot, const Columns& task) {
  const int64_t at = slot * p.state_stride + task.head * p.in.K * p.in.V + task.from;
  return static_cast<uint8_t*>(p.state) + at * kElementBytes<S>;
}

// `ahead`: the state of the task after this one, or null.
template <DType S, bool CONVERT>
void step_columns(const DeltaRuleStepParams& p, const Columns& task, const uint8_t* ahead) {
  const DeltaInputs& in = p.in;
  const auto [b, head, from, to] = task;
  constexpr int64_t element = kElementBytes<S>;
  alignas(64) uint8_t scratch[kMaxDeltaDim * kPanel * element];  // the state of a token that is written nowhere
  const auto slot = [&](int64_t i) { return state_of<S>(p, i, task); };
  const auto in_slot = [&](const uint8_t* s) { return s == scratch ? (to - from) * element : in.V * element; };
  const int32_t* out = p.out_slots ? p.out_slots + (p.out_tokens ? b * in.T : b) : p.slots + b;
  DeltaToken x;
  const uint8_t* state = slot(p.slots[b]);
  for (int64_t t = 0; t < in.T; ++t) {
    if (p.parents && p.parents[b * in.T + t] != t - 1) {
      const int32_t parent = p.parents[b * in.T + t];
      state = slot(parent < 0 ? p.slots[b] : out[parent]);
    }
    const int32_t to_slot = p.out_tokens ? out[t] : *out;
    const bool last = t + 1 == in.T || (p.parents && p.parents[b * in.T + t + 1] != t);
    uint8_t* next = to_slot >= 0 ? slot(to_slot) : last ? nullptr : scratch;
    load_token(in, &p.gate, b, t, head, from, to, x);
    token_columns<S, CONVERT>(x, in.K, state, in_slot(state), next, in_slot(next), to - from, x.w,
                              t + 1 == in.T ? ahead : nullptr);
    store_row(in.q.dtype, x.w, to - from, p.o, ((b * in.T + t) * in.HV + head) * in.V + from);
    if (next) state = next;
  }
}

}  // namespace

void delta_rule_step_cpu(const DeltaRuleStepParams& p, const CpuExec& exec) {
  const DeltaInputs& in = p.in;
  const int64_t heads = in.B * in.HV;
  int64_t panel = in.T > 1 ? kPanel : round_up(in.V, kLine);
  while (panel > kLine && heads * ((in.V + panel - 1) / panel) < 4 * exec.threads && exec.threads > 1)
    panel = round_up(panel / 2, kLine);
  const int64_t panels = (in.V + panel - 1) / panel;
  const auto task = [&](int64_t i) {
    const int64_t from = i % panels * panel, to = from + panel < in.V ? from + panel : in.V;
    return Columns{i / panels / in.HV, i / panels % in.HV, from, to};
  };
  const auto write_zeros = [&](const Columns& x) {
    const int64_t size = in.q.dtype == DType::f32 ? 4 : 2;
    for (int64_t t = 0; t < in.T; ++t)
      memset(static_cast<uint8_t*>(p.o) + (((x.b * in.T + t) * in.HV + x.head) * in.V + x.from) * size, 0,
             static_cast<size_t>((x.to - x.from) * size));
  };
  const auto run = [&](auto type, auto convert) {
    constexpr DType S = type.value;
    split(exec, heads * panels, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t i = begin; i < end; ++i) {
        const Columns mine = task(i), next = task(i + 1 < end ? i + 1 : i);
        const int32_t slot = p.slots[mine.b], next_slot = p.slots[next.b];
        if (slot >= 0)
          step_columns<S, convert.value>(p, mine, next_slot >= 0 ? state_of<S>(p, next_slot, next) : nullptr);
        else
          write_zeros(mine);
      }
    });
  };
  if (p.state_dtype == DType::f32) return run(DTypeTag<DType::f32>{}, Int<0>{});
  if (p.state_dtype == DType::bf16) {
#if defined(__AVX512F__)
    if (cpu::has_avx512bf16()) return run(DTypeTag<DType::bf16>{}, Int<1>{});
#endif
    return run(DTypeTag<DType::bf16>{}, Int<0>{});
  }
  fail("delta_rule_step: dtype of state must be one of float32, bfloat16");
}

KK_END

KK_CPU_ENTRY(delta_rule_step, DeltaRuleStepParams)
