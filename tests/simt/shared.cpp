// Shared memory of the resident blocks:
//   [dynamic: what the launch asked for][gap of 2-3 KiB: canary][KK_SHARED variables, in the order in which they are met]
#include "runtime.h"

namespace simt {
namespace {

constexpr size_t kCanary = 2048;
constexpr unsigned char kCanaryByte = 0xa5;
// 32-bit addresses do not start at 0, so that a null pointer is not an address of shared memory.
constexpr uint32_t kFirstAddress = 0x400;
constexpr size_t kStaticLimit = 48 * 1024;

char* const memory = zero_pages(kMaxResident * kSharedSpan);

bool inside(size_t offset, size_t bytes) {
  if (offset >= kSharedSpan) return false;
  if (offset + bytes <= launched.smem) return true;
  if (offset < launched.variables_begin) return false;
  return std::any_of(launched.variables.begin(), launched.variables.end(),
                     [&](const SharedVariable& v) { return v.begin <= offset && offset + bytes <= v.end; });
}

}  // namespace

void map_shared_memory() {
  for (int i = 0; i < kMaxResident; ++i) {
    blocks[i].shared = memory + static_cast<size_t>(i) * kSharedSpan;
    if (instrumented && !blocks[i].shared_cells)
      blocks[i].shared_cells = reinterpret_cast<Cell<Stamp>*>(zero_pages(kSharedSpan * sizeof(Cell<Stamp>)));
  }
  launched.variables_begin = launched.variables_end = (launched.smem + kCanary + 1023) / 1024 * 1024;
}

bool in_shared_memory(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(memory) < kMaxResident * kSharedSpan;
}

void fill_shared_memory(Block& b) {
  memset(b.shared, 0xff, launched.smem);
  memset(b.shared + launched.smem, kCanaryByte, kCanary);
  memset(b.shared + launched.variables_begin, 0xff, launched.variables_end - launched.variables_begin);
}

void check_canary(const Block& b) {
  for (size_t i = 0; i < kCanary; ++i) {
    if (static_cast<unsigned char>(b.shared[launched.smem + i]) == kCanaryByte) continue;
    report(Where(uintptr_t{0}), Then::go_on,
           "block (%u,%u,%u) wrote %zu bytes past the %zu bytes of dynamic shared memory it was "
           "launched with",
           b.index.x, b.index.y, b.index.z, i, launched.smem);
    return;
  }
}

void* dyn_smem() { return current->block->shared; }

void* static_smem(const void* key, size_t bytes, size_t alignment) {
  for (const SharedVariable& v : launched.variables)
    if (v.key == key) return current->block->shared + v.begin;
  alignment = std::max<size_t>(alignment, 16);
  const size_t begin = (launched.variables_end + alignment - 1) / alignment * alignment, end = begin + bytes;
  const size_t used = end - launched.variables_begin;
  if (used > kStaticLimit || launched.smem + used > static_cast<size_t>(launched.options.smem))
    report(Where(uintptr_t{0}), Then::abandon,
           "shared memory: %zu bytes of KK_SHARED variables and %zu dynamic ones; allowed: %zu and %d in all", used,
           launched.smem, kStaticLimit, launched.options.smem);
  launched.variables.push_back({key, begin, end});
  launched.variables_end = end;
  for (int i = 0; i < launched.resident; ++i) memset(blocks[i].shared + begin, 0xff, bytes);
  return current->block->shared + begin;
}

uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - current->block->shared) + kFirstAddress;
}

char* shared_at(uint32_t address, size_t bytes, const Thread& by, Site site) {
  const size_t offset = size_t{address} - kFirstAddress;
  if (!inside(offset, bytes))
    report(site, Then::abandon,
           "shared memory address %#x (offset %zd, %zu bytes) is outside the %zu dynamic bytes of this launch and "
           "every KK_SHARED variable, by %s",
           address, static_cast<ptrdiff_t>(offset), bytes, launched.smem, text(by).c_str());
  return by.block->shared + offset;
}

void check_shared_bounds(uintptr_t address, size_t bytes, Access kind, const Thread& by, const Where& where) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(by.block->shared);
  if (!inside(offset, bytes))
    report(where, Then::abandon,
           "%s of %zu bytes at shared memory offset %zd is outside the %zu dynamic bytes of this launch and every "
           "KK_SHARED variable, by %s",
           text(kind), bytes, static_cast<ptrdiff_t>(offset), launched.smem, text(by).c_str());
}

}  // namespace simt
