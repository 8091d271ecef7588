// cp.async: a copy may land at any time between its start and its wait. Late finds a missing wait, early a buffer that is
// refilled while others still read it; the check build reports both in either mode.
#include "runtime.h"

namespace simt {
namespace {

void land(Copy& c) {
  if (!c.landed) {
    memcpy(c.dst, c.src, static_cast<size_t>(c.src_bytes));
    memset(c.dst + c.src_bytes, 0, static_cast<size_t>(c.bytes - c.src_bytes));
    c.landed = true;
  }
}

}  // namespace

void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, Site site) {
  Thread& me = *current;
  const auto from = reinterpret_cast<uintptr_t>(src);
  const auto n = static_cast<size_t>(bytes);
  maybe_preempt();
  if (dst % n || (src_bytes && from % n))
    report(site, Then::abandon, "cp.async of %d bytes: destination %#x or source %p is not %d-byte aligned, by %s",
           bytes, dst, src, bytes, text(me).c_str());
  char* const to = shared_at(dst, n, me, site);
  if (src_bytes) check_access(from, static_cast<size_t>(src_bytes), Access::read, me, site);
  if (instrumented) copy_starts(to, n, me, site);
  me.copies.push_back({to, src, bytes, src_bytes, me.copy_groups, false, site});
  const Copies when = launched.options.copies;
  if (when == Copies::early || (when == Copies::random && random_bits() % 2)) land(me.copies.back());
}

void cp_async_commit() { ++current->copy_groups; }

// Copies that were not committed belong to no group, and are not waited for.
void cp_async_wait(int groups_left) {
  Thread& me = *current;
  auto& copies = me.copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group + static_cast<uint32_t>(groups_left) < me.copy_groups; ++done) {
    Copy& c = copies[done];
    land(c);
    if (instrumented) copy_lands(c.dst, static_cast<size_t>(c.bytes), me, c.site);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace simt
