// What the emulator's files share: the state of the launch that is running. Kernels and their hosts never see it.
//
// One OS thread runs everything. A CUDA thread is a fiber that runs until it has to wait: at a barrier, or at a collective
// of its warp. schedule.cpp then picks the next one. When none can run, the launch is over, or it is a deadlock.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "simt_host.h"
#include "simt_ptx.h"

namespace simt {

constexpr int kMaxThreads = 1024, kMaxWarps = 32, kMaxResident = 4;
// Shared memory of a block: what the launch asked for, a gap, and the KK_SHARED variables.
constexpr size_t kSharedSpan = 288 * 1024;

struct Block;
struct Meeting;

// A copy by cp.async, from its start to its wait.
struct Copy {
  char* dst;
  const void* src;
  int bytes, src_bytes;
  uint32_t group;
  bool landed;
  Site site;
};

enum class State : uint8_t { runnable, at_barrier, in_warp, exited };

struct Thread {
  void* sp;         // while it does not run
  uint3 index;      // threadIdx
  uint16_t number;  // threadIdx as one number
  uint8_t warp, lane;
  State state;
  Site site;  // what it waits for
  Block* block;
  uint32_t clock;        // see race.cpp
  uint32_t copy_groups;  // committed so far
  std::vector<Copy> copies;
};

// Something that the lanes of a warp do together: they bring an argument each, the last one to come does it for all.
struct Collective {
  const char* name;
  bool whole_warp;  // PTX: .sync.aligned
  void (*run)(Block&, int warp, Meeting&);
};
struct Meeting {
  const Collective* what;
  unsigned mask, arrived;
  Site site;
  void* argument[32];
};

struct Warp {
  unsigned runnable, exited;  // lanes; those that never existed have exited
  int meetings;               // groups of lanes that wait for their others; as a rule at most one
  Meeting meeting[32];
  uint32_t clock_epoch;  // see race.cpp
  uint32_t clocks[32][32];
};

struct Barrier {
  int arrived;
  Site site;
  Votes votes, result;
};

// A memory access as the shadow memory keeps it. epoch: the interval between two barriers of a block, one number for each
// interval of each block ever run. clock: how often the thread had synchronised with a part of its warp.
struct Stamp {
  uint32_t epoch;
  uint32_t clock : 20, thread : 10, atomic : 1, in_flight : 1;
};
// In global memory blocks meet.
struct GlobalStamp : Stamp {
  uint32_t block;
  uint32_t atomics;  // executed by all threads before it
};
// One byte. Two reads, because the thread that writes may itself have been the last to read.
template <typename S>
struct Cell {
  S write, read, other_read;
};

struct Block {
  uint3 index;      // blockIdx
  uint32_t serial;  // number among the blocks of all launches
  int threads, exited;
  Thread* thread;  // [threads]
  Warp warp[kMaxWarps];
  unsigned runnable_warps;
  int current_warp;
  Barrier barrier;
  char* shared;               // [kSharedSpan]
  Cell<Stamp>* shared_cells;  // [kSharedSpan], check build only
  uint32_t first_epoch, epoch;
  bool running() const { return exited < threads; }
};

struct SharedVariable {
  const void* key;
  size_t begin, end;
};

struct Launch {
  Options options;
  const void* function;
  void (*invoke)(void*);
  void* closure;
  size_t closure_bytes;
  dim3 grid, size;
  size_t smem;
  uint32_t first_block;  // serial
  int resident = 1;
  std::vector<SharedVariable> variables;
  size_t variables_begin = 0, variables_end = 0;
  int spins = 0;
  bool abandoned = false;
};

extern Launch launched;
extern Block blocks[kMaxResident];
extern Thread* current;           // nullptr outside kernels
extern bool instrumented;         // the check build
extern bool launch_failed;        // cudaGetLastError says so once
extern std::string launch_error;  // the first report of the last launch that failed

// ---- fiber.cpp
extern "C" void simt_switch(void** save, void* load);
void* new_fiber(int number, void (*entry)());  // the stack pointer to switch to
bool on_fiber_stack(uintptr_t address);

// ---- schedule.cpp
uint64_t random_bits();
void seed(uint64_t);
Thread* next_thread();
void switch_to(Thread*);  // nullptr: back to the launch
void wait(State, Site);   // until somebody calls wake
void wake(Thread&);
void yield();
void maybe_preempt();

// ---- report.cpp
// Where something happened: a line, or an instruction that addr2line turns into one.
struct Where {
  Site site{};
  uintptr_t pc = 0;
  Where(Site s) : site(s) {}
  explicit Where(uintptr_t p) : pc(p) {}
};
enum class Then { go_on, abandon };
void report(const Where&, Then, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const Where&);
std::string text(const Thread&);
const char* text(Access);
void forget_repeats();

// ---- warp.cpp, barrier.cpp: a thread that exits may have been what the others waited for
void meet(const Collective&, unsigned mask, void* argument, Site);
void complete_meetings(Block&, int warp);
void leave_barrier(Block&, const Thread& exiting);

// ---- shared.cpp
void map_shared_memory();
void fill_shared_memory(Block&);
void check_canary(const Block&);
bool in_shared_memory(uintptr_t address);
char* shared_at(uint32_t address, size_t bytes, const Thread&, Site);
void check_shared_bounds(uintptr_t address, size_t bytes, Access, const Thread&, const Where&);

// ---- memory.cpp
char* zero_pages(size_t bytes);  // memory that costs nothing before it is touched
void find_module();
void check_access(uintptr_t address, size_t bytes, Access, Thread&, const Where&);
std::string nearest_known(uintptr_t address, size_t bytes);

// ---- race.cpp
void start_race_checks(int blocks_of_grid);
void synchronise(Block&);                            // all threads
void synchronise(Block&, int warp, unsigned lanes);  // some lanes of a warp
void check_shared_race(const char* p, size_t bytes, Access, Thread&, const Where&);
void check_global_race(uintptr_t address, size_t bytes, Access, const char* name, size_t offset, Thread&, const Where&);
void copy_starts(const char* p, size_t bytes, Thread&, const Where&);
void copy_lands(const char* p, size_t bytes, Thread&, const Where&);

// ---- fault.cpp
struct FaultHandler {  // for the length of a launch
  FaultHandler();
  ~FaultHandler();
};

}  // namespace simt
