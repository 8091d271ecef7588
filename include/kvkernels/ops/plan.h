#pragma once
#include "kvkernels/exec.h"
#include "kvkernels/plan_node.h"

namespace kk {

// Finds the sequences whose leading page-table entries are equal: a tree of runs of pages, each of which ends where its
// sequences cease to agree, or where the pages of one that may be shared are over. A run of T tokens and n sequences is a
// node if T (n - 1) >= min_tokens * n, because a node costs each of its sequences one more partial result; else its tokens
// go to each of its children, whose turn is then; below kMaxPlanDepth - 1 nodes all go to the leaves. What a sequence has
// to itself is a node too, its leaf.
// Nodes stand in preorder, children by the smallest sequence number below them, and so does `order`; empty sequences come
// last in it. Unused nodes are zeros with parent -1. The same on every device.
struct PlanParams {
  const int32_t* page_table;  // [B, max_pages], rows table_stride apart; null: nothing is shared
  int64_t max_pages, table_stride, page_size;
  const int32_t* seq_lens;  // [B]
  int64_t B;
  // Of a sequence, at least 1: the whole pages among its first seq_lens - num_queries tokens may be shared.
  int64_t num_queries;
  int64_t min_tokens;
  PlanNode* nodes;  // [2 B]
  int32_t* order;   // [B]
  int32_t* leaf;    // [B]
  void* workspace;  // plan_workspace(p, exec) bytes, 64-byte aligned
};

namespace cpu {
int64_t plan_workspace(const PlanParams& p, const CpuExec& exec);
void plan(const PlanParams& p, const CpuExec& exec);
}  // namespace cpu
namespace cuda {
int64_t plan_workspace(const PlanParams& p, const CudaExec& exec);
void plan(const PlanParams& p, const CudaExec& exec);
}  // namespace cuda

}  // namespace kk
