// One block. Sequences that agree so far are a class with a leader, the smallest of them; all classes are divided in rounds,
// a round ending a class's run of pages where the first of its members leaves. Members compare their rows with the leader's
// once, to the first difference, and with another leader only from where they left: every table entry is read about once.
//
// A shared node belongs to the leader that its class had, and the nodes of a leader lie on the way to its leaf: so the places
// in the preorder follow from counts per sequence, whatever order the nodes were made in.
#include "kvkernels/ops/plan.h"

#include <string>

#include "cuda/launch.cuh"

namespace kk::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kMaxBatch = 2048;
constexpr int kArrays = 11;  // of int32_t [B] in shared memory
constexpr int kDone = -1;
constexpr int kMost = 0x7fffffff;

// A shared node. In the workspace, because few are touched.
struct Made {
  int32_t leader, count;
  int32_t begin, end, parent;
  int32_t depth;  // nodes above
  int32_t rank;   // those of the same leader among them
};

// The first place from `from` on where rows differ; by a warp.
__device__ int32_t common_pages(const int32_t* a, const int32_t* b, int32_t from, int32_t end) {
  constexpr int kAhead = 8;  // loads of a lane under way
  const int lane = threadIdx.x % 32;
  for (; from < end; from += kAhead * 32) {
    int32_t first = kMost;
#pragma unroll
    for (int i = kAhead - 1; i >= 0; --i) {
      const int32_t at = from + i * 32 + lane;
      if (at < end && a[at] != b[at]) first = at;
    }
    first = __reduce_min_sync(0xffffffffu, first);
    if (first != kMost) return first;
  }
  return end;
}

struct Planner {
  const PlanParams& p;
  const int B;
  Made* const nodes;
  int32_t* const num_made;
  // per sequence
  int32_t* const shareable;  // pages
  int32_t* const leader;     // kDone: its leaf is known
  int32_t* const common;     // pages in common with the leader
  int32_t* const least;      // of a leader: the fewest that a member has in common with it
  int32_t* const count;      // of a leader: members of its class
  int32_t* const begin;      // of a leader, and of a leaf: the first token that no shared node holds
  int32_t* const parent;     // and the shared node before it
  int32_t* const entry;      // of one that leaves its class: its next page,
  int32_t* const group;      // and the first that was found to leave the same class for the same page; -1: it stays
  int32_t* const slots;      // [2 B] hash table of those that were the first

  __device__ Planner(const PlanParams& params, int32_t* smem, int32_t* counter)
      : p(params),
        B(static_cast<int>(params.B)),
        nodes(static_cast<Made*>(params.workspace)),
        num_made(counter),
        shareable(smem),
        leader(smem + B),
        common(smem + 2 * B),
        least(smem + 3 * B),
        count(smem + 4 * B),
        begin(smem + 5 * B),
        parent(smem + 6 * B),
        entry(smem + 7 * B),
        group(smem + 8 * B),
        slots(smem + 9 * B) {}

  template <typename F>
  __device__ void each(F&& f) const {
    for (int b = threadIdx.x; b < B; b += kThreads) f(b);
    __syncthreads();
  }
  __device__ const int32_t* row(int b) const { return p.page_table + b * p.table_stride; }
  __device__ int depth_below(int node) const { return node < 0 ? 0 : nodes[node].depth + 1; }
  // Shared nodes that sequence b leads, once its leaf is known.
  __device__ int led(int b) const {
    return parent[b] >= 0 && nodes[parent[b]].leader == b ? nodes[parent[b]].rank + 1 : 0;
  }

  __device__ void begin_all() const {
    if (threadIdx.x == 0) *num_made = 0;
    each([&](int b) {
      const int64_t own = p.page_table ? p.seq_lens[b] - p.num_queries : 0, pages = own > 0 ? own / p.page_size : 0;
      shareable[b] = static_cast<int32_t>(pages < p.max_pages ? pages : p.max_pages);
      leader[b] = p.seq_lens[b] > 0 ? B : kDone;
      common[b] = begin[b] = 0;
      parent[b] = -1;
    });
  }

  // Those that have no more in common with their leader than `least` part from it, and go on with those that have the same
  // next page. At first there are no leaders, and all part.
  __device__ void part(bool at_first) const {
    each([&](int b) {
      slots[2 * b] = slots[2 * b + 1] = group[b] = -1;
      const int l = leader[b];
      if (l == kDone) return;
      if (!at_first) {
        const bool deepest = depth_below(parent[l]) == kMaxPlanDepth - 1;
        if (!deepest && (b == l || common[b] > least[l])) return;
        if (b != l) begin[b] = begin[l], parent[b] = parent[l];
        if (deepest) {
          leader[b] = kDone;
          return;
        }
      }
      if (shareable[b] == common[b]) {
        leader[b] = kDone;
        return;
      }
      entry[b] = row(b)[common[b]];
      group[b] = b;
    });
    each([&](int b) {
      if (group[b] < 0) return;
      count[b] = kMost;  // the smallest of the group, if b is its first
      const uint32_t key = static_cast<uint32_t>(entry[b]) * 2654435769u ^ static_cast<uint32_t>(leader[b]) * 40503u;
      for (uint32_t at = key >> 7;; ++at) {
        const int other = atomicCAS(&slots[at % static_cast<uint32_t>(2 * B)], -1, b);
        if (other != -1 && (entry[other] != entry[b] || leader[other] != leader[b])) continue;
        if (other != -1) group[b] = other;
        break;
      }
    });
    each([&](int b) {
      if (group[b] >= 0) atomicMin(&count[group[b]], b);
    });
    each([&](int b) {
      if (group[b] >= 0) leader[b] = count[group[b]];
    });
    for (int b = threadIdx.x / 32; b < B; b += kThreads / 32) {
      const int l = leader[b];
      if (group[b] < 0 || b == l) continue;
      const int32_t pages =
          common_pages(row(b), row(l), common[b] + 1, shareable[b] < shareable[l] ? shareable[b] : shareable[l]);
      __syncwarp();  // all lanes have read it
      if (threadIdx.x % 32 == 0) common[b] = pages;
    }
    __syncthreads();
  }

  // Ends the run of pages of each class; false when there are none.
  __device__ bool end_runs() const {
    each([&](int b) {
      if (leader[b] == b) least[b] = kMost, count[b] = 1;
    });
    each([&](int b) {
      const int l = leader[b];
      if (l == kDone || l == b) return;
      atomicMin(&least[l], common[b]);
      atomicAdd(&count[l], 1);
    });
    bool any = false;
    each([&](int b) {
      if (leader[b] != b) return;
      if (count[b] == 1) {
        leader[b] = kDone;
        return;
      }
      any = true;
      const int64_t end = least[b] * p.page_size, tokens = end - begin[b], n = count[b];
      if (tokens <= 0 || tokens * (n - 1) < p.min_tokens * n) return;
      const int node = atomicAdd(num_made, 1), above = parent[b];
      nodes[node] = {b, count[b], begin[b], static_cast<int32_t>(end), above, depth_below(above), led(b)};
      begin[b] = static_cast<int32_t>(end);
      parent[b] = node;
    });
    return __syncthreads_or(any);
  }

  // Of a node and the sequence that leads it: members of its child with the same leader.
  __device__ int first_child_count(int node) const {
    int n = 1;
    for (int x = parent[nodes[node].leader]; x != node; x = nodes[x].parent) n = nodes[x].count;
    return n;
  }

  __device__ void write(int num_full) const {
    int32_t *above = entry, *size = count, *offset = least, *place = group, *number = slots;
    each([&](int b) {  // of the highest node that b leads
      size[b] = 1;
      above[b] = p.seq_lens[b] > 0 ? parent[b] : -2;
      while (above[b] >= 0 && nodes[above[b]].leader == b)
        size[b] = nodes[above[b]].count, above[b] = nodes[above[b]].parent;
    });
    each([&](int b) {  // siblings stand by their leaders
      const int up = above[b];
      int sum = up == -2 ? num_full : up == -1 ? 0 : first_child_count(up);
      for (int other = 0; other < b; ++other) sum += above[other] == up ? size[other] : 0;
      offset[b] = sum;
    });
    each([&](int b) {
      int sum = offset[b];
      for (int up = above[b]; up >= 0; up = above[nodes[up].leader]) sum += offset[nodes[up].leader];
      place[b] = sum;
      p.order[sum] = b;
      size[b] = p.seq_lens[b] > 0 ? led(b) + 1 : 0;
    });
    each([&](int b) {
      int sum = 0;
      for (int other = 0; other < B; ++other) sum += place[other] < place[b] ? size[other] : 0;
      number[b] = sum;
    });
    const auto number_of = [&](int node) { return node < 0 ? -1 : number[nodes[node].leader] + nodes[node].rank; };
    for (int b = threadIdx.x; b < B; b += kThreads) {
      const int leaf = size[b] ? number[b] + size[b] - 1 : -1;
      p.leaf[b] = leaf;
      if (leaf >= 0) p.nodes[leaf] = {place[b], place[b] + 1, begin[b], p.seq_lens[b], number_of(parent[b])};
    }
    for (int i = threadIdx.x; i < *num_made; i += kThreads) {
      const Made& n = nodes[i];
      p.nodes[number_of(i)] = {place[n.leader], place[n.leader] + n.count, n.begin, n.end, number_of(n.parent)};
    }
    for (int i = num_full + *num_made + threadIdx.x; i < 2 * B; i += kThreads) p.nodes[i] = {0, 0, 0, 0, -1};
  }
};

__global__ __launch_bounds__(kThreads, 1) void plan_kernel(PlanParams p) {
  KK_DYN_SMEM(int32_t, smem);
  KK_SHARED(int32_t, counter, [1]);
  const Planner planner(p, smem, counter);
  planner.begin_all();
  planner.part(true);
  while (planner.end_runs()) planner.part(false);
  int full = 0;
  for (int first = 0; first < planner.B; first += kThreads) {
    const int b = first + threadIdx.x;
    full += __syncthreads_count(b < planner.B && p.seq_lens[b] > 0);
  }
  planner.write(full);
}

}  // namespace

int64_t plan_workspace(const PlanParams& p, const CudaExec&) { return p.B * static_cast<int64_t>(sizeof(Made)); }

void plan(const PlanParams& p, const CudaExec& exec) {
  if (p.B > kMaxBatch)
    fail((std::string(p.page_table ? "plan_prefix" : "plan_decode") + ": at most " + std::to_string(kMaxBatch) +
          " sequences on CUDA, got B = " + std::to_string(p.B))
             .c_str());
  launch(plan_kernel, dim3(1), dim3(kThreads), static_cast<size_t>(p.B * kArrays) * sizeof(int32_t), exec.stream, p);
}

}  // namespace kk::cuda
