// What the lanes of a warp do together: shuffles, votes, reductions, __syncwarp, and the matrix instructions of mma.cpp.
#include "runtime.h"

namespace simt {
namespace {

// True once all lanes of the mask that have not exited are there, and then it is done.
bool try_complete(Block& b, int warp, int i) {
  Warp& w = b.warp[warp];
  Meeting& m = w.meeting[i];
  if (m.mask & ~w.exited & ~m.arrived) return false;
  if (m.what->whole_warp && m.arrived != ~0u)
    report(m.site, Then::abandon, "%s needs all 32 lanes, but lanes %#x of warp %d exited or were never launched",
           m.what->name, ~m.arrived, warp);
  m.what->run(b, warp, m);
  for (unsigned rest = m.arrived; rest; rest &= rest - 1)
    b.thread[warp * 32 + __builtin_ctz(rest)].state = State::runnable;
  w.runnable |= m.arrived;
  b.runnable_warps |= 1u << warp;
  if (i != --w.meetings) m = w.meeting[w.meetings];
  return true;
}

template <typename F>
void for_lanes(unsigned lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

struct ShuffleArgument {
  Shuffle kind;
  uint64_t value;
  unsigned argument, width;
};
// The lane that lane l reads from, in its segment of width lanes.
int source_lane(int l, const ShuffleArgument& a) {
  const int width = static_cast<int>(a.width), first = l & -width, last = first + width - 1;
  const int n = static_cast<int>(a.argument);
  switch (a.kind) {
    case Shuffle::index:
      return first + (n & (width - 1));
    case Shuffle::up:
      return l - n < first ? l : l - n;
    case Shuffle::down:
      return l + n > last ? l : l + n;
    case Shuffle::exclusive_or:
      return (l ^ n) > last ? l : l ^ n;
  }
  __builtin_unreachable();
}
void run_shuffle(Block& b, int warp, Meeting& m) {
  uint64_t values[32];
  for_lanes(m.arrived, [&](int l) { values[l] = static_cast<ShuffleArgument*>(m.argument[l])->value; });
  for_lanes(m.arrived, [&](int l) {
    auto& a = *static_cast<ShuffleArgument*>(m.argument[l]);
    const int from = source_lane(l, a);
    if (!(m.arrived >> from & 1)) {
      const char* why = b.warp[warp].exited >> from & 1 ? "has exited" : "is not in the mask";
      report(m.site, Then::abandon, "shuffle reads lane %d, which %s (%#x), by %s", from, why, m.mask,
             text(b.thread[warp * 32 + l]).c_str());
    }
    a.value = values[from];
  });
}
constexpr Collective kShuffle{"__shfl_sync", false, run_shuffle};

struct BallotArgument {
  bool vote;
  unsigned result;
};
void run_ballot(Block&, int, Meeting& m) {
  unsigned votes = 0;
  for_lanes(m.arrived, [&](int l) { votes |= unsigned{static_cast<BallotArgument*>(m.argument[l])->vote} << l; });
  for_lanes(m.arrived, [&](int l) { static_cast<BallotArgument*>(m.argument[l])->result = votes; });
}
constexpr Collective kBallot{"vote.sync", false, run_ballot};

struct ReduceArgument {
  Reduce kind;
  uint32_t value;
};
uint32_t combine(Reduce kind, uint32_t a, uint32_t b) {
  const auto x = static_cast<int32_t>(a), y = static_cast<int32_t>(b);
  switch (kind) {
    case Reduce::add:
      return a + b;
    case Reduce::smin:
      return static_cast<uint32_t>(std::min(x, y));
    case Reduce::smax:
      return static_cast<uint32_t>(std::max(x, y));
    case Reduce::umin:
      return std::min(a, b);
    case Reduce::umax:
      return std::max(a, b);
  }
  __builtin_unreachable();
}
void run_reduce(Block&, int, Meeting& m) {
  const int first = __builtin_ctz(m.arrived);
  ReduceArgument all = *static_cast<ReduceArgument*>(m.argument[first]);
  for_lanes(m.arrived & (m.arrived - 1), [&](int l) {
    all.value = combine(all.kind, all.value, static_cast<ReduceArgument*>(m.argument[l])->value);
  });
  for_lanes(m.arrived, [&](int l) { static_cast<ReduceArgument*>(m.argument[l])->value = all.value; });
}
constexpr Collective kReduce{"__reduce_sync", false, run_reduce};

void run_syncwarp(Block& b, int warp, Meeting& m) { synchronise(b, warp, m.arrived); }
constexpr Collective kSyncwarp{"__syncwarp", false, run_syncwarp};

}  // namespace

void meet(const Collective& what, unsigned mask, void* argument, Site site) {
  Thread& me = *current;
  Block& b = *me.block;
  Warp& w = b.warp[me.warp];
  const unsigned lane = 1u << me.lane;
  maybe_preempt();
  if (!(mask & lane))
    report(site, Then::abandon, "%s with mask %#x, which does not name the caller, by %s", what.name, mask,
           text(me).c_str());
  int i = 0;
  while (i < w.meetings && w.meeting[i].mask != mask) ++i;
  Meeting& m = w.meeting[i];
  if (i == w.meetings) {
    ++w.meetings;
    m.what = &what;
    m.mask = mask;
    m.arrived = 0;
    m.site = site;
  } else if (m.what != &what || (what.whole_warp && m.site.line != site.line)) {
    report(site, Then::abandon, "divergence: %s by %s, while lane %d of the same warp (mask %#x) waits at %s, %s",
           what.name, text(me).c_str(), __builtin_ctz(m.arrived), mask, m.what->name, text(m.site).c_str());
  }
  m.arrived |= lane;
  m.argument[me.lane] = argument;
  if (!try_complete(b, me.warp, i)) return wait(State::in_warp, site);
  if (launched.options.threads == Order::random) yield();
}

void complete_meetings(Block& b, int warp) {
  for (int i = 0; i < b.warp[warp].meetings;)
    if (!try_complete(b, warp, i)) ++i;
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width, Site site) {
  if (width == 0 || width > 32 || (width & (width - 1)))
    report(site, Then::abandon, "shuffle width %u is not a power of two up to 32", width);
  ShuffleArgument a{kind, value, argument, width};
  meet(kShuffle, mask, &a, site);
  return a.value;
}

unsigned ballot(unsigned mask, bool vote, Site site) {
  BallotArgument a{vote, 0};
  meet(kBallot, mask, &a, site);
  return a.result;
}

uint32_t reduce(Reduce kind, unsigned mask, uint32_t value, Site site) {
  ReduceArgument a{kind, value};
  meet(kReduce, mask, &a, site);
  return a.value;
}

void syncwarp(unsigned mask, Site site) { meet(kSyncwarp, mask, nullptr, site); }

}  // namespace simt
