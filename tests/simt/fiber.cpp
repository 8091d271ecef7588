// Fibers: a stack and a saved stack pointer each.
#include <sys/mman.h>

#include "runtime.h"

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

// simt_switch(void** save, void* load): what a function must preserve goes onto this stack, and comes off the other.
// simt_start: where a new fiber begins; its entry lies in r12, as make_fiber below puts it.
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl simt_start
.hidden simt_start
.type simt_start,@function
simt_start:
  xorl %ebp, %ebp
  call *%r12
  ud2
)");
extern "C" void simt_start();

namespace simt {
namespace {

constexpr size_t kStack = 128 * 1024, kStacks = size_t{kMaxResident} * kMaxThreads, kGuard = 4096;

char* const stacks = zero_pages(kStacks * kStack);
int guarded = 0;  // stacks with a guard page below: as many as were used, for each costs the process a memory mapping

}  // namespace

bool on_fiber_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(stacks) < kStacks * kStack; }

void* new_fiber(int number, void (*entry)()) {
  for (; guarded <= number; ++guarded) mprotect(stacks + static_cast<size_t>(guarded) * kStack, kGuard, PROT_NONE);
  // Stacks lie a power of two apart: without the stagger all of them would fight for the same few cache sets.
  void** sp = reinterpret_cast<void**>(stacks + (static_cast<size_t>(number) + 1) * kStack - 256 - number % 61 * 64);
  *--sp = nullptr;
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(simt_start);
  void* const saved[] = {nullptr, nullptr, reinterpret_cast<void*>(entry), nullptr, nullptr, nullptr};  // rbp rbx r12..
  for (void* s : saved) *--sp = s;
  return sp;
}

}  // namespace simt
