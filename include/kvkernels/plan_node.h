// Tokens that sequences share.
#pragma once
#include <cstdint>

namespace kk {

// Nodes from a leaf up to its root, at most: CUDA keeps a partial result of every query row for every level. Where a tree
// is deeper, its lowest shared nodes are left out and their tokens go to the leaves.
constexpr int kMaxPlanDepth = 8;

// A run of tokens whose pages several sequences have in common: the pages are those of any of them. Nodes form a forest;
// the sequences of a node stand together in the plan's order, and the nodes from leaf[b] up through the parents hold the
// tokens [0, seq_lens[b]) of sequence b, each once.
struct PlanNode {
  int32_t first, last;  // its sequences are order[first] ... order[last - 1]; first == last: unused
  int32_t begin, end;   // tokens; begin is a multiple of page_size, and end too where several sequences share the node
  int32_t parent;       // node with the tokens before, or -1
};
}  // namespace kk
