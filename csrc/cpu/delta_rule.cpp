// One task: a sequence, a key head and some of its lanes. A lane is a value head and a panel of 64 columns of V;
// columns of a state never meet, so that one head can be split over threads, and no bit depends on how.
#include "kvkernels/ops/delta_rule.h"

#include "cpu/delta_ahead.h"
#include "cpu/delta_chunk.h"
#include "cpu/delta_token.h"
#include "cpu/entry.h"

KK_BEGIN

namespace {

// How the work is cut.
struct Plan {
  int64_t panels, lanes;  // of a value head, of a key head
  int64_t parts;          // a key head's lanes are cut into
  int64_t tasks, threads;
};

Plan plan_of(const DeltaRuleParams& p, const CpuExec& exec) {
  const DeltaInputs& in = p.in;
  Plan plan;
  plan.panels = (in.V + kDeltaPanel - 1) / kDeltaPanel;
  plan.lanes = in.HV / in.H * plan.panels;
  int64_t tokens = 0, longest = 0;
  for (int64_t n = 0; n < in.N; ++n) {
    const DeltaSequence s(in, n);
    tokens += s.tokens();
    if (s.tokens() > longest) longest = s.tokens();
  }
  // Each part forms the products among keys again. No task should be more than a fourth of a thread's share ...
  plan.parts = 1;
  if (exec.threads > 1 && tokens) plan.parts = (4 * exec.threads * longest + tokens * in.H - 1) / (tokens * in.H);
  // ... and its states should stay in L2.
  const int64_t for_cache = (plan.lanes * in.K * kDeltaPanel * 4 + (1 << 19) - 1) >> 19;
  if (plan.parts < for_cache) plan.parts = for_cache;
  if (plan.parts > plan.lanes) plan.parts = plan.lanes;
  plan.tasks = in.N * in.H * plan.parts;
  plan.threads = plan.tasks < exec.threads ? plan.tasks : exec.threads;
  return plan;
}

// What one thread works with.
struct Room {
  DeltaKeys keys;
  DeltaHead head;
  float *n, *o, *row;  // [C][64], [C][64], [64]
  float* states;       // of the lanes of a task, [K][64] each
  uint32_t* words;     // [K / 2][64] a state in pairs of bf16 rows; null where queries are not bf16 as they are

  Room(const DeltaRuleParams& p, const Plan& plan, Arena& arena) : keys(p.in, arena), head(p.in, arena) {
    n = arena.take<float>(p.in.chunk * kDeltaPanel);
    o = arena.take<float>(p.in.chunk * kDeltaPanel);
    row = arena.take<float>(kDeltaPanel);
    words = nullptr;
    if (p.in.q.p && p.in.q.dtype == DType::bf16 && !p.in.vector_gate && p.in.K % 2 == 0 && cpu::has_avx512bf16())
      words = arena.take<uint32_t>(p.in.K / 2 * kDeltaPanel);
    states = arena.take<float>((plan.lanes + plan.parts - 1) / plan.parts * p.in.K * kDeltaPanel);
  }
};

// A value head's columns [from, to).
struct Lane {
  int64_t head, from, to;
  Lane(const DeltaRuleParams& p, const Plan& plan, int64_t key_head, int64_t lane)
      : head(key_head * (p.in.HV / p.in.H) + lane / plan.panels),
        from(lane % plan.panels * kDeltaPanel),
        to(from + kDeltaPanel < p.in.V ? from + kDeltaPanel : p.in.V) {}
};

void read_state(const DeltaRuleParams& p, int64_t n, const Lane& lane, float* S) {
  if (!p.in.initial_state) {
    memset(S, 0, static_cast<size_t>(p.in.K * kDeltaPanel) * 4);
    return;
  }
  const int64_t columns = lane.to - lane.from;
  const float* x = p.in.initial_state + (n * p.in.HV + lane.head) * p.in.K * p.in.V + lane.from;
  for (int64_t c = 0; c < p.in.K; ++c) {
    memcpy(S + c * kDeltaPanel, x + c * p.in.V, static_cast<size_t>(columns) * 4);
    memset(S + c * kDeltaPanel + columns, 0, static_cast<size_t>(kDeltaPanel - columns) * 4);
  }
}

// To state number `at` of [.., HV, K, V].
void write_state(const DeltaRuleParams& p, const float* S, const Lane& lane, float* states, int64_t at) {
  float* y = states + (at * p.in.HV + lane.head) * p.in.K * p.in.V + lane.from;
  for (int64_t c = 0; c < p.in.K; ++c)
    memcpy(y + c * p.in.V, S + c * kDeltaPanel, static_cast<size_t>(lane.to - lane.from) * 4);
}

// n <- w - e_factor n, rows of one lane.
void form_rows(const DeltaInputs& in, const DeltaHead& head, const DeltaSequence& s, int64_t begin, int64_t tokens,
               const Lane& lane, float* row, float* n) {
  const int64_t columns = lane.to - lane.from;
  with_dtype(in.v.dtype, [&](auto type) {
    for (int64_t i = 0; i < tokens; ++i, n += kDeltaPanel) {
      const F beta = F::fill(head.beta[i]), minus = F::fill(-head.e_factor[i]);
      const auto add = [&](F w, int64_t c) { fma(minus, F::load(n + c), beta * w).store(n + c); };
      if (columns == kDeltaPanel && !in.write.p) {
        const uint8_t* v = delta_row(in.v, s.batch, begin + i, lane.head) + lane.from * kElementBytes<type.value>;
        for (int64_t c = 0; c < kDeltaPanel; c += F::W) add(load<type.value>(v + c * kElementBytes<type.value>), c);
        continue;
      }
      load_columns(in.v, s.batch, begin + i, lane.head, lane.from, lane.to, row);
      if (in.write.p) {
        alignas(64) float write[kDeltaPanel];
        load_columns(in.write, s.batch, begin + i, lane.head, lane.from, lane.to, write);
        row_times(row, write, columns, row);
      }
      for (int64_t c = 0; c < columns; c += F::W) add(F::load(row + c), c);
    }
  });
}

uint8_t* out_row(const DeltaRuleParams& p, const DeltaSequence& s, int64_t token, const Lane& lane) {
  const int64_t element = p.in.q.dtype == DType::f32 ? 4 : 2;
  return static_cast<uint8_t*>(p.o) +
         (((s.batch * p.in.T + token) * p.in.HV + lane.head) * p.in.V + lane.from) * element;
}

// Asks for the lines that write_rows will write, or its stores would wait for them.
[[gnu::always_inline]] inline void ask_for_output(const DeltaRuleParams& p, const DeltaSequence& s, int64_t begin,
                                                  int64_t tokens, const Lane& lane) {
  const int64_t bytes = (lane.to - lane.from) * (p.in.q.dtype == DType::f32 ? 4 : 2);
  for (int64_t i = 0; i < tokens; ++i) {
    const uint8_t* row = out_row(p, s, begin + i, lane);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 1, 3);
  }
}

void write_rows(const DeltaRuleParams& p, const DeltaSequence& s, int64_t begin, int64_t tokens, const Lane& lane,
                const float* o) {
  const int64_t columns = lane.to - lane.from;
  uint8_t* y = out_row(p, s, begin, lane);
  with_dtype(p.in.q.dtype, [&](auto type) {
    const int64_t stride = p.in.HV * p.in.V * kElementBytes<type.value>;
    for (int64_t i = 0; i < tokens; ++i, o += kDeltaPanel, y += stride) {
      if (columns == kDeltaPanel)
        store_row<type.value>(o, kDeltaPanel, y);
      else
        store_row<type.value>(o, columns, y);
    }
  });
}

// o = q S of one lane.
void query_state(const DeltaInputs& in, const Room& room, const DeltaSequence& s, int64_t begin, const Lane& lane,
                 const float* S) {
  const int64_t tokens = room.keys.tokens;
  [[maybe_unused]] const uint8_t* q = delta_row(in.q, s.batch, begin, lane.head / (in.HV / in.H));
#if defined(__AVX512F__)
  if (room.words) {
    bf16_words(S, in.K, room.words);
    bf16_matmul(tokens, in.K, reinterpret_cast<const uint16_t*>(q), in.q.token, room.words, room.o);
    return;
  }
#endif
  matmul(tokens, lane.to - lane.from, in.K, {room.head.q, room.keys.ld, 1}, S, kDeltaPanel, room.o, kDeltaPanel);
}

// The tokens of room.keys on one lane's state.
void chunk_step(const DeltaRuleParams& p, const Room& room, const DeltaSequence& s, int64_t begin, const Lane& lane,
                const DeltaAhead& ahead, float* S) {
  const DeltaInputs& in = p.in;
  const DeltaHead& head = room.head;
  const int64_t C = room.keys.C, tokens = room.keys.tokens, columns = lane.to - lane.from;
  float *N = room.n, *o = room.o;

  ahead.take(0);
  matmul(tokens, columns, in.K, {head.e, room.keys.ld, 1}, S, kDeltaPanel, N, kDeltaPanel);
  form_rows(in, head, s, begin, tokens, lane, room.row, N);
  ahead.take(1);
  if (p.o) ask_for_output(p, s, begin, tokens, lane);
  triangle_solve<Part::solve_lower>(tokens, columns, {head.minus_l, C, 1}, N, kDeltaPanel);
  ahead.take(2);
  if (p.o) {
    query_state(in, room, s, begin, lane, S);
    triangle_matmul<Part::lower>(tokens, columns, {head.p, C, 1}, N, kDeltaPanel, o, kDeltaPanel, Start::scaled,
                                 head.q_factor);
    write_rows(p, s, begin, tokens, lane, o);
  }
  ahead.take(3);
  if (in.g.p && !in.vector_gate)
    for (int64_t i = 0; i < tokens; ++i) scale_row(N + i * kDeltaPanel, head.tail[i], kDeltaPanel);
  matmul(in.K, columns, tokens, {head.keys_t, C, 1}, N, kDeltaPanel, S, kDeltaPanel, Start::scaled, head.whole);
}

void run_task(const DeltaRuleParams& p, const Plan& plan, Room& room, int64_t n, int64_t key_head, int64_t first_lane,
              int64_t end_lane) {
  const DeltaSequence s(p.in, n);
  const auto state = [&](int64_t lane) { return room.states + (lane - first_lane) * p.in.K * kDeltaPanel; };
  for (int64_t l = first_lane; l < end_lane; ++l) read_state(p, n, Lane(p, plan, key_head, l), state(l));

  const int64_t stretch = !p.recurrent ? p.in.chunk : p.checkpoints ? p.checkpoint_every : s.end - s.begin;
  for (int64_t begin = s.begin; begin < s.end; begin += stretch) {
    const int64_t end = begin + stretch < s.end ? begin + stretch : s.end, done = end - s.begin;
    if (!p.recurrent) room.keys.read(p.in, s, begin, key_head);
    for (int64_t l = first_lane; l < end_lane; ++l) {
      const Lane lane(p, plan, key_head, l);
      if (p.recurrent) {
        delta_tokens(p.in, s.batch, begin, end, lane.head, lane.from, lane.to, state(l), kDeltaPanel, p.o);
      } else {
        if (l == first_lane || lane.from == 0) room.head.form(p.in, room.keys, s, begin, lane.head);
        chunk_step(p, room, s, begin, lane,
                   DeltaAhead(p.in, s, end, lane.head, lane.from, lane.to, l - first_lane, end_lane - first_lane),
                   state(l));
      }
      if (p.checkpoints && done % p.checkpoint_every == 0)
        write_state(p, state(l), lane, p.checkpoints,
                    delta_slots(p.in, n, s.begin, p.checkpoint_every).whole + done / p.checkpoint_every - 1);
    }
  }
  if (p.final_state)
    for (int64_t l = first_lane; l < end_lane; ++l)
      write_state(p, state(l), Lane(p, plan, key_head, l), p.final_state, n);
}

// What belongs to no sequence.
void write_zeros(const DeltaRuleParams& p) {
  const DeltaInputs& in = p.in;
  if (!in.cu_seqlens) return;
  if (p.o) {
    const int64_t row = in.HV * in.V * (in.q.dtype == DType::f32 ? 4 : 2), end = in.cu_seqlens[in.N];
    memset(static_cast<uint8_t*>(p.o) + end * row, 0, static_cast<size_t>((in.T - end) * row));
  }
  if (!p.checkpoints) return;
  int64_t next = 0;
  const auto zeros_to = [&](int64_t to) {
    const int64_t state = in.HV * in.K * in.V;
    if (to > next) memset(p.checkpoints + next * state, 0, static_cast<size_t>((to - next) * state) * 4);
  };
  for (int64_t n = 0; n < in.N; ++n) {
    const DeltaSequence s(in, n);
    const int64_t first = delta_slots(in, n, s.begin, p.checkpoint_every).whole;
    zeros_to(first);
    next = first + (s.end - s.begin) / p.checkpoint_every;
  }
  zeros_to(delta_whole_slots(in, p.checkpoint_every));
}

}  // namespace

int64_t delta_rule_workspace_cpu(const DeltaRuleParams& p, const CpuExec& exec) {
  const Plan plan = plan_of(p, exec);
  Arena order{nullptr}, room{nullptr};
  order.take<int32_t>(p.in.N);
  Room(p, plan, room);
  return order.used + plan.threads * room.used;
}

void delta_rule_cpu(const DeltaRuleParams& p, const CpuExec& exec) {
  const Plan plan = plan_of(p, exec);
  Arena arena{static_cast<uint8_t*>(p.workspace)}, room{nullptr};
  int32_t* order = arena.take<int32_t>(p.in.N);
  Room(p, plan, room);
  long_first(p.in, order);
  write_zeros(p);
  uint8_t* const rooms = arena.base + arena.used;
  share_tasks(exec, plan.threads, plan.tasks, [&](int thread, const auto& next) {
    Arena own{rooms + thread * room.used};
    Room mine(p, plan, own);
    for (int64_t task; next(task);) {
      const int64_t part = task % plan.parts, head = task / plan.parts % p.in.H;
      run_task(p, plan, mine, order[task / plan.parts / p.in.H], head, plan.lanes * part / plan.parts,
               plan.lanes * (part + 1) / plan.parts);
    }
  });
}

KK_END

KK_CPU_ENTRY_R(int64_t, delta_rule_workspace, DeltaRuleParams)
KK_CPU_ENTRY(delta_rule, DeltaRuleParams)
