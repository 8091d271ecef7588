// Tasks of unequal length over threads: the sequences with most tokens first, and every thread takes the next task when
// it is done with one.
#pragma once
#include "cpu/delta_rows.h"
#include "kvkernels/exec.h"

KK_BEGIN

// Where sequence n is.
struct DeltaSequence {
  int64_t batch, begin, end;
  DeltaSequence(const DeltaInputs& p, int64_t n)
      : batch(p.cu_seqlens ? 0 : n),
        begin(p.cu_seqlens ? p.cu_seqlens[n] : 0),
        end(p.cu_seqlens ? p.cu_seqlens[n + 1] : p.T) {}
  int64_t tokens() const { return end - begin; }
};

// Numbers of the sequences, those of more tokens first to within a factor of two.
inline void long_first(const DeltaInputs& p, int32_t* order) {
  int64_t at[65] = {};
  const auto bucket = [&](int64_t n) {
    const int64_t tokens = DeltaSequence(p, n).tokens();
    return tokens ? __builtin_clzll(static_cast<unsigned long long>(tokens)) : 64;
  };
  for (int64_t n = 0; n < p.N; ++n) ++at[bucket(n)];
  for (int64_t b = 0, sum = 0; b < 65; ++b) {
    const int64_t count = at[b];
    at[b] = sum;
    sum += count;
  }
  for (int64_t n = 0; n < p.N; ++n) order[at[bucket(n)]++] = static_cast<int32_t>(n);
}

// work(thread, next) on each of `threads` threads; next(task) gives the thread a task in [0, tasks) until there are no
// more.
template <typename G>
inline void share_tasks(const CpuExec& exec, int64_t threads, int64_t tasks, const G& work) {
  struct Job {
    const G& work;
    int64_t tasks, next;
    void run(int thread) {
      const FlushDenormals flush;
      work(thread, [this](int64_t& task) { return (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks; });
    }
  } job{work, tasks, 0};
  if (threads <= 1) return job.run(0);
  exec.run(static_cast<int>(threads), [](void* arg, int i) { static_cast<Job*>(arg)->run(i); }, &job);
}

KK_END
