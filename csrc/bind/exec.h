// Where an op runs: threads from torch's own pool, scratch memory from torch's own allocator.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "kvkernels/exec.h"

namespace kk::bind {

inline void run_on_torch_threads(int n, void (*task)(void*, int), void* arg) {
  if (n == 1) return task(arg, 0);  // saves the 0.2 us of entering torch_parallel_for
  struct Call {
    void (*task)(void*, int);
    void* arg;
  } call{task, arg};
  const auto chunk = [](int64_t begin, int64_t end, void* ctx) {
    const auto* c = static_cast<const Call*>(ctx);
    for (int64_t i = begin; i < end; ++i) c->task(c->arg, static_cast<int>(i));
  };
  if (torch_parallel_for(0, n, 1, chunk, &call)) throw std::runtime_error("kvkernels: torch_parallel_for failed");
}

inline CpuExec cpu_exec() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {static_cast<int>(threads), &run_on_torch_threads};
}

// Bytes for the length of one call, 64-byte aligned. Nothing is allocated for 0 bytes.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= 0) return;
    const int64_t size = bytes + 63, stride = 1;
    // the C shim directly: torch::stable::empty goes through the dispatcher, which costs 1 us more
    if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0,
                                 &handle_))
      throw std::runtime_error("kvkernels: no memory for a workspace of " + std::to_string(bytes) + " bytes");
    void* p = nullptr;
    torch_get_mutable_data_ptr(handle_, &p);
    data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
  }
  ~Workspace() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace kk::bind
