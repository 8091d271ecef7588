// The functions of the CUDA runtime that launchers call. The module is linked with -Bsymbolic: these, not a loaded libcudart's.
#include "runtime.h"

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t e = simt::launch_failed ? cudaErrorLaunchFailure : cudaSuccess;
  simt::launch_failed = false;
  return e;
}
const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : simt::launch_error.c_str(); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simt::options().sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = simt::options().smem;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = simt::options().smem + 1024;  // 1 KiB per block is the system's
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = KK_SIMT_ARCH / 100;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = KK_SIMT_ARCH / 10 % 10;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
