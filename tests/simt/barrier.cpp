// __syncthreads and its voting relatives.
#include "runtime.h"

namespace simt {
namespace {

void release(Block& b) {
  Barrier& barrier = b.barrier;
  barrier.result = barrier.votes;
  barrier.arrived = 0;
  synchronise(b);
  for (int i = 0; i < b.threads; ++i)
    if (b.thread[i].state == State::at_barrier) wake(b.thread[i]);
}

}  // namespace

Votes syncthreads_vote(bool vote, Site site) {
  Thread& me = *current;
  Block& b = *me.block;
  Barrier& barrier = b.barrier;
  maybe_preempt();
  if (b.exited)
    report(site, Then::abandon, "__syncthreads by %s, but %d threads of its block have exited the kernel",
           text(me).c_str(), b.exited);
  if (!barrier.arrived) {
    barrier.site = site;
    barrier.votes = {0, false, true};
  } else if (barrier.site.line != site.line) {
    report(site, Then::abandon, "barrier divergence: this is one __syncthreads, another thread waits at %s; by %s",
           text(barrier.site).c_str(), text(me).c_str());
  }
  Votes& votes = barrier.votes;
  votes = {votes.count + vote, votes.any || vote, votes.all && vote};
  if (++barrier.arrived < b.threads - b.exited) {
    wait(State::at_barrier, site);
  } else {
    release(b);
    // The result outlives the yield: nobody can complete the next barrier without this thread.
    if (launched.options.threads == Order::random) yield();
  }
  return barrier.result;
}

void syncthreads(Site site) { syncthreads_vote(false, site); }

void leave_barrier(Block& b, const Thread& exiting) {
  if (!b.barrier.arrived) return;
  report(b.barrier.site, Then::abandon, "__syncthreads: %d threads wait here, but another has exited the kernel: %s",
         b.barrier.arrived, text(exiting).c_str());
}

}  // namespace simt
