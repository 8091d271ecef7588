// Global memory: what is known of it, and whether an access is allowed.
#include <link.h>
#include <sys/mman.h>

#include <map>
#include <new>

#include "runtime.h"

namespace simt {
namespace {

struct Known {
  uintptr_t begin, end;
  std::string name;
  bool writable, region;
  bool raced;  // writable, or some of it is, under another name: reads can race
};
std::vector<Known> known;  // a dozen at a time
size_t last_hit;

struct Mapping {
  void* address;
  size_t bytes;
};
std::map<void*, Mapping> mappings;  // of alloc

constexpr size_t kPage = 4096;
uintptr_t module_begin, module_end;

// The known memory that holds all of the access; if possible, memory that may be written.
const Known* find(uintptr_t address, size_t bytes, bool write) {
  const auto holds = [&](const Known& k) { return k.begin <= address && address + bytes <= k.end; };
  if (last_hit < known.size() && holds(known[last_hit]) && (known[last_hit].writable || !write))
    return &known[last_hit];
  const Known* found = nullptr;
  for (const Known& k : known) {
    if (!holds(k)) continue;
    found = &k;
    last_hit = static_cast<size_t>(&k - known.data());
    if (k.writable || !write) break;
  }
  return found;
}

}  // namespace

void add_region(const char* name, const void* p, size_t bytes, bool writable) {
  if (!bytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  bool raced = writable;
  for (Known& k : known) {
    if (end <= k.begin || k.end <= begin) continue;
    raced |= k.writable;
    k.raced |= writable;
  }
  known.push_back({begin, end, name, writable, true, raced});
}

void clear_regions() {
  known.erase(std::remove_if(known.begin(), known.end(), [](const Known& k) { return k.region; }), known.end());
}

char* zero_pages(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

void* alloc(const char* name, size_t bytes, bool writable) {
  // guard page | poison | the array, ending at a multiple of 16 | guard page
  const size_t body = (bytes + kPage) / kPage * kPage, mapped = body + 2 * kPage;
  char* const m = zero_pages(mapped);
  mprotect(m, kPage, PROT_NONE);
  mprotect(m + kPage + body, kPage, PROT_NONE);
  memset(m + kPage, 0xff, body);
  char* const array = m + kPage + body - (bytes + 15) / 16 * 16;
  const auto begin = reinterpret_cast<uintptr_t>(array);
  mappings[array] = {m, mapped};
  if (bytes) known.push_back({begin, begin + bytes, name, writable, false, writable});
  return array;
}

void free(void* p) {
  const auto m = mappings.find(p);
  munmap(m->second.address, m->second.bytes);
  mappings.erase(m);
  const auto begin = reinterpret_cast<uintptr_t>(p);
  known.erase(std::remove_if(known.begin(), known.end(), [&](const Known& k) { return !k.region && k.begin == begin; }),
              known.end());
}

std::string nearest_known(uintptr_t address, size_t bytes) {
  const Known* nearest = nullptr;
  size_t distance = 0;
  for (const Known& k : known) {
    const size_t d = address < k.begin ? k.begin - address : address + bytes > k.end ? address + bytes - k.end : 0;
    if (!nearest || d < distance) nearest = &k, distance = d;
  }
  if (!nearest) return "";
  return format("\n    nearest array: '%s' (%zu bytes), whose %s", nearest->name.c_str(), nearest->end - nearest->begin,
                address < nearest->begin
                    ? format("start lies %zu bytes behind the start of the access", distance).c_str()
                    : format("end the access passes by %zu bytes", distance).c_str());
}

// Kernels read tables of the module that they are linked into.
void find_module() {
  if (module_end) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        uintptr_t begin = ~uintptr_t{0}, end = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& h = info->dlpi_phdr[i];
          if (h.p_type != PT_LOAD) continue;
          begin = std::min<uintptr_t>(begin, info->dlpi_addr + h.p_vaddr);
          end = std::max<uintptr_t>(end, info->dlpi_addr + h.p_vaddr + h.p_memsz);
        }
        const auto here = reinterpret_cast<uintptr_t>(&find_module);
        if (here < begin || here >= end) return 0;
        module_begin = begin;
        module_end = end;
        return 1;
      },
      nullptr);
}

void check_access(uintptr_t address, size_t bytes, Access kind, Thread& by, const Where& where) {
  if (in_shared_memory(address)) {
    check_shared_bounds(address, bytes, kind, by, where);
    if (instrumented) check_shared_race(reinterpret_cast<const char*>(address), bytes, kind, by, where);
    return;
  }
  const auto arguments = reinterpret_cast<uintptr_t>(launched.closure);
  if (on_fiber_stack(address) || address - arguments < launched.closure_bytes ||
      address - module_begin < module_end - module_begin)
    return;
  if (known.empty()) return;
  const bool write = kind != Access::read;
  const Known* k = find(address, bytes, write);
  if (!k)
    report(where, Then::abandon, "global %s of %zu bytes outside every known array, by %s%s", text(kind), bytes,
           text(by).c_str(), nearest_known(address, bytes).c_str());
  const size_t offset = address - k->begin;
  if (write && !k->writable)
    report(where, Then::abandon, "%s to read-only array '%s' at byte %zu, by %s", text(kind), k->name.c_str(), offset,
           text(by).c_str());
  if (instrumented && k->raced) check_global_race(address, bytes, kind, k->name.c_str(), offset, by, where);
}

void access(const void* p, size_t bytes, Access kind, Site site) {
  if (!current) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (kind == Access::atomic && launched.options.threads == Order::random) yield();
  if (address % (bytes & -bytes))
    report(site, Then::abandon, "misaligned %zu-byte %s at %p, by %s", bytes, text(kind), p, text(*current).c_str());
  check_access(address, bytes, kind, *current, site);
}

}  // namespace simt
