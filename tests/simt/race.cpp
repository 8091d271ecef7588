// Data races, reads of shared memory that nobody wrote, and accesses to what a cp.async is still filling.
//
// Two accesses of a block to one byte, one of them a write, need a barrier between them: their epochs then differ. Within
// an epoch, __syncwarp orders lanes of a warp: every lane counts its synchronisations (its clock), and w.clocks[a][b] is
// what lane a knows of lane b's clock. Shuffles and votes order nothing, as on a GPU.
//
// Blocks of a launch are ordered only by atomics, and only roughly: if the earlier block has executed an atomic since its
// access, and the later one too, they are taken for ordered. Which address, and a missing __threadfence, are not looked at.
#include <cstdlib>
#include <memory>
#include <unordered_map>

#include "runtime.h"

namespace simt {
namespace {

uint32_t last_epoch;
uint32_t atomics;                        // executed in all
std::vector<uint32_t> atomics_of_block;  // of this launch: `atomics` at the block's last one

// ---- is the earlier access ordered before one that t makes now?
bool ordered(const Stamp& earlier, const Thread& t) {
  const Block& b = *t.block;
  if (earlier.epoch != b.epoch || earlier.thread == t.number) return true;
  if (earlier.thread / 32 != t.warp) return false;
  const Warp& w = b.warp[t.warp];
  return w.clock_epoch == b.epoch && w.clocks[t.lane][earlier.thread % 32] > earlier.clock;
}
bool ordered(const GlobalStamp& earlier, const Thread& t) {
  if (earlier.block < launched.first_block) return true;  // an earlier launch, or never
  if (earlier.block == t.block->serial) return ordered(static_cast<const Stamp&>(earlier), t);
  return atomics_of_block[earlier.block - launched.first_block] > earlier.atomics &&
         atomics_of_block[t.block->serial - launched.first_block] > earlier.atomics;
}

Stamp stamp(const Thread& t, Access kind) { return {t.block->epoch, t.clock, t.number, kind == Access::atomic, 0}; }

// Enters an access of t into a cell. Returns what it collides with, or nullptr.
template <typename S>
const S* collision(Cell<S>& c, const S& now, Access kind, const Thread& t) {
  if (!ordered(c.write, t) && !(now.atomic && c.write.atomic)) return &c.write;
  if (kind == Access::read) {
    (ordered(c.read, t) ? c.read : c.other_read) = now;
    return nullptr;
  }
  for (const S* r : {&c.read, &c.other_read})
    if (!ordered(*r, t)) return r;
  c.write = now;
  return nullptr;
}

std::string text(const Stamp& s, const Block& b, bool write) {
  return format("\n    not ordered after a%s by %s", write ? (s.atomic ? "n atomic" : " write") : " read",
                text(b.thread[s.thread]).c_str());
}

// ---- shadow of global memory, a page at a time
constexpr size_t kShadowed = 1024, kMaxPages = 2048, kRecent = 64;
struct Page {
  Cell<GlobalStamp> cells[kShadowed];
};
struct Release {
  void operator()(Page* p) const { ::free(p); }
};
std::unordered_map<uintptr_t, std::unique_ptr<Page, Release>> pages;
struct {
  uintptr_t number;
  Page* page;
} recent[kRecent];

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / kShadowed;
  auto& slot = recent[number % kRecent];
  if (slot.number != number || !slot.page) {
    auto& page = pages[number];
    if (!page) page.reset(static_cast<Page*>(calloc(1, sizeof(Page))));
    slot = {number, page.get()};
  }
  return *slot.page;
}

}  // namespace

void start_race_checks(int blocks_of_grid) {
  // What is there is of earlier launches, and only saves the allocation.
  if (pages.size() > kMaxPages) {
    pages.clear();
    std::fill(std::begin(recent), std::end(recent), std::remove_reference_t<decltype(recent[0])>{});
  }
  atomics_of_block.assign(static_cast<size_t>(blocks_of_grid), 0);
}

void synchronise(Block& b) { b.epoch = ++last_epoch; }

void synchronise(Block& b, int warp, unsigned lanes) {
  if (!instrumented) return;
  Warp& w = b.warp[warp];
  if (w.clock_epoch != b.epoch) {
    w.clock_epoch = b.epoch;
    memset(w.clocks, 0, sizeof w.clocks);
  }
  uint32_t all[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    for (int k = 0; k < 32; ++k) all[k] = std::max(all[k], w.clocks[l][k]);
    all[l] = ++b.thread[warp * 32 + l].clock;
  }
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) memcpy(w.clocks[l], all, sizeof all);
}

void check_shared_race(const char* p, size_t bytes, Access kind, Thread& by, const Where& where) {
  const Block& b = *by.block;
  Cell<Stamp>* const cells = b.shared_cells + (p - b.shared);
  const Stamp now = stamp(by, kind);
  for (size_t i = 0; i < bytes; ++i) {
    Cell<Stamp>& c = cells[i];
    const ptrdiff_t offset = p - b.shared + static_cast<ptrdiff_t>(i);
    const bool written = c.write.epoch >= b.first_epoch;
    if (written && c.write.in_flight)
      return report(
          where, Then::go_on,
          "%s of shared memory (offset %zd) into which a cp.async is in flight (no cp.async.wait_group yet), by %s",
          text(kind), offset, text(by).c_str());
    if (kind == Access::read && !written)
      return report(where, Then::go_on, "read of uninitialised shared memory (offset %zd) by %s", offset,
                    text(by).c_str());
    if (const Stamp* other = collision(c, now, kind, by))
      return report(where, Then::go_on, "data race in shared memory (offset %zd): %s by %s%s", offset, text(kind),
                    text(by).c_str(), text(*other, b, other == &c.write).c_str());
  }
}

void copy_starts(const char* p, size_t bytes, Thread& by, const Where& where) {
  check_shared_race(p, bytes, Access::write, by, where);
  Cell<Stamp>* const cells = by.block->shared_cells + (p - by.block->shared);
  for (size_t i = 0; i < bytes; ++i) cells[i].write.in_flight = 1;
}

void copy_lands(const char* p, size_t bytes, Thread& by, const Where& where) {
  Cell<Stamp>* const cells = by.block->shared_cells + (p - by.block->shared);
  for (size_t i = 0; i < bytes; ++i) cells[i].write.in_flight = 0;
  check_shared_race(p, bytes, Access::write, by, where);
}

void check_global_race(uintptr_t address, size_t bytes, Access kind, const char* name, size_t offset, Thread& by,
                       const Where& where) {
  const Block& b = *by.block;
  if (kind == Access::atomic) atomics_of_block[b.serial - launched.first_block] = ++atomics;
  const GlobalStamp now{stamp(by, kind), b.serial, atomics};
  for (size_t i = 0; i < bytes; ++i) {
    Cell<GlobalStamp>& c = page_of(address + i).cells[(address + i) % kShadowed];
    const GlobalStamp* other = collision(c, now, kind, by);
    if (!other) continue;
    const bool same_block = other->block == b.serial;
    return report(where, Then::go_on, "data race on array '%s' at byte %zu: %s by %s%s", name, offset + i, text(kind),
                  text(by).c_str(),
                  same_block ? text(*other, b, other == &c.write).c_str()
                             : "\n    not ordered after an access by another block of this launch");
  }
}

}  // namespace simt
