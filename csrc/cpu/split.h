// Independent items over torch's threads.
#pragma once
#include "kvkernels/core/config.h"
#include "kvkernels/exec.h"

KK_BEGIN

// f(begin, end) over [0, n) in equal parts, one per thread. Fewer than `grain` items are not worth a thread.
template <typename G>
inline void split(const CpuExec& exec, int64_t n, int64_t grain, const G& f) {
  int64_t parts = n / grain;
  if (parts > exec.threads) parts = exec.threads;
  if (parts <= 1) {
    if (n > 0) f(static_cast<int64_t>(0), n);
    return;
  }
  struct Job {
    const G* f;
    int64_t n, parts;
  } job{&f, n, parts};
  exec.run(
      static_cast<int>(parts),
      [](void* arg, int i) {
        const Job& j = *static_cast<const Job*>(arg);
        (*j.f)(j.n* i / j.parts, j.n * (i + 1) / j.parts);
      },
      &job);
}

KK_END
