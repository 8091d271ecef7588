// A unit is a sequence and a key head, whose dq and dk are sums over its value heads in their order. It is taken in
// segments from the last to the first: forwards once more, keeping the state before every chunk and N, then back
// through the chunks.
//
// One task is a unit, where there are enough of them for the threads. Else the threads work on units together: panels
// of V go forwards, then backwards with the gradient of the state, keeping that too before every chunk, and then every
// chunk's gradients are a task. Both ways every number is the same sum in the same order.
#include "kvkernels/ops/delta_rule_backward.h"

#include "cpu/delta_chunk_gradients.h"
#include "cpu/delta_tasks.h"
#include "cpu/entry.h"
#include "kvkernels/core/one_of.h"

KK_BEGIN

namespace {

constexpr int64_t kSegment = 512;  // most tokens whose states before every chunk are kept

struct Plan {
  bool together;
  int64_t threads, units;    // units that are worked on at once
  int64_t panels, panel;     // of V, and their columns
  int64_t group, stretches;  // value heads of a unit; most segments from one checkpoint to the next
  int64_t chunks, kept;      // most chunks of a segment; those of which gradients of states are kept
};

Plan plan_of(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  const DeltaInputs& in = p.in;
  const int64_t threads = exec.threads, units = in.N * in.H, ldv = round_up(in.V, 16);
  int64_t tokens = 0, longest = 0;
  for (int64_t n = 0; n < in.N; ++n) {
    const int64_t t = DeltaSequence(in, n).tokens();
    tokens += t * in.H;
    if (t > longest) longest = t;
  }
  Plan plan;
  // How long the slowest thread works if units are tasks, in tokens; equal units are known, others bounded.
  const int64_t slowest = longest * units == tokens ? (units + threads - 1) / threads * longest
                                                    : (tokens + longest * (threads - 1)) / threads;
  plan.together = threads > 1 && 4 * threads * slowest > 5 * tokens;
  plan.threads = plan.together || units >= threads ? threads : units;
  plan.units = plan.threads < units ? plan.threads : units;
  plan.group = in.HV / in.H;
  plan.panels = 1;
  if (plan.together && units) plan.panels = (threads + plan.units * plan.group - 1) / (plan.units * plan.group);
  plan.panel = round_up((ldv + plan.panels - 1) / plan.panels, 16);
  plan.panels = (ldv + plan.panel - 1) / plan.panel;
  const int64_t apart = p.checkpoints && p.checkpoint_every < longest ? p.checkpoint_every : longest;
  plan.stretches = (apart + kSegment - 1) / kSegment;
  plan.chunks = ((apart < kSegment ? apart : kSegment) + in.chunk - 1) / in.chunk;
  plan.kept = plan.together ? plan.chunks : 1;
  return plan;
}

// A sequence and a key head on its way through its segments. States [ldv][ld] stand side by side for the value heads.
struct Unit {
  DeltaSequence s;
  int64_t n = 0, key_head = 0;
  int64_t stretch = 0, begin = 0, end = 0;  // the stretch from one checkpoint to the next, and the segment; tokens
  bool first = false;                       // segment of the unit: the last of the sequence
  float* starts = nullptr;                  // [stretches][group] states before the segments of a stretch
  float* states = nullptr;                  // [chunks][group] states before the chunks of the segment
  float* N = nullptr;                       // [chunks][group][C][ldv]
  float* dS = nullptr;                      // [kept + 1][group]
  float* rows = nullptr;                    // [kept][group][2 C][ldv]
};

class Work {
 public:
  Work(const DeltaRuleBackwardParams& p, const Plan& plan)
      : p_(p),
        in_(p.in),
        plan_(plan),
        z_(p.in),
        states_(plan.group * z_.state),
        apart_(p.checkpoints ? p.checkpoint_every : 0) {}

  // Memory of a unit; with arena.base == nullptr it is only counted.
  void place(Unit& u, Arena& arena) const {
    const int64_t tokens = plan_.group * z_.C * z_.ldv;
    u.starts = arena.take<float>(plan_.stretches * states_);
    u.states = arena.take<float>(plan_.chunks * states_);
    u.N = arena.take<float>(plan_.chunks * tokens);
    u.dS = arena.take<float>((plan_.kept + 1) * states_);
    u.rows = arena.take<float>(plan_.kept * 2 * tokens);
  }

  void open(Unit& u, int64_t n, int64_t key_head) const {
    u.s = DeltaSequence(in_, n);
    u.n = n;
    u.key_head = key_head;
    u.stretch = u.begin = u.end = u.s.end;
    if (u.s.tokens() || !p_.dinitial) return;
    for (int64_t g = 0; g < plan_.group; ++g) {  // nothing happens to the state of no tokens
      float* to = p_.dinitial + caller_state(u, n, g);
      const size_t bytes = static_cast<size_t>(z_.K * z_.V) * 4;
      p_.d_final ? memcpy(to, p_.d_final + caller_state(u, n, g), bytes) : memset(to, 0, bytes);
    }
  }

  // Goes to the segment before; false if there is none.
  bool next(Unit& u) const {
    u.first = u.end == u.s.end && u.begin == u.end;
    if (u.begin == u.s.begin) return false;
    u.end = u.begin;
    if (u.begin == u.stretch) {
      const int64_t apart = apart_ ? apart_ : u.s.tokens();
      u.stretch = u.s.begin + (u.end - u.s.begin - 1) / apart * apart;
    }
    u.begin = u.stretch + (u.end - u.stretch - 1) / kSegment * kSegment;
    return true;
  }
  int64_t chunks(const Unit& u) const { return (u.end - u.begin + z_.C - 1) / z_.C; }

  // States before the chunks of the segment, and N: value heads [g0, g1), rows [from, to) of states.
  void forwards(DeltaChunkGradients& chunk, const Unit& u, int64_t g0, int64_t g1, int64_t from, int64_t to) const {
    const int64_t segment = (u.begin - u.stretch) / kSegment, count = chunks(u);
    if (u.end == u.s.end || (u.end - u.s.begin) % apart_of(u) == 0) starts(chunk, u, g0, g1, from, to);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = u.begin + c * z_.C;
      chunk.read_forwards(u.s, at, u.key_head);
      for (int64_t g = g0; g < g1; ++g) {
        float* S = state(u.states, c, g);
        if (c == 0) copy_rows(state(u.starts, segment, g), S, from, to);
        chunk.forwards(u.s, at, head(u, g), from, to, S, N(u, c, g), c + 1 < count ? S + states_ : nullptr);
      }
    }
  }

  // The gradient of the state back through chunk c.
  void scan(DeltaChunkGradients& chunk, const Unit& u, int64_t c, int64_t g, int64_t from, int64_t to) const {
    if (c + 1 == chunks(u)) {
      float* last = state(u.dS, (c + 1) % (plan_.kept + 1), g);
      const float* d_final = p_.d_final ? p_.d_final + caller_state(u, u.n, g) : nullptr;
      if (u.first)
        turn_in(z_, d_final, from, to, last);
      else if (last != state(u.dS, 0, g))
        copy_rows(state(u.dS, 0, g), last, from, to);
    }
    float* before = state(u.dS, c % (plan_.kept + 1), g);
    chunk.scan(u.s, u.begin + c * z_.C, head(u, g), from, to, state(u.dS, (c + 1) % (plan_.kept + 1), g), rows(u, c, g),
               before);
    if (c == 0 && u.begin == u.s.begin && p_.dinitial)
      turn_out(z_, before, from, to, p_.dinitial + caller_state(u, u.n, g));
  }

  void gradients(DeltaChunkGradients& chunk, const Unit& u, int64_t c, int64_t g) const {
    chunk.gradients(u.s, u.begin + c * z_.C, head(u, g), state(u.states, c, g), N(u, c, g),
                    state(u.dS, (c + 1) % (plan_.kept + 1), g), rows(u, c, g));
  }

  // ---- ways through a segment

  void alone(DeltaChunkGradients& chunk, Unit& u) const {
    while (next(u)) {
      forwards(chunk, u, 0, plan_.group, 0, z_.ldv);
      for (int64_t c = chunks(u) - 1; c >= 0; --c)
        back_through(chunk, u, c, [&](int64_t g) {
          scan(chunk, u, c, g, 0, z_.ldv);
          gradients(chunk, u, c, g);
        });
    }
  }
  void scan_task(DeltaChunkGradients& chunk, const Unit& u, int64_t g, int64_t from, int64_t to) const {
    for (int64_t c = chunks(u) - 1; c >= 0; --c) {
      const int64_t at = u.begin + c * z_.C;
      chunk.read(u.s, at, u.key_head);
      chunk.form(u.s, at, head(u, g));
      scan(chunk, u, c, g, from, to);
    }
  }
  void gradients_task(DeltaChunkGradients& chunk, const Unit& u, int64_t c) const {
    back_through(chunk, u, c, [&](int64_t g) { gradients(chunk, u, c, g); });
  }

 private:
  const DeltaRuleBackwardParams& p_;
  const DeltaInputs& in_;
  const Plan& plan_;
  DeltaBackwardSizes z_;
  int64_t states_;  // floats of a unit's states at one point
  int64_t apart_;   // tokens from one checkpoint to the next, or 0

  int64_t apart_of(const Unit& u) const { return apart_ ? apart_ : u.s.tokens(); }
  int64_t head(const Unit& u, int64_t g) const { return u.key_head * plan_.group + g; }
  // Where a state of [.., HV, K, V] begins.
  int64_t caller_state(const Unit& u, int64_t number, int64_t g) const {
    return (number * in_.HV + head(u, g)) * z_.K * z_.V;
  }
  float* state(float* x, int64_t i, int64_t g) const { return x + i * states_ + g * z_.state; }
  float* N(const Unit& u, int64_t c, int64_t g) const { return u.N + (c * plan_.group + g) * z_.C * z_.ldv; }
  float* rows(const Unit& u, int64_t c, int64_t g) const {
    return u.rows + (c % plan_.kept * plan_.group + g) * 2 * z_.C * z_.ldv;
  }
  void copy_rows(const float* x, float* y, int64_t from, int64_t to) const {
    memcpy(y + from * z_.ld, x + from * z_.ld, static_cast<size_t>((to - from) * z_.ld) * 4);
  }

  // States where the segments of a stretch start.
  void starts(DeltaChunkGradients& chunk, const Unit& u, int64_t g0, int64_t g1, int64_t from, int64_t to) const {
    const int64_t stretch = (u.stretch - u.s.begin) / apart_of(u);
    const float* states = stretch ? p_.checkpoints : in_.initial_state;
    const int64_t number = stretch ? delta_slots(in_, u.n, u.s.begin, apart_).whole + stretch - 1 : u.n;
    for (int64_t g = g0; g < g1; ++g)
      turn_in(z_, states ? states + caller_state(u, number, g) : nullptr, from, to, state(u.starts, 0, g));
    for (int64_t at = u.stretch; at < u.begin; at += z_.C) {
      const int64_t i = (at - u.stretch) / kSegment, into = (at - u.stretch) % kSegment;
      chunk.read_forwards(u.s, at, u.key_head);
      for (int64_t g = g0; g < g1; ++g)
        chunk.forwards(u.s, at, head(u, g), from, to, state(u.starts, into ? i + 1 : i, g), N(u, 0, g),
                       state(u.starts, i + 1, g));
    }
  }

  template <typename G>
  void back_through(DeltaChunkGradients& chunk, const Unit& u, int64_t c, const G& f) const {
    const int64_t at = u.begin + c * z_.C;
    chunk.read(u.s, at, u.key_head);
    for (int64_t g = 0; g < plan_.group; ++g) {
      chunk.form(u.s, at, head(u, g));
      f(g);
    }
    chunk.write_key_gradients(u.s, at, u.key_head);
  }
};

// Gradients of the tokens that belong to no sequence.
void write_zeros(const DeltaRuleBackwardParams& p) {
  const DeltaInputs& in = p.in;
  if (!in.cu_seqlens) return;
  const int64_t end = in.cu_seqlens[in.N];
  const auto zeros = [&](void* x, int64_t row, DType type) {
    row *= type == DType::f32 ? 4 : 2;
    if (x) memset(static_cast<uint8_t*>(x) + end * row, 0, static_cast<size_t>((in.T - end) * row));
  };
  zeros(p.dq, in.H * in.K, in.q.dtype);
  zeros(p.dk, in.H * in.K, in.k.dtype);
  zeros(p.dv, in.HV * in.V, in.v.dtype);
  zeros(p.dbeta, in.HV, DType::f32);
  zeros(p.dg, in.vector_gate ? in.HV * in.K : in.HV, DType::f32);
  zeros(p.derase, in.HV * in.K, DType::f32);
  zeros(p.dwrite, in.HV * in.V, DType::f32);
}

// The workspace: order of the sequences, units, then what threads work with.
struct Memory {
  int32_t* order;
  Unit* units;
  int64_t unit_bytes, room_bytes, bytes;
  uint8_t *unit_memory, *rooms;

  Memory(const DeltaRuleBackwardParams& p, const Plan& plan, const Work& work, uint8_t* workspace) {
    Arena arena{workspace}, unit{nullptr}, room{nullptr};
    order = arena.take<int32_t>(p.in.N);
    units = arena.take<Unit>(plan.units);
    Unit none{DeltaSequence(p.in, 0)};
    work.place(none, unit);
    DeltaChunkGradients(p, room);
    unit_bytes = unit.used;
    room_bytes = room.used;
    unit_memory = arena.take<uint8_t>(plan.units * unit_bytes);
    rooms = arena.take<uint8_t>(plan.threads * room_bytes);
    bytes = arena.used;
  }
  Arena unit(int64_t i) const { return {unit_memory + i * unit_bytes}; }
  Arena room(int64_t thread) const { return {rooms + thread * room_bytes}; }
};

}  // namespace

int64_t delta_rule_backward_workspace_cpu(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  if (p.in.N == 0) return 0;
  const Plan plan = plan_of(p, exec);
  return Memory(p, plan, Work(p, plan), nullptr).bytes;
}

void delta_rule_backward_cpu(const DeltaRuleBackwardParams& p, const CpuExec& exec) {
  write_zeros(p);
  if (p.in.N == 0) return;
  const Plan plan = plan_of(p, exec);
  const Work work(p, plan);
  const Memory memory(p, plan, work, static_cast<uint8_t*>(p.workspace));
  const int64_t H = p.in.H, all = p.in.N * H;
  long_first(p.in, memory.order);
  for (int64_t i = 0; i < plan.units; ++i) {
    Arena arena = memory.unit(i);
    work.place(memory.units[i], arena);
  }
  if (!plan.together) {
    share_tasks(exec, plan.threads, all, [&](int thread, const auto& next) {
      Arena arena = memory.room(thread);
      DeltaChunkGradients chunk(p, arena);
      Unit& u = memory.units[thread];
      for (int64_t task; next(task);) {
        work.open(u, memory.order[task / H], task % H);
        work.alone(chunk, u);
      }
    });
    return;
  }
  for (int64_t first = 0; first < all; first += plan.units) {
    int64_t units = all - first < plan.units ? all - first : plan.units;
    for (int64_t i = 0; i < units; ++i) work.open(memory.units[i], memory.order[(first + i) / H], (first + i) % H);
    for (;;) {
      for (int64_t i = 0; i < units;) {
        if (work.next(memory.units[i])) {
          ++i;
        } else {
          const Unit done = memory.units[i];
          memory.units[i] = memory.units[--units];
          memory.units[units] = done;
        }
      }
      if (!units) break;
      const auto phase = [&](int64_t tasks_of_unit, const auto& task_of_unit) {
        share_tasks(exec, plan.threads, units * tasks_of_unit, [&](int thread, const auto& next) {
          Arena arena = memory.room(thread);
          DeltaChunkGradients chunk(p, arena);
          for (int64_t task; next(task);) task_of_unit(chunk, memory.units[task / tasks_of_unit], task % tasks_of_unit);
        });
      };
      const auto panels = [&](int64_t task, const auto& f) {
        const int64_t from = task % plan.panels * plan.panel, ldv = round_up(p.in.V, 16);
        f(task / plan.panels, from, from + plan.panel < ldv ? from + plan.panel : ldv);
      };
      phase(plan.group * plan.panels, [&](DeltaChunkGradients& chunk, const Unit& u, int64_t task) {
        panels(task, [&](int64_t g, int64_t from, int64_t to) { work.forwards(chunk, u, g, g + 1, from, to); });
      });
      phase(plan.group * plan.panels, [&](DeltaChunkGradients& chunk, const Unit& u, int64_t task) {
        panels(task, [&](int64_t g, int64_t from, int64_t to) { work.scan_task(chunk, u, g, from, to); });
      });
      phase(plan.chunks, [&](DeltaChunkGradients& chunk, const Unit& u, int64_t task) {
        if (task < work.chunks(u)) work.gradients_task(chunk, u, task);
      });
    }
  }
}

KK_END

KK_CPU_ENTRY_R(int64_t, delta_rule_backward_workspace, DeltaRuleBackwardParams)
KK_CPU_ENTRY(delta_rule_backward, DeltaRuleBackwardParams)
