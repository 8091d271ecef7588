// Decode attention on pages of any mix of formats: what one task does (attention_task.h), how a call is cut into tasks
// (attention_schedule.h), and here the way from their sums to out and lse.
#include "kvkernels/ops/attention.h"

#include <new>

#include "cpu/attention_schedule.h"
#include "cpu/entry.h"

KK_BEGIN

namespace {

// Score of the extra token of (b, g).
float extra_score(const AttentionParams& p, float bias, int64_t b, int64_t t, int64_t head, int64_t g) {
  const int64_t q = b * p.q_batch + t * p.q_token + head * p.q_head;
  const int64_t k = b * p.extra.k_batch + g * p.extra.k_head;
  F dot = F::zero();
  for (int64_t i = 0; i < p.D; i += F::W)
    dot = fma(load_floats(p.q, p.dtype, q + i), load_floats(p.extra.k, p.dtype, k + i), dot);
  const float score = dot.fold_sum() * p.scale;
  return (p.softcap > 0.0f ? p.softcap * tanhf(score / p.softcap) : score) + bias;
}

// ln(exp(a) + exp(b)); what is larger, if that is infinite; NaN, if either is.
float log_sum(float a, float b) {
  const float top = a > b ? a : b;
  if (top - top == 0.0f) return top + logf(expf(a - top) + expf(b - top));
  return a == a ? top : a;
}

// Sums over V, their maximum m and mass l of a query row -> out and lse. Sinks and the extra token join here.
void write_row(const AttentionParams& p, int64_t b, int64_t t, int64_t head, int64_t g, const float* sums, float m,
               float l) {
  float f = 0.0f, lse = -INFINITY;
  if (l > 0.0f || l != l) {
    f = 1.0f / l;
    lse = m == INFINITY ? m : m + logf(l);  // an infinite score makes l NaN
  }
  const float bias = p.extra.k ? p.extra.bias[b * p.extra.bias_batch + g * p.extra.bias_head] : -INFINITY;
  float joined[512];
  if (bias != -INFINITY) {  // else k and v may hold anything
    const float score = extra_score(p, bias, b, t, head, g), joint = log_sum(lse, score);
    const float f_extra = joint != -INFINITY ? expf(score - joint) : 0.0f;
    if (joint != -INFINITY) f *= expf(lse - joint);
    lse = joint;
    const int64_t v = b * p.extra.v_batch + g * p.extra.v_head;
    for (int64_t i = 0; i < p.Dv; i += F::W)
      fma(load_floats(p.extra.v, p.dtype, v + i), F::fill(f_extra), F::load(sums + i) * F::fill(f)).store(joined + i);
    sums = joined;
    f = 1.0f;
  }
  if (p.sinks) {  // last, as one of +inf leaves no weight to the others
    const float joint = log_sum(lse, p.sinks[head]);
    if (joint != -INFINITY) f *= expf(lse - joint);
    lse = joint;
  }
  const int64_t at = b * p.out_batch + t * p.out_token + head * p.out_head;
  for (int64_t i = 0; i < p.Dv; i += F::W) {
    const F x = F::load(sums + i) * F::fill(f);
    if (p.dtype == DType::f32)
      x.store(static_cast<float*>(p.out) + at + i);
    else if (p.dtype == DType::f16)
      x.store_f16(static_cast<uint16_t*>(p.out) + at + i);
    else
      x.store_bf16(static_cast<uint16_t*>(p.out) + at + i);
  }
  if (p.lse) p.lse[(b * p.Tq + t) * p.Hq + head] = lse;
}

struct Job {
  const AttentionParams& p;
  const Schedule& schedule;
  int64_t next;  // shared counter

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

void run_tasks(Job& job, int thread) {
  const AttentionParams& p = job.p;
  const Schedule& schedule = job.schedule;
  Arena arena = schedule.scratch(thread);
  Ahead ahead;
  Task* const tasks = arena.take<Task>(schedule.max_heads());
  for (int64_t j = 0; j < schedule.max_heads(); ++j)
    new (&tasks[j]) Task(p, ahead, arena, schedule.max_rows(), j ? tasks : nullptr);
  for (int64_t i = job.take(); i < schedule.tasks(); i = job.take()) {
    const Schedule::Work work = schedule.task(i);
    Block block = work.block;
    for (int j = 0; j < work.heads; ++j, ++block.g) tasks[j].begin(block);
    Task::run(tasks, work.heads, work.from, work.to);
    const int rows = work.block.rows;
    for (int j = 0; j < work.heads; ++j) {
      const Task& task = tasks[j];
      if (work.partial) {
        float *sums = work.partial + j * work.next_head, *top = sums + work.block_rows * p.Dv;
        memcpy(sums, task.out_rows, sizeof(float) * rows * p.Dv);
        memcpy(top, task.m, sizeof(float) * rows);
        memcpy(top + work.block_rows, task.l, sizeof(float) * rows);
        continue;
      }
      for (int r = 0; r < rows; ++r) {
        const QueryRow& row = task.query[r];
        write_row(p, row.b, row.t, row.head, work.block.g + j, task.out_rows + r * p.Dv, task.m[r], task.l[r]);
      }
    }
  }
}

// Softmax states added up in the order they come.
struct State {
  float m, l;
  float sums[512];

  void clear(int64_t n) {
    m = -INFINITY;
    l = 0.0f;
    memset(sums, 0, sizeof(float) * n);
  }
  void add(const float* x, float top, float mass, int64_t n) {
    if (top == -INFINITY) {  // saw nothing: its mass is 0, or NaN where a score was NaN
      l += mass;
      return;
    }
    const bool rises = !(top <= m);
    const float base = rises ? top : m, old = rises ? expf(m - base) : 1.0f, f = rises ? 1.0f : expf(top - base);
    m = base;
    l = l * old + mass * f;
    for (int64_t i = 0; i < n; i += F::W)
      fma(F::load(x + i), F::fill(f), F::load(sums + i) * F::fill(old)).store(sums + i);
  }
};

constexpr int64_t kMergeRows = 16;  // query rows of a merge that one thread takes at a time

void run_merges(Job& job) {
  const AttentionParams& p = job.p;
  const Schedule& schedule = job.schedule;
  int64_t most = 0;
  for (int64_t g = 0; g < p.Hkv; ++g) most = group_heads(p, g).n > most ? group_heads(p, g).n : most;
  const int64_t blocks = (p.Tq * most + kMergeRows - 1) / kMergeRows;
  for (int64_t i = job.take(); i < p.B * p.Hkv * blocks; i = job.take()) {
    const int64_t b = i / blocks / p.Hkv, g = i / blocks % p.Hkv;
    const GroupHeads heads = group_heads(p, g);
    const int64_t leaf = p.plan.nodes ? p.plan.leaf[b] : b;
    if (leaf >= 0 && schedule.part(leaf, g).partials < 0) continue;
    const int64_t begin = i % blocks * kMergeRows,
                  end = begin + kMergeRows < p.Tq * heads.n ? begin + kMergeRows : p.Tq * heads.n;
    State state[kMergeRows];
    for (int64_t r = begin; r < end; ++r) state[r - begin].clear(p.Dv);
    for (int64_t node = leaf; node >= 0; node = p.plan.nodes ? p.plan.nodes[node].parent : -1) {
      const Schedule::Partials x = schedule.partials(node, b, g);
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0; k < x.intervals; ++k)
          state[r - begin].add(x.sums(r) + k * x.step, x.top(r)[k * x.step], x.mass(r)[k * x.step], p.Dv);
    }
    for (int64_t r = begin; r < end; ++r) {
      const State& s = state[r - begin];
      write_row(p, b, r / heads.n, heads[r % heads.n], g, s.sums, s.m, s.l);
    }
  }
}

}  // namespace

int64_t attention_workspace_cpu(const AttentionParams& p, const CpuExec& exec) {
  Arena arena{nullptr};
  const Schedule schedule(p, exec, arena);
  return arena.used;
}

void attention_cpu(const AttentionParams& p, const CpuExec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  Arena arena{static_cast<uint8_t*>(p.workspace)};
  const Schedule schedule(p, exec, arena);
  Job job{p, schedule, 0};
  exec.run(schedule.threads(), [](void* arg, int thread) { run_tasks(*static_cast<Job*>(arg), thread); }, &job);
  if (!schedule.merges()) return;
  job.next = 0;
  exec.run(schedule.threads(), [](void* arg, int) { run_merges(*static_cast<Job*>(arg)); }, &job);
}

KK_END

KK_CPU_ENTRY(attention, AttentionParams)
KK_CPU_ENTRY_R(int64_t, attention_workspace, AttentionParams)
