// What bind does differently in the emulator's build (KK_SIMT, tests/simt): CPU tensors go to the CUDA kernels, which may
// touch the arguments of the op and its workspace, and nothing else.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(KK_SIMT)
#include "simt_host.h"
#endif

namespace kk::bind {
struct View;

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
  void add(const View& v, bool written) const;  // again for one that turns out to be written
  void* scratch(int64_t bytes) { return scratch_ = simt::alloc("workspace", static_cast<size_t>(bytes)); }

 private:
  void* scratch_ = nullptr;
};
#else
constexpr bool kEmulated = false;
struct Arguments {
  void add(const View&, bool) const {}
  void* scratch(int64_t) { return nullptr; }
};
#endif

}  // namespace kk::bind
