// How kernels are launched and how they name shared memory: the one file, besides ptx.cuh, that knows of the emulator
// (tests/simt: KK_SIMT, the same sources compiled by a C++ compiler, one fiber per CUDA thread).
#pragma once
#include "kvkernels/core/one_of.h"

#if defined(KK_SIMT)
#include "simt.h"
// The dynamic shared memory of the block.
#define KK_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::simt::dyn_smem())
// KK_SHARED(type, name, [N][M]): a static shared variable, whose bounds the emulator then knows.
#define KK_SHARED(T, name, ...)                                                                \
  auto& name = *static_cast<typename ::simt::ident<T __VA_ARGS__>::type*>(::simt::static_smem( \
      [] {                                                                                     \
        static char k;                                                                         \
        return (const void*)&k;                                                                \
      }(),                                                                                     \
      sizeof(typename ::simt::ident<T __VA_ARGS__>::type), alignof(T)))
#else
#include <cuda_runtime.h>
#define KK_DYN_SMEM(T, name)                                     \
  extern __shared__ __align__(128) unsigned char kk_dyn_smem_[]; \
  T* name = reinterpret_cast<T*>(kk_dyn_smem_)
#define KK_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#endif

#include <stdexcept>
#include <string>
#include <utility>

namespace kk::cuda {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // forgets it: the next launch of this thread would be blamed for it
  throw std::runtime_error(std::string("kvkernels: CUDA: ") + cudaGetErrorString(error));
}

// An attribute of a device, such as cudaDevAttrMultiProcessorCount: a lookup in the driver, no synchronisation.
inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

template <typename... P, typename... A>
inline void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A&&... args) {
#if defined(KK_SIMT)
  (void)stream;
  simt::launch(kernel, grid, block, smem, std::forward<A>(args)...);
#else
  // Above 48 KiB, with the static shared memory (of up to 4 KiB), a kernel must be told. It is told all that the
  // device has: threads that launch one kernel with different sizes then do not take from each other.
  if (smem > 40 * 1024) {
    cudaFuncAttributes now;
    check(cudaFuncGetAttributes(&now, reinterpret_cast<const void*>(kernel)));
    if (smem > static_cast<size_t>(now.maxDynamicSharedSizeBytes)) {
      int device = 0;
      check(cudaGetDevice(&device));
      check(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_cast<int>(now.sharedSizeBytes)));
    }
  }
  // clang-format off
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(std::forward<A>(args))...);
  // clang-format on
#endif
  check(cudaGetLastError());
}

}  // namespace kk::cuda
