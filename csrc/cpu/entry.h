// How an op file, compiled once per ISA, becomes one function. The file defines kk::<isa>::op_cpu(params, exec) and ends with
// KK_CPU_ENTRY(op, Params): the base object then also defines kk::cpu::op, which picks the ISA.
#pragma once
#include "cpu/isa.h"
#include "kvkernels/core/config.h"
#include "kvkernels/exec.h"

#define KK_DECLARE_ISA(isa_ns, R, op, Params) \
  namespace kk::isa_ns {                      \
  R op##_cpu(const Params&, const CpuExec&);  \
  }

#if defined(KK_ISA_IS_BASE)

#if KK_ISA_TOP >= 3
#define KK_CPU_ENTRY_R(R, op, Params)          \
  KK_DECLARE_ISA(avx2, R, op, Params)          \
  KK_DECLARE_ISA(avx512, R, op, Params)        \
  KK_DECLARE_ISA(avx512vnni, R, op, Params)    \
  namespace kk::cpu {                          \
  R op(const Params& p, const CpuExec& x) {    \
    switch (isa()) {                           \
      case Isa::avx512vnni:                    \
        return kk::avx512vnni::op##_cpu(p, x); \
      case Isa::avx512:                        \
        return kk::avx512::op##_cpu(p, x);     \
      case Isa::avx2:                          \
        return kk::avx2::op##_cpu(p, x);       \
      case Isa::base:                          \
        break;                                 \
    }                                          \
    return kk::base::op##_cpu(p, x);           \
  }                                            \
  }
#else  // not x86-64: base is all there is
#define KK_CPU_ENTRY_R(R, op, Params)                                          \
  namespace kk::cpu {                                                          \
  R op(const Params& p, const CpuExec& x) { return kk::base::op##_cpu(p, x); } \
  }
#endif

#else  // an ISA object: only its own copy
#define KK_CPU_ENTRY_R(R, op, Params)
#endif

#define KK_CPU_ENTRY(op, Params) KK_CPU_ENTRY_R(void, op, Params)
