// Where an op runs: on the device of its tensors, with threads or the stream from torch, and scratch memory from torch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "bind/check.h"
#include "kvkernels/exec.h"

// Declared here, and weak: torch declares it for CUDA builds only, and in a CPU torch nothing defines it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// Both backends' entry points under one name: backend::op(params, exec) is cpu:: or cuda:: by the type of exec.
namespace kk::cpu {}
namespace kk::cuda {}
namespace kk::backend {
using namespace cpu;
using namespace cuda;
}  // namespace kk::backend

namespace kk::bind {
#if defined(KK_CUDA)
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif
// Fresh memory holds NaN, so that what a kernel reads before it is written, or does not write, shows.
constexpr bool kPoison = kAsserts || kEmulated;

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

inline CudaExec cuda_exec(const Check& c) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(c.device_index(), &stream))
    throw std::runtime_error("kvkernels: torch has no current stream for " + c.device());
  return {stream, c.device_index()};
}

// run(exec) with the CpuExec or CudaExec of the tensors that were checked; a generic lambda, so that a build without CUDA
// asks for no CUDA kernel.
template <typename F>
void on_device(const Check& c, F&& run) {
  if constexpr (kEmulated) {
    run(CudaExec{nullptr, 0});
  } else if (c.on_cpu()) {
    run(cpu_exec());
  } else if constexpr (kCuda) {
    // Makes the context current in the driver, where our static cudart finds it as torch's does.
    const torch::stable::accelerator::DeviceGuard guard(c.device_index());
    run(cuda_exec(c));
  } else {
    c.refuse("the tensors are on ", c.device(),
             ", but this build of kvkernels has no CUDA kernels; build it with KVKERNELS_CUDA=on and nvcc "
             "(python -m kvkernels says what a build has)");
  }
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
  Tensor made(handle);
  if (kPoison && device_type == aoti_torch_device_type_cpu()) {
    const View v = view("made", made);
    if (const int64_t bytes = v.span()) std::memset(v.mutable_data(), 0xff, static_cast<size_t>(bytes));
  }
  return made;
}

// Bytes for the length of one call, 64-byte aligned, on the device of the tensors that were checked. Nothing is allocated
// for 0 bytes. On a GPU torch's allocator gives memory back in the order of the stream, so the kernels may still be running.
class Workspace {
 public:
  Workspace(Check& c, int64_t bytes) {
    if (bytes <= 0) return;
    if constexpr (kEmulated) {
      data_ = c.arguments().scratch(bytes);
      return;
    }
    if (!kPoison && c.on_cpu() && bytes <= kKept) {  // from torch it costs 0.45 us, a twentieth of the shortest call
      alignas(64) static thread_local uint8_t kept[kKept];
      data_ = kept;
      return;
    }
    const int64_t size = bytes + 63;
    tensor_.emplace(empty(&size, 1, aoti_torch_dtype_uint8(), c.device_type(), c.device_index()));
    const auto p = reinterpret_cast<uintptr_t>(tensor_->mutable_data_ptr());
    data_ = reinterpret_cast<void*>((p + 63) / 64 * 64);
    if (kPoison && c.on_cpu()) std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  void* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 128 << 10;  // bytes that a thread keeps from call to call; an op has one workspace
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

}  // namespace kk::bind

// The same function under both keys: a build without CUDA then refuses in its own words.
#define KK_REGISTER_AS(name, op)                                                           \
  STABLE_TORCH_LIBRARY_IMPL(kvkernels, CPU, m) { m.impl(name, TORCH_BOX(&kk::bind::op)); } \
  STABLE_TORCH_LIBRARY_IMPL(kvkernels, CUDA, m) { m.impl(name, TORCH_BOX(&kk::bind::op)); }
#define KK_REGISTER(op) KK_REGISTER_AS(#op, op)
