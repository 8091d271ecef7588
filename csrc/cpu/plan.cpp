// One thread. Sequences that agree so far are a class, a range of `member` in ascending order with a leader, its first.
// A member compares its row with the leader's once, to their first difference, and with another leader only from where it
// left the class: every table entry is read about once.
#include "kvkernels/ops/plan.h"

#include <cstring>

#include "cpu/entry.h"

KK_BEGIN

namespace {

struct Class {
  int32_t first, last;  // of member
  int32_t pages;        // that all have in common, at least
  int32_t begin;        // first token that no node holds yet
  int32_t parent;
  int32_t depth;  // of parent: nodes above
};

// Node numbers while the tree is made: the leaf of sequence b is b, shared nodes follow from B.
struct Links {
  int32_t parent, begin, end, child, last_child, next;
};

struct Slot {
  int32_t entry, group;
};

// A power of two, at least twice as many as there are entries.
int32_t slots_of(int64_t entries) {
  int32_t n = 2;
  while (n < 2 * entries) n *= 2;
  return n;
}

struct Planner {
  const PlanParams& p;
  int32_t B, num_links, height = 0;                                   // of the stack
  int32_t *shareable, *common, *member, *sorted, *group, *group_end;  // [B]
  Links* links;                                                       // [2 B]
  Class* stack;                                                       // [B]
  Slot* slot;                                                         // [slots_of(B)]

  static int64_t bytes(int64_t B) {
    return B * static_cast<int64_t>(6 * sizeof(int32_t) + 2 * sizeof(Links) + sizeof(Class)) +
           slots_of(B) * static_cast<int64_t>(sizeof(Slot));
  }
  explicit Planner(const PlanParams& params) : p(params), B(static_cast<int32_t>(params.B)), num_links(B) {
    int32_t* next = static_cast<int32_t*>(p.workspace);
    int32_t** const arrays[] = {&shareable, &common, &member, &sorted, &group, &group_end};
    for (int32_t** array : arrays) *array = next, next += B;
    links = reinterpret_cast<Links*>(next);
    stack = reinterpret_cast<Class*>(links + 2 * B);
    slot = reinterpret_cast<Slot*>(stack + B);
  }

  const int32_t* row(int32_t b) const { return p.page_table + b * p.table_stride; }

  int32_t common_pages(int32_t a, int32_t b, int32_t from) const {
    const int32_t end = shareable[a] < shareable[b] ? shareable[a] : shareable[b];
    const int32_t *x = row(a), *y = row(b);
    constexpr int32_t kBlock = 64;
    while (from + kBlock <= end && memcmp(x + from, y + from, kBlock * sizeof(int32_t)) == 0) from += kBlock;
    while (from < end && x[from] == y[from]) ++from;
    return from;
  }

  int32_t add(int32_t node, int32_t begin, int32_t end, int32_t parent) {
    links[node] = {parent, begin, end, -1, -1, -1};
    return node;
  }

  // member[first, last) agree on `pages` pages and part there, but for those with the same next page.
  void part(int32_t first, int32_t last, int32_t pages, const Class& from) {
    const uint32_t mask = static_cast<uint32_t>(slots_of(last - first)) - 1;
    for (uint32_t i = 0; i <= mask; ++i) slot[i].group = -1;
    int32_t groups = 0, grouped = 0;
    for (int32_t i = first; i < last; ++i) {
      const int32_t b = member[i];
      if (shareable[b] == pages) {
        add(b, from.begin, p.seq_lens[b], from.parent);
        continue;
      }
      const int32_t entry = row(b)[pages];
      uint32_t at = static_cast<uint32_t>(entry) * 2654435769u >> 7;
      while (slot[at & mask].group >= 0 && slot[at & mask].entry != entry) ++at;
      Slot& s = slot[at & mask];
      if (s.group < 0) s = {entry, groups}, group_end[groups++] = 0;
      ++group_end[s.group];
      group[grouped] = s.group;
      member[first + grouped++] = b;
    }
    for (int32_t g = 0, end = first; g < groups; ++g) {
      const int32_t count = group_end[g];
      if (count > 1) stack[height++] = {end, end + count, pages, from.begin, from.parent, from.depth};
      group_end[g] = end;
      end += count;
    }
    for (int32_t i = 0; i < grouped; ++i) sorted[group_end[group[i]]++] = member[first + i];
    for (int32_t i = 0; i < grouped; ++i) {
      const int32_t b = member[first + i] = sorted[first + i];
      add(b, from.begin, p.seq_lens[b], from.parent);  // of a group, its node will be another
    }
  }

  void divide(Class c) {
    const int32_t leader = member[c.first];
    for (int32_t i = c.first + 1; i < c.last; ++i) common[member[i]] = common_pages(leader, member[i], c.pages + 1);
    while (c.last - c.first > 1 && c.depth < kMaxPlanDepth - 1) {
      int32_t pages = common[member[c.first + 1]];
      for (int32_t i = c.first + 2; i < c.last; ++i)
        if (common[member[i]] < pages) pages = common[member[i]];
      const int64_t tokens = pages * p.page_size - c.begin, n = c.last - c.first;
      if (tokens > 0 && tokens * (n - 1) >= p.min_tokens * n) {
        const int32_t end = static_cast<int32_t>(pages * p.page_size);
        c.parent = add(num_links++, c.begin, end, c.parent);
        c.begin = end;
        ++c.depth;
      }
      // Those that go on with the leader stay in front.
      int32_t stay = c.first + 1, leave = 0;
      for (int32_t i = stay; i < c.last; ++i) {
        const int32_t b = member[i];
        if (common[b] > pages)
          member[stay++] = b;
        else
          sorted[leave++] = b;
      }
      for (int32_t i = 0; i < leave; ++i) member[stay + i] = sorted[i];
      part(stay, c.last, pages, c);
      c.last = stay;
    }
    for (int32_t i = c.first; i < c.last; ++i) add(member[i], c.begin, p.seq_lens[member[i]], c.parent);
  }

  void make_tree() {
    int32_t full = 0;
    for (int32_t b = 0; b < B; ++b) {
      const int64_t pages =
          p.page_table && p.seq_lens[b] > p.num_queries ? (p.seq_lens[b] - p.num_queries) / p.page_size : 0;
      shareable[b] = static_cast<int32_t>(pages < p.max_pages ? pages : p.max_pages);
      if (p.seq_lens[b] > 0) member[full++] = b;
    }
    part(0, full, 0, {0, full, 0, 0, -1, 0});
    while (height > 0) divide(stack[--height]);
  }

  // Preorder. A node is first met through its smallest sequence, so children are linked in the right order.
  void write() {
    int32_t root = -1, last_root = -1;
    for (int32_t b = 0; b < B; ++b) {
      if (p.seq_lens[b] <= 0) continue;
      for (int32_t node = b; node >= 0;) {
        const int32_t parent = links[node].parent;
        int32_t& last = parent < 0 ? last_root : links[parent].last_child;
        const bool met = last >= 0;
        if (last < 0)
          (parent < 0 ? root : links[parent].child) = node;
        else
          links[last].next = node;
        last = node;
        if (met) break;
        node = parent;
      }
    }
    int32_t count = 0, placed = 0;
    for (int32_t node = root; node >= 0;) {
      Links& l = links[node];
      const int32_t number = count++, above = l.parent < 0 ? -1 : links[l.parent].last_child;
      p.nodes[number] = {placed, placed + 1, l.begin, l.end, above};
      l.last_child = number;  // linked: from here on its number
      if (l.child >= 0) {
        node = l.child;
        continue;
      }
      p.order[placed++] = node;
      p.leaf[node] = number;
      while (node >= 0 && links[node].next < 0) {
        node = links[node].parent;
        if (node >= 0) p.nodes[links[node].last_child].last = placed;
      }
      if (node >= 0) node = links[node].next;
    }
    for (; count < 2 * B; ++count) p.nodes[count] = {0, 0, 0, 0, -1};
    for (int32_t b = 0; b < B; ++b)
      if (p.seq_lens[b] <= 0) p.order[placed++] = b, p.leaf[b] = -1;
  }
};

}  // namespace

int64_t plan_workspace_cpu(const PlanParams& p, const CpuExec&) { return Planner::bytes(p.B); }

void plan_cpu(const PlanParams& p, const CpuExec&) {
  Planner planner(p);
  planner.make_tree();
  planner.write();
}

KK_END

KK_CPU_ENTRY_R(int64_t, plan_workspace, PlanParams)
KK_CPU_ENTRY(plan, PlanParams)
