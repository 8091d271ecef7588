// What bind does differently in the emulator's build (KK_SIMT, tests/simt): CPU tensors go to the CUDA kernels, which may
// touch the arguments of the op and its workspace, and nothing else.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(KK_SIMT)
#include "simt_host.h"
#endif

namespace kk::bind {

#if defined(KK_SIMT)
constexpr bool kEmulated = true;
// Known to the emulator for the length of an op.
class Arguments {
 public:
  Arguments() = default;
  Arguments(const Arguments&) = delete;
  ~Arguments() {
    simt::clear_regions();
    if (scratch_) simt::free(scratch_);
  }
  // Again for one that turns out to be written.
  void add(const char* name, const void* p, int64_t bytes, bool written) const {
    simt::add_region(name, p, static_cast<size_t>(bytes), written);
  }
  void* scratch(int64_t bytes) { return scratch_ = simt::alloc("workspace", static_cast<size_t>(bytes)); }

 private:
  void* scratch_ = nullptr;
};
#else
constexpr bool kEmulated = false;
struct Arguments {
  void add(const char*, const void*, int64_t, bool) const {}
  void* scratch(int64_t) { return nullptr; }
};
#endif

}  // namespace kk::bind
