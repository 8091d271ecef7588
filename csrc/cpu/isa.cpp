#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kk::cpu {
namespace {

#if defined(__x86_64__)
unsigned long long xgetbv0() {
  unsigned a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (static_cast<unsigned long long>(d) << 32) | a;
}

Isa detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::base;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !fma || !f16c) return Isa::base;
  const unsigned long long state = xgetbv0();  // what the OS saves: bits 1-2 ymm, 5-7 zmm
  if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::base;
  const bool avx2 = b >> 5 & 1, bmi2 = b >> 8 & 1;
  if (!avx2 || !bmi2) return Isa::base;
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  if ((state & 0xe6) != 0xe6 || !f || !dq || !bw || !vl) return Isa::avx2;
  return c >> 11 & 1 ? Isa::avx512vnni : Isa::avx512;
}

bool detect_bf16() {
  unsigned a, b, c, d;
  return detect() >= Isa::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#else
Isa detect() { return Isa::base; }
bool detect_bf16() { return false; }
#endif

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512vnni"};

// Highest tier compiled in (CMake defines KK_ISA_TOP from what the compiler can do).
constexpr Isa kCompiled = static_cast<Isa>(KK_ISA_TOP);

Isa best() {
  static const Isa found = detect();
  return found < kCompiled ? found : kCompiled;
}

Isa choose() {
  const char* want = std::getenv("KVKERNELS_ISA");
  if (!want || !*want) return best();
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(want, kNames[i])) {
      if (!isa_available(static_cast<Isa>(i)))
        throw std::invalid_argument(std::string("KVKERNELS_ISA=") + want + ": this machine and build go up to " +
                                    isa_name(best()));
      return static_cast<Isa>(i);
    }
  throw std::invalid_argument(std::string("KVKERNELS_ISA must be one of base, avx2, avx512, avx512vnni; got ") + want);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool has_avx512bf16() {
  static const bool found = detect_bf16();
  return found && isa() >= Isa::avx512;
}
bool isa_available(Isa isa) { return isa <= best(); }

}  // namespace kk::cpu
