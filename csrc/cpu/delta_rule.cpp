// One task: a sequence, some key heads or some lanes of one. A lane is a value head and a panel of 64 columns of V;
// columns of a state never meet, so that one head can be split over threads, and no bit depends on how.
//
// A sequence that is too long for a task is done by all threads: what of a chunk needs no state is formed by any of them, a
// few chunks ahead of the lanes, and a thread goes on with its lanes as far as that is done. Nothing is formed twice, as it
// would be if lanes of one key head were tasks: that cost 30 % of the time of one head on two threads.
#include "kvkernels/ops/delta_rule.h"

#include <sched.h>

#include "cpu/delta_ahead.h"
#include "cpu/delta_chunk.h"
#include "cpu/delta_token.h"
#include "cpu/entry.h"

KK_BEGIN

namespace {

// How the work is cut.
struct Plan {
  int64_t group, panels, lanes;  // value heads of a key head, panels of a value head, lanes of a key head
  int64_t fair;                  // sequences of more tokens are too long for a task
  int64_t pairs;                 // key heads of such sequences
  int64_t ring;                  // chunks of a pair that are formed at a time
  int64_t heads, parts;    // key heads of a task in the other sequences, or parts that a key head's lanes are cut into
  int64_t tasks, threads;  // of the other sequences; of the call
};

Plan plan_of(const DeltaRuleParams& p, const CpuExec& exec) {
  const DeltaInputs& in = p.in;
  Plan plan{};
  plan.group = in.HV / in.H;
  plan.panels = (in.V + kDeltaPanel - 1) / kDeltaPanel;
  plan.lanes = plan.group * plan.panels;
  int64_t tokens = 0, longest = 0, long_ones = 0;
  for (int64_t n = 0; n < in.N; ++n) {
    const DeltaSequence s(in, n);
    tokens += s.tokens();
    if (s.tokens() > longest) longest = s.tokens();
  }
  // No task should be more than a fourth of a thread's share ...
  plan.fair = exec.threads > 1 ? tokens * in.H / (4 * exec.threads) : tokens;
  if (p.recurrent && plan.fair > 0) plan.parts = (longest + plan.fair - 1) / plan.fair;
  if (!p.recurrent)
    for (int64_t n = 0; n < in.N; ++n) long_ones += DeltaSequence(in, n).tokens() > plan.fair;
  // ... and its states should stay in L2 ...
  const int64_t for_cache = (plan.lanes * in.K * kDeltaPanel * 4 + (1 << 19) - 1) >> 19;
  if (plan.parts < for_cache) plan.parts = for_cache;
  if (plan.parts > plan.lanes) plan.parts = plan.lanes;
  // ... beside the rows of tokens, of which key heads side by side read more at a time.
  plan.heads = 1;
  if (plan.parts == 1) {
    int64_t most = (1 << 18) / (plan.lanes * in.K * kDeltaPanel * 4);
    if (exec.threads > 1 && longest && plan.fair / longest < most) most = plan.fair / longest;
    for (int64_t heads = 2; heads <= most; ++heads)
      if (in.H % heads == 0) plan.heads = heads;
  }
  plan.pairs = long_ones * in.H;
  plan.ring = plan.pairs ? 4 * exec.threads / plan.pairs : 0;
  if (plan.ring < 2) plan.ring = 2;
  if (plan.ring > 8) plan.ring = 8;
  plan.tasks = (in.N - long_ones) * (in.H / plan.heads) * plan.parts;
  plan.threads = plan.pairs || plan.tasks > exec.threads ? exec.threads : plan.tasks;
  return plan;
}

// What one thread works with.
struct Room {
  DeltaKeys keys;
  DeltaHead head;
  float *n, *o, *row;  // [C][64], [C][64], [64]
  float* states;       // of the lanes of a task, [K][64] each
  uint32_t* words;     // [max(K, C) / 2][64] what whole numbers are multiplied by; null where keys are not rounded
  float* unit;         // [64] of its columns

  Room(const DeltaRuleParams& p, const Plan& plan, Arena& arena) : keys(p.in, arena, true), head(p.in, arena) {
    n = arena.take<float>(p.in.chunk * kDeltaPanel);
    o = arena.take<float>(p.in.chunk * kDeltaPanel);
    row = arena.take<float>(kDeltaPanel);
    words = nullptr;
    if (keys.rounded) words = arena.take<uint32_t>((p.in.K > p.in.chunk ? p.in.K : p.in.chunk) / 2 * kDeltaPanel);
    unit = arena.take<float>(kDeltaPanel);
    states = arena.take<float>(plan.heads * ((plan.lanes + plan.parts - 1) / plan.parts) * p.in.K * kDeltaPanel);
  }
};

// A key head of a sequence that is too long for a task.
struct Pair {
  static constexpr int64_t kLine = 8;  // counters in cache lines of their own
  float* states;                       // of the lanes, [K][64] each
  int64_t* passed;                     // [lanes][kLine] twice the chunks that a lane has passed, + 1 while it is in one
  int64_t* begun;                      // chunks that are or were formed
  int64_t* formed;                     // [ring][kLine] the number of the chunk that is there, from 1 on
  DeltaKeys* keys;                     // [ring]
  DeltaHead* heads;                    // [ring][group]

  // `lay_out`: the first time that a call comes here.
  Pair(const DeltaInputs& in, const Plan& plan, Arena& arena, bool lay_out) {
    const int64_t counters = (plan.lanes + 1 + plan.ring) * kLine;
    states = arena.take<float>(plan.lanes * in.K * kDeltaPanel);
    passed = arena.take<int64_t>(counters);
    begun = passed + plan.lanes * kLine;
    formed = begun + kLine;
    keys = arena.take<DeltaKeys>(plan.ring);
    heads = arena.take<DeltaHead>(plan.ring * plan.group);
    if (!lay_out) return;
    if (arena.base) memset(passed, 0, static_cast<size_t>(counters) * sizeof(int64_t));
    for (int64_t i = 0; i < plan.ring; ++i) {
      const DeltaKeys key(in, arena, true);
      if (arena.base) keys[i] = key;
    }
    for (int64_t i = 0; i < plan.ring * plan.group; ++i) {
      const DeltaHead head(in, arena);
      if (arena.base) heads[i] = head;
    }
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

constexpr int64_t kPiece = 16;  // rows
// Pieces of two products, between which lines are asked for: more at once than a core can wait for would stall it.
int64_t pieces(const DeltaInputs& in) { return in.chunk / kPiece + (in.K + kPiece - 1) / kPiece; }

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

// A chunk on one lane's state. Of the room, what belongs to the lane is used.
void chunk_step(const DeltaRuleParams& p, const DeltaKeys& keys, const DeltaHead& head, const Room& room,
                const DeltaSequence& s, int64_t begin, const Lane& lane, const DeltaAhead& ahead, float* S) {
  const DeltaInputs& in = p.in;
  const int64_t C = keys.C, tokens = keys.tokens, columns = lane.to - lane.from;
  float *N = room.n, *o = room.o;

  int64_t step = 0;
  const auto in_pieces = [&](int64_t rows, const auto& product) {
    for (int64_t i = 0; i < rows; i += kPiece) {
      ahead.take(step++);
      product(i, rows - i < kPiece ? rows - i : kPiece);
    }
  };
#if defined(__AVX512VNNI__)
  if (keys.rounded) round_columns(S, in.K, kColumnMost, room.words, room.unit);
#endif
  // y = x S, one of e and q.
  const auto look_up = [&](const float* x, [[maybe_unused]] const int16_t* whole, int64_t i, int64_t rows, float* y) {
#if defined(__AVX512VNNI__)
    const int64_t ld = round_up(in.K, 32);
    if (keys.rounded)
      return i16_matmul(rows, columns, in.K / 2, whole + i * ld, ld, room.words, room.unit, y + i * kDeltaPanel);
#endif
    matmul(rows, columns, in.K, {x + i * keys.ld, keys.ld, 1}, S, kDeltaPanel, y + i * kDeltaPanel, kDeltaPanel);
  };
  in_pieces(tokens, [&](int64_t i, int64_t rows) {
    if (p.o) ask_for_output(p, s, begin + i, rows, lane);
    look_up(head.e, keys.k_whole, i, rows, N);
  });
  form_rows(in, head, s, begin, tokens, lane, room.row, N);
  triangle_solve<Part::solve_lower>(tokens, columns, {head.minus_l, C, 1}, N, kDeltaPanel);
  if (p.o) {
    look_up(head.q, keys.q_whole, 0, tokens, o);
    triangle_matmul<Part::lower>(tokens, columns, {head.p, C, 1}, N, kDeltaPanel, o, kDeltaPanel, Start::scaled,
                                 head.q_factor);
    write_rows(p, s, begin, tokens, lane, o);
  }
#if defined(__AVX512VNNI__)
  if (keys.rounded) {
    if (tokens % 2) memset(N + tokens * kDeltaPanel, 0, kDeltaPanel * 4);
    round_columns(N, round_up(tokens, 2), keys.n_most, room.words, room.unit, head.tail);
    return in_pieces(in.K, [&](int64_t i, int64_t rows) {
      i16_matmul(rows, columns, (tokens + 1) / 2, keys.k_t_whole + i * C, C, room.words, room.unit, S + i * kDeltaPanel,
                 head.whole + i);
    });
  }
#endif
  if (in.g.p && !in.vector_gate)
    for (int64_t i = 0; i < tokens; ++i) scale_row(N + i * kDeltaPanel, head.tail[i], kDeltaPanel);
  in_pieces(in.K, [&](int64_t i, int64_t rows) {
    matmul(rows, columns, tokens, {head.keys_t + i * C, C, 1}, N, kDeltaPanel, S + i * kDeltaPanel, kDeltaPanel,
           Start::scaled, head.whole + i);
  });
}

// After `done` tokens of sequence n.
void write_checkpoint(const DeltaRuleParams& p, const DeltaSequence& s, int64_t n, int64_t done, const Lane& lane,
                      const float* S) {
  if (p.checkpoints && done % p.checkpoint_every == 0)
    write_state(p, S, lane, p.checkpoints,
                delta_slots(p.in, n, s.begin, p.checkpoint_every).whole + done / p.checkpoint_every - 1);
}

// Lanes [first_lane, end_lane) of `heads` key heads from key_head on. These go through the sequence side by side: rows of a
// token that lie next to each other are then read together.
void run_task(const DeltaRuleParams& p, const Plan& plan, Room& room, int64_t n, int64_t key_head, int64_t first_lane,
              int64_t end_lane) {
  const DeltaSequence s(p.in, n);
  const int64_t lanes = end_lane - first_lane;
  const auto each_lane = [&](auto&& f) {
    float* S = room.states;
    for (int64_t head = key_head; head < key_head + plan.heads; ++head)
      for (int64_t l = first_lane; l < end_lane; ++l, S += p.in.K * kDeltaPanel) f(head, l, Lane(p, plan, head, l), S);
  };
  each_lane([&](int64_t, int64_t, const Lane& lane, float* S) { read_state(p, n, lane, S); });

  const int64_t stretch = !p.recurrent ? p.in.chunk : p.checkpoints ? p.checkpoint_every : s.end - s.begin;
  for (int64_t begin = s.begin; begin < s.end; begin += stretch) {
    const int64_t end = begin + stretch < s.end ? begin + stretch : s.end;
    each_lane([&](int64_t head, int64_t l, const Lane& lane, float* S) {
      if (p.recurrent) {
        delta_tokens(p.in, s.batch, begin, end, lane.head, lane.from, lane.to, S, kDeltaPanel, p.o);
      } else {
        if (l == first_lane) room.keys.read(p.in, s, begin, head);
        if (l == first_lane || lane.from == 0) room.head.form(p.in, room.keys, s, begin, lane.head);
        chunk_step(p, room.keys, room.head, room, s, begin, lane,
                   DeltaAhead(p.in, s, end, end, lane.head, lane.from, lane.to, l - first_lane, lanes, pieces(p.in)),
                   S);
      }
      write_checkpoint(p, s, n, end - s.begin, lane, S);
    });
  }
  if (p.final_state)
    each_lane([&](int64_t, int64_t, const Lane& lane, float* S) { write_state(p, S, lane, p.final_state, n); });
}

int64_t seen(const int64_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
void tell(int64_t* counter, int64_t x) { __atomic_store_n(counter, x, __ATOMIC_RELEASE); }
bool claim(int64_t* counter, int64_t from) {
  return __atomic_compare_exchange_n(counter, &from, from + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

// The next chunk of a pair up to where the state comes in, if there is room for it; false if not.
bool form_next(const DeltaRuleParams& p, const Plan& plan, const Pair& x, const DeltaSequence& s, int64_t key_head) {
  const int64_t chunk = seen(x.begun), begin = s.begin + chunk * p.in.chunk, place = chunk % plan.ring;
  if (begin >= s.end) return false;
  for (int64_t l = 0; l < plan.lanes; ++l)
    if (seen(x.passed + l * Pair::kLine) < 2 * (chunk - plan.ring + 1)) return false;
  if (!claim(x.begun, chunk)) return false;
  x.keys[place].read(p.in, s, begin, key_head);
  for (int64_t h = 0; h < plan.group; ++h)
    x.heads[place * plan.group + h].form(p.in, x.keys[place], s, begin, key_head * plan.group + h);
  tell(x.formed + place * Pair::kLine, chunk + 1);
  return true;
}

// A lane through the chunks that are formed; false if there are none or another thread is at it.
bool pass_chunks(const DeltaRuleParams& p, const Plan& plan, const Pair& x, const Room& room, const DeltaSequence& s,
                 int64_t n, int64_t key_head, int64_t l, int64_t thread) {
  int64_t* const passed = x.passed + l * Pair::kLine;
  const int64_t turn = seen(passed);
  int64_t chunk = turn / 2, begin = s.begin + chunk * p.in.chunk;
  const auto ready = [&] { return begin < s.end && seen(x.formed + chunk % plan.ring * Pair::kLine) == chunk + 1; };
  if (turn % 2 || !ready() || !claim(passed, turn)) return false;
  const Lane lane(p, plan, key_head, l);
  float* const S = x.states + l * p.in.K * kDeltaPanel;
  if (chunk == 0) read_state(p, n, lane, S);
  const int64_t sharers = plan.pairs < plan.threads ? plan.threads / plan.pairs : 1;
  while (ready()) {
    const int64_t end = begin + p.in.chunk < s.end ? begin + p.in.chunk : s.end, place = chunk % plan.ring;
    // Threads that share a pair come to form its chunks in turn.
    int64_t next = seen(x.begun);
    while (next % sharers != thread % sharers) ++next;
    chunk_step(p, x.keys[place], x.heads[place * plan.group + l / plan.panels], room, s, begin, lane,
               DeltaAhead(p.in, s, end, s.begin + next * p.in.chunk, lane.head, lane.from, lane.to, 0, 1, pieces(p.in)),
               S);
    write_checkpoint(p, s, n, end - s.begin, lane, S);
    if (end == s.end && p.final_state) write_state(p, S, lane, p.final_state, n);
    begin = end;
    tell(passed, 2 * ++chunk + 1);
  }
  tell(passed, 2 * chunk);
  return true;
}

// What is there to do for a thread in the pairs, until all is done: its own lanes first, whose states are in its cache, then
// chunks, then lanes of others.
template <typename G>
void run_pairs(const DeltaRuleParams& p, const Plan& plan, const Room& room, const int32_t* order, int64_t thread,
               const G& pair_room) {
  const int64_t lanes = plan.pairs * plan.lanes;
  const auto of = [&](int64_t pair, auto&& f) {
    const int64_t n = order[pair / p.in.H];
    return f(pair_room(pair, false), DeltaSequence(p.in, n), n, pair % p.in.H);
  };
  const auto pass = [&](int64_t from, int64_t to) {
    bool found = false;
    for (int64_t i = from; i < to; ++i)
      found |= of(i / plan.lanes, [&](const Pair& x, const DeltaSequence& s, int64_t n, int64_t key_head) {
        return pass_chunks(p, plan, x, room, s, n, key_head, i % plan.lanes, thread);
      });
    return found;
  };
  const auto form = [&] {
    for (int64_t i = 0; i < plan.pairs; ++i)
      if (of((i + plan.pairs * thread / plan.threads) % plan.pairs,
             [&](const Pair& x, const DeltaSequence& s, int64_t, int64_t key_head) {
               return form_next(p, plan, x, s, key_head);
             }))
        return true;
    return false;
  };
  const auto done = [&] {
    for (int64_t i = 0; i < lanes; ++i)
      if (!of(i / plan.lanes, [&](const Pair& x, const DeltaSequence& s, int64_t, int64_t) {
            return seen(x.passed + i % plan.lanes * Pair::kLine) / 2 * p.in.chunk >= s.tokens();
          }))
        return false;
    return true;
  };
  const int64_t own = lanes * thread / plan.threads, end = lanes * (thread + 1) / plan.threads;
  for (int64_t idle = 0; !done();) {
    if (pass(own, end) || form() || pass(0, own) || pass(end, lanes))
      idle = 0;
    else if (++idle > 1000)
      sched_yield();  // the thread that is waited for may have no core
  }
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
  Arena order{nullptr}, room{nullptr}, pair{nullptr};
  order.take<int32_t>(p.in.N);
  Room(p, plan, room);
  Pair(p.in, plan, pair, true);
  return order.used + plan.threads * room.used + plan.pairs * pair.used;
}

void delta_rule_cpu(const DeltaRuleParams& p, const CpuExec& exec) {
  const DeltaInputs& in = p.in;
  const Plan plan = plan_of(p, exec);
  Arena arena{static_cast<uint8_t*>(p.workspace)}, room{nullptr}, pair{nullptr};
  int32_t* order = arena.take<int32_t>(in.N);
  Room(p, plan, room);
  Pair(in, plan, pair, true);
  uint8_t *const rooms = arena.take<uint8_t>(plan.threads * room.used), *const pairs = arena.base + arena.used;
  const auto pair_room = [&](int64_t i, bool lay_out) {
    Arena own{pairs + i * pair.used};
    return Pair(in, plan, own, lay_out);
  };

  long_first(in, order);
  const int64_t long_ones = plan.pairs / in.H;
  for (int64_t i = 0, to = 0; to < long_ones; ++i) {
    const int32_t n = order[i];
    if (DeltaSequence(in, n).tokens() > plan.fair) order[i] = order[to], order[to++] = n;
  }
  write_zeros(p);
  for (int64_t i = 0; i < plan.pairs; ++i) pair_room(i, true);

  share_tasks(exec, plan.threads, plan.tasks, [&](int thread, const auto& next) {
    Arena own{rooms + thread * room.used};
    Room mine(p, plan, own);
    run_pairs(p, plan, mine, order, thread, pair_room);
    for (int64_t task; next(task);) {
      const int64_t part = task % plan.parts, i = task / plan.parts * plan.heads;
      run_task(p, plan, mine, order[long_ones + i / in.H], i % in.H, plan.lanes * part / plan.parts,
               plan.lanes * (part + 1) / plan.parts);
    }
  });
}

KK_END

KK_CPU_ENTRY_R(int64_t, delta_rule_workspace, DeltaRuleParams)
KK_CPU_ENTRY(delta_rule, DeltaRuleParams)
