// Which instruction sets this machine has, asked once at load. KVKERNELS_ISA forces a lower one.
#pragma once

namespace kk::cpu {

enum class Isa { base = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

Isa isa();  // the one in use; throws std::invalid_argument when KVKERNELS_ISA names one that cannot run here
const char* isa_name(Isa isa);
bool has_avx512bf16();        // vdpbf16ps, on top of the avx512 tiers
bool isa_available(Isa isa);  // compiled in, and the processor and the OS support it

}  // namespace kk::cpu
