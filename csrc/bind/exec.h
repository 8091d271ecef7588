// Where an op runs: threads from torch's own pool, scratch memory from torch's own allocator.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "kvkernels/exec.h"

namespace kk::bind {

using torch::stable::Tensor;

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

// Uninitialised and contiguous. Through the C shim: the dispatcher that torch::stable::new_empty asks costs 1 us more.
inline Tensor empty(const int64_t* size, int64_t dim, int32_t dtype, int32_t device_type, int32_t device_index) {
  int64_t stride[64];  // the most dims a tensor has
  for (int64_t i = dim - 1, step = 1; i >= 0; --i) {
    stride[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, size, stride, dtype, device_type, device_index, &handle))
    throw std::runtime_error("kvkernels: torch could not allocate a tensor");
  return Tensor(handle);
}

// Bytes for the length of one call, 64-byte aligned. Nothing is allocated for 0 bytes.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= 0) return;
    const int64_t size = bytes + 63;
    tensor_.emplace(empty(&size, 1, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0));
    const auto p = reinterpret_cast<uintptr_t>(tensor_->mutable_data_ptr());
    data_ = reinterpret_cast<void*>((p + 63) / 64 * 64);
#if defined(KK_DEBUG_ASSERT)
    std::memset(data_, 0xff, static_cast<size_t>(bytes));  // NaN: reading before writing shows
#endif
  }
  void* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

}  // namespace kk::bind
