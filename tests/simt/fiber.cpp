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

constexpr size_t kStack = 128 * 1024, kStacks = size_t{kMaxResident} * kMaxThreads;

char* map_stacks() {
  char* stacks = static_cast<char*>(
      mmap(nullptr, kStacks * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t i = 0; i < kStacks; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
  return stacks;
}
char* const stacks = map_stacks();

}  // namespace

bool on_fiber_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(stacks) < kStacks * kStack; }

void* new_fiber(int number, void (*entry)()) {
  // Stacks lie a power of two apart: without the stagger all of them would fight for the same few cache sets.
  void** sp = reinterpret_cast<void**>(stacks + (static_cast<size_t>(number) + 1) * kStack - 256 - number % 61 * 64);
  *--sp = nullptr;
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(simt_start);
  void* const saved[] = {nullptr, nullptr, reinterpret_cast<void*>(entry),
                         nullptr, nullptr, nullptr};  // rbp rbx r12..r15
  for (void* s : saved) *--sp = s;
  return sp;
}

}  // namespace simt
