// plan: schema, checks. Behind plan_prefix and plan_decode.
#include "kvkernels/ops/plan.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

void plan(const std::optional<Tensor>& page_table_arg, const Tensor& seq_lens_arg, int64_t page_size,
          int64_t num_queries, int64_t min_tokens, const Tensor& nodes_arg, const Tensor& order_arg,
          const Tensor& leaf_arg) {
  Check c(page_table_arg ? "plan_prefix" : "plan_decode");
  const View seq_lens = c.is("seq_lens", seq_lens_arg, kI32, "B");
  const View page_table = c.is("page_table", page_table_arg, kI32, "B ?max_pages");
  const View nodes = c.is("nodes", nodes_arg, kI32, "?nodes 5");
  const View order = c.is("order", order_arg, kI32, "B"), leaf = c.is("leaf", leaf_arg, kI32, "B");
  PlanParams p{};
  p.B = seq_lens.size[0];
  if (nodes.size[0] != 2 * p.B) c.refuse("nodes must be [2 B, 5], got ", shape_text(nodes.size, 2), "; B = ", p.B);
  for (const View* written : {&nodes, &order, &leaf}) {
    c.contiguous(*written);
    c.writable(*written);
  }
  if (page_size < 1) c.refuse("page_size must be at least 1, got ", page_size);
  if (num_queries < 1) c.refuse("num_queries must be at least 1, got ", num_queries);
  if (min_tokens < 0) c.refuse("min_tokens must not be negative, got ", min_tokens);
  if (p.B == 0) return;

  if (page_table) {
    p.page_table = page_table.data<int32_t>();
    p.max_pages = page_table.size[1];
    p.table_stride = page_table.stride[0];
  }
  p.seq_lens = seq_lens.data<int32_t>();
  p.page_size = page_size;
  p.num_queries = num_queries;
  p.min_tokens = min_tokens;
  p.nodes = nodes.mutable_data<PlanNode>();
  p.order = order.mutable_data<int32_t>();
  p.leaf = leaf.mutable_data<int32_t>();
  if (c.on_cpu()) {
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t len = p.seq_lens[b], pages = (len + page_size - 1) / page_size;
      if (len < 0) c.refuse("seq_lens[", b, "] = ", len, " is negative");
      if (page_table && pages > p.max_pages)
        c.refuse("page_table is too narrow: seq_lens[", b, "] = ", len, " needs ", pages, " pages of ", page_size,
                 " tokens, but page_table.size(1) = ", p.max_pages);
    }
  }
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::plan_workspace(p, exec));
    p.workspace = workspace.data();
    backend::plan(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "plan(Tensor? page_table, Tensor seq_lens, SymInt page_size, SymInt num_queries, SymInt min_tokens, "
      "Tensor(a!) nodes, Tensor(b!) order, Tensor(c!) leaf) -> ()");
}
KK_REGISTER(plan)
