// What host code asks of the emulator: schedules, known memory, reports. It defines none of CUDA's words, so that it can be
// included beside torch and pybind11.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

enum class Order { ascending, descending, random };
enum class Copies { late, early, random };  // when cp.async lands: at the wait, at once, either

struct Options {
  Order threads = Order::ascending;
  Order blocks = Order::ascending;
  Copies copies = Copies::late;
  uint64_t seed = 1;
  int resident = 1;       // blocks that run interleaved, at most 4
  int preempt = 0;        // n: one memory access in n lets another thread run; 0: never. Check build only
  int sms = 3;            // cudaDevAttrMultiProcessorCount
  int smem = 100 * 1024;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
  int max_reports = 8;    // a launch is abandoned at the first report that makes going on pointless, or at this many
};
Options& options();

// Reports of all launches since clear_reports().
const std::vector<std::string>& reports();
void clear_reports();

// True in the check build: every memory access of the kernels is seen.
bool checking();

// Memory that is not the emulator's own becomes known. As soon as anything is known, an access of a kernel to global
// memory that is not known is reported, and so is a write where no region is writable. Regions may overlap.
void add_region(const char* name, const void* p, size_t bytes, bool writable);
void clear_regions();

// Known memory of bytes 0xff, which are NaN as fp16, bf16 and fp32. It ends at a guard page when bytes % 16 == 0.
void* alloc(const char* name, size_t bytes, bool writable = true);
void free(void* p);

}  // namespace simt
