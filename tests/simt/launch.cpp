// A launch: its blocks one after the other, or up to four interleaved.
#include <map>
#include <mutex>

#include "runtime.h"

namespace simt {

Launch launched;
Block blocks[kMaxResident];

namespace {

Options next_options;
Thread threads[kMaxResident * kMaxThreads];
uint32_t blocks_run = 1;  // 0: in shadow memory that nobody has touched

void run_thread() {
  launched.invoke(launched.closure);
  Thread& me = *current;
  Block& b = *me.block;
  Warp& w = b.warp[me.warp];
  if (!me.copies.empty())
    report(me.copies[0].site, Then::go_on, "%zu cp.async are never waited for, by %s", me.copies.size(),
           text(me).c_str());
  me.state = State::exited;
  w.runnable &= ~(1u << me.lane);
  if (!w.runnable) b.runnable_warps &= ~(1u << me.warp);
  w.exited |= 1u << me.lane;
  ++b.exited;
  complete_meetings(b, me.warp);
  leave_barrier(b, me);
  switch_to(b.running() ? next_thread() : nullptr);
}

dim3 unflatten(uint32_t i, dim3 size) { return dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y)); }

void start_block(Block& b, uint32_t number) {
  const dim3 index = unflatten(number, launched.grid);
  b.index = {index.x, index.y, index.z};
  b.serial = blocks_run++;
  b.threads = static_cast<int>(launched.size.x * launched.size.y * launched.size.z);
  b.exited = 0;
  b.thread = threads + (&b - blocks) * kMaxThreads;
  b.barrier.arrived = 0;
  b.runnable_warps = 0;
  b.current_warp = 0;
  for (int w = 0; w * 32 < b.threads; ++w) {
    const int lanes = std::min(32, b.threads - w * 32);
    b.warp[w].runnable = ~0u >> (32 - lanes);
    b.warp[w].exited = ~b.warp[w].runnable;
    b.warp[w].meetings = 0;
    b.runnable_warps |= 1u << w;
  }
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    const dim3 at = unflatten(static_cast<uint32_t>(i), launched.size);
    t.sp = new_fiber(static_cast<int>(&t - threads), run_thread);
    t.index = {at.x, at.y, at.z};
    t.number = static_cast<uint16_t>(i);
    t.warp = static_cast<uint8_t>(i / 32);
    t.lane = i % 32;
    t.state = State::runnable;
    t.block = &b;
    t.clock = 0;
    t.copy_groups = 0;
    t.copies.clear();
  }
  fill_shared_memory(b);
  synchronise(b);
  b.first_epoch = b.epoch;
}

void report_deadlock(const Block& b) {
  std::map<std::string, std::vector<int>> waiting;
  for (int i = 0; i < b.threads; ++i) {
    const Thread& t = b.thread[i];
    if (t.state == State::exited) continue;
    const char* what = t.state == State::at_barrier ? "at a barrier, " : "for lanes of their warp, ";
    waiting[what + text(Where(t.site))].push_back(i);
  }
  std::string groups;
  for (const auto& [what, who] : waiting)
    groups += format("\n    %zu threads (%d..%d) wait %s", who.size(), who.front(), who.back(), what.c_str());
  report(Where(uintptr_t{0}), Then::abandon, "deadlock in block (%u,%u,%u), %d of whose %d threads have exited:%s",
         b.index.x, b.index.y, b.index.z, b.exited, b.threads, groups.c_str());
}

std::vector<uint32_t> block_order(uint32_t n) {
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; ++i) order[i] = launched.options.blocks == Order::descending ? n - 1 - i : i;
  if (launched.options.blocks == Order::random)
    for (uint32_t i = n; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  return order;
}

// False once all blocks are through.
bool refill(const std::vector<uint32_t>& order, size_t& next) {
  bool any = false;
  for (int i = 0; i < launched.resident; ++i) {
    Block& b = blocks[i];
    if (!b.running() && b.threads) {
      check_canary(b);
      b.threads = b.exited = 0;
    }
    if (!b.running() && next < order.size()) start_block(b, order[next++]);
    any |= b.running();
  }
  return any;
}

}  // namespace

Options& options() { return next_options; }

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
uint3 block_size() { return {launched.size.x, launched.size.y, launched.size.z}; }
uint3 grid_size() { return {launched.grid.x, launched.grid.y, launched.grid.z}; }
unsigned lane_id() { return current->lane; }

void trap(Site site) {
  report(site, Then::abandon, "__trap() by %s", text(*current).c_str());
  __builtin_unreachable();
}

void launch_closure(void (*invoke)(void*), void* closure, size_t closure_bytes, const void* function, dim3 grid,
                    dim3 size, size_t smem) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const FaultHandler faults;
  launched = Launch{next_options, function, invoke, closure, closure_bytes, grid, size, smem, blocks_run};
  forget_repeats();
  const uint64_t n_threads = uint64_t{size.x} * size.y * size.z, n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (n_threads == 0 || n_threads > kMaxThreads || size.z > 64 || n_blocks == 0 || n_blocks > 1u << 31 ||
      grid.y > 65535 || grid.z > 65535 || smem > static_cast<size_t>(launched.options.smem)) {
    report(Where(uintptr_t{0}), Then::abandon,
           "invalid launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory", grid.x, grid.y,
           grid.z, size.x, size.y, size.z, smem);
  } else {
    seed(launched.options.seed);
    find_module();
    map_shared_memory();
    start_race_checks(static_cast<int>(n_blocks));
    for (Block& b : blocks) b.threads = b.exited = 0;
    launched.resident =
        static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(launched.options.resident), n_blocks));
    const std::vector<uint32_t> order = block_order(static_cast<uint32_t>(n_blocks));
    size_t next = 0;
    while (!launched.abandoned && refill(order, next)) {
      Thread* const t = next_thread();
      if (t) {
        switch_to(t);
        continue;
      }
      for (int i = 0; i < launched.resident; ++i)
        if (blocks[i].running()) report_deadlock(blocks[i]);
      launched.abandoned = true;
    }
  }
}

}  // namespace simt
