// Which thread runs next. A schedule is deterministic: the same options, the same interleaving.
#include "runtime.h"

namespace simt {

Thread* current = nullptr;

namespace {

constexpr int kMaxSpins = 100000;
void* launch_sp;
uint64_t state;

// One of the set bits of m, not all equally likely.
int random_bit(unsigned m, unsigned r) {
  r &= 31;
  return static_cast<int>((static_cast<unsigned>(__builtin_ctz(m >> r | m << (-r & 31))) + r) & 31);
}

// A warp runs until all its lanes wait; in random order another may cut in.
Thread* next_of(Block& b) {
  if (!b.runnable_warps) return nullptr;
  const bool stay = b.runnable_warps >> b.current_warp & 1;
  int lane = 0;
  switch (launched.options.threads) {
    case Order::ascending:
      if (!stay) {
        const unsigned later = b.runnable_warps & ~((2u << b.current_warp) - 1);
        b.current_warp = __builtin_ctz(later ? later : b.runnable_warps);
      }
      lane = __builtin_ctz(b.warp[b.current_warp].runnable);
      break;
    case Order::descending:
      if (!stay) b.current_warp = 31 - __builtin_clz(b.runnable_warps);
      lane = 31 - __builtin_clz(b.warp[b.current_warp].runnable);
      break;
    case Order::random: {
      const uint64_t r = random_bits();
      if (!stay || (r & 7) == 0) b.current_warp = random_bit(b.runnable_warps, static_cast<unsigned>(r >> 8));
      lane = random_bit(b.warp[b.current_warp].runnable, static_cast<unsigned>(r >> 16));
      break;
    }
  }
  return &b.thread[b.current_warp * 32 + lane];
}

}  // namespace

uint64_t random_bits() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}
void seed(uint64_t s) { state = s * 0x9e3779b97f4a7c15u + 88172645463325252u; }

Thread* next_thread() {
  const int resident = launched.resident;
  if (resident == 1) return blocks[0].running() ? next_of(blocks[0]) : nullptr;
  int first = current ? static_cast<int>(current->block - blocks) : 0;
  if (launched.options.threads == Order::random && random_bits() % 16 == 0)
    first = static_cast<int>(random_bits() % static_cast<unsigned>(resident));
  for (int i = 0; i < resident; ++i) {
    Block& b = blocks[(first + i) % resident];
    if (!b.running()) continue;
    if (Thread* t = next_of(b)) return t;
  }
  return nullptr;
}

void switch_to(Thread* next) {
  Thread* const me = current;
  if (me == next) return;
  current = next;
  simt_switch(me ? &me->sp : &launch_sp, next ? next->sp : launch_sp);
}

void wait(State why, Site site) {
  Thread& me = *current;
  Block& b = *me.block;
  me.state = why;
  me.site = site;
  Warp& w = b.warp[me.warp];
  w.runnable &= ~(1u << me.lane);
  if (!w.runnable) b.runnable_warps &= ~(1u << me.warp);
  switch_to(next_thread());
}

void wake(Thread& t) {
  t.state = State::runnable;
  t.block->warp[t.warp].runnable |= 1u << t.lane;
  t.block->runnable_warps |= 1u << t.warp;
}

void yield() { switch_to(next_thread()); }

void maybe_preempt() {
  const auto n = static_cast<unsigned>(launched.options.preempt);
  if (n && random_bits() % n == 0) yield();
}

// Round and round through all threads of all blocks: any other order might give the turn back to one that spins, for ever.
void spin(Site site) {
  const Thread& me = *current;
  if (++launched.spins > kMaxSpins)
    report(site, Then::abandon, "%d __nanosleep in one launch: what it waits for never comes, by %s", kMaxSpins,
           text(me).c_str());
  const int own = static_cast<int>(me.block - blocks);
  for (int i = 0; i <= launched.resident; ++i) {
    Block& b = blocks[(own + i) % launched.resident];
    for (int k = i == 0 ? me.number + 1 : 0; k < b.threads; ++k) {
      if (b.thread[k].state != State::runnable) continue;
      b.current_warp = k / 32;
      return switch_to(&b.thread[k]);
    }
  }
}

}  // namespace simt
