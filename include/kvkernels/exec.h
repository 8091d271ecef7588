// Where to run, owned by the caller.
#pragma once
#include <cstdint>

namespace kk {
// Threads come from torch's pool, so torch.set_num_threads rules and no second OpenMP runtime is loaded.
struct CpuExec {
  int threads;
  // Calls task(arg, i) for i in [0, n), n <= threads, each on its own thread. Tasks must not throw.
  void (*run)(int n, void (*task)(void* arg, int i), void* arg);
};

struct CudaExec {
  void* stream;  // cudaStream_t; everything is enqueued on it, nothing waits for it
  int device;
};
}  // namespace kk
