// SIGSEGV and SIGBUS inside a kernel become a report: guard pages behind arrays and under stacks, null pointers.
#include <signal.h>
#include <ucontext.h>

#include <cstdlib>

#include "runtime.h"

namespace simt {
namespace {

uintptr_t fault_address, fault_pc;
struct sigaction old_segv, old_bus;
stack_t old_stack;
alignas(64) char handler_stack[64 * 1024], landing_stack[256 * 1024];

// The handler returns to here, on a stack that is not the fiber's: that one may be what overflowed.
void landing() {
  const Thread& t = *current;
  if (on_fiber_stack(fault_address))
    report(Where(fault_pc + 1), Then::abandon, "stack overflow (the emulator gives a thread 128 KiB), by %s",
           text(t).c_str());
  report(Where(fault_pc + 1), Then::abandon, "invalid access at %#zx, by %s%s", fault_address, text(t).c_str(),
         nearest_known(fault_address, 1).c_str());
  abort();
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's: let it happen again, without us
    sigaction(signal, signal == SIGSEGV ? &old_segv : &old_bus, nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
  fault_pc = static_cast<uintptr_t>(registers[REG_RIP]);
  registers[REG_RSP] = reinterpret_cast<greg_t>(landing_stack + sizeof landing_stack - 8);  // as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&landing);
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace simt
