// The functions that g++ -fsanitize=thread and -fsanitize=bounds,... call. Their usual libraries are not linked: the kernels
// tell the emulator of every memory access instead.
#include "runtime.h"

namespace simt {

bool instrumented = false;
bool checking() { return instrumented; }

namespace {

inline void seen(const void* p, size_t bytes, Access kind, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (!current || on_fiber_stack(address)) return;
  maybe_preempt();
  check_access(address, bytes, kind, *current, Where(pc));
}

struct UbsanLocation {  // the first member of every handler's data
  const char* file;
  uint32_t line, column;
};
void undefined(const UbsanLocation& at, const char* what) {
  const Site site{at.file, static_cast<int>(at.line), "device code"};
  report(site, Then::abandon, "%s, by %s", what, current ? text(*current).c_str() : "the host");
}

}  // namespace
}  // namespace simt

using simt::Access;
#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

extern "C" {

void __tsan_init() { simt::instrumented = true; }

// Alignment is the business of -fsanitize=alignment: the 16 of these may be two neighbours of 8 bytes.
#define SIMT_ACCESSES(n)                                                         \
  void __tsan_read##n(void* p) { simt::seen(p, n, Access::read, PC); }           \
  void __tsan_write##n(void* p) { simt::seen(p, n, Access::write, PC); }         \
  void __tsan_unaligned_read##n(void* p) { simt::seen(p, n, Access::read, PC); } \
  void __tsan_unaligned_write##n(void* p) { simt::seen(p, n, Access::write, PC); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
#undef SIMT_ACCESSES
void __tsan_read_range(void* p, size_t n) { simt::seen(p, n, Access::read, PC); }
void __tsan_write_range(void* p, size_t n) { simt::seen(p, n, Access::write, PC); }

#define SIMT_UNDEFINED(name, what) \
  void __ubsan_handle_##name(simt::UbsanLocation* at, ...) { simt::undefined(*at, what); }
SIMT_UNDEFINED(out_of_bounds, "index outside an array")
SIMT_UNDEFINED(type_mismatch_v1, "misaligned access")
SIMT_UNDEFINED(shift_out_of_bounds, "shift by more than the type has bits, or of a negative number")
SIMT_UNDEFINED(divrem_overflow, "integer division by zero, or overflow")
#undef SIMT_UNDEFINED

}  // extern "C"
