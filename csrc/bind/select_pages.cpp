// select_pages: schema, checks. Behind select_tokens too.
#include "kvkernels/ops/select_pages.h"

#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/exec.h"

namespace kk::bind {
namespace {

void select_pages(const Tensor& scores_arg, const Tensor& seq_lens_arg, int64_t k, int64_t item_tokens, int64_t sink,
                  int64_t recent, const std::optional<Tensor>& row_k_arg, bool tokens, const Tensor& out_arg) {
  Check c(tokens ? "select_tokens" : "select_pages");
  const char* what = tokens ? "tokens" : "pages";
  const View scores = c.is("scores", scores_arg, kF32, "B Hkv n");
  const View seq_lens = c.is("seq_lens", seq_lens_arg, kI32, "B");
  if (item_tokens < 1) c.refuse("page_size must be at least 1, got ", item_tokens);
  if (k < 1) c.refuse("k must be at least 1, got ", k);
  if (sink < 0) c.refuse("sink_", what, " must not be negative, got ", sink);
  if (recent < 0) c.refuse("recent_", what, " must not be negative, got ", recent);
  if (sink + recent > k)
    c.refuse("k must be at least sink_", what, " + recent_", what, " = ", sink, " + ", recent, ", got ", k);
  const View row_k = c.is("row_k", row_k_arg, kI32, "B Hkv");
  c.bind("k", k, "k");
  const View out = c.is("out", out_arg, kI32, "B Hkv k");
  c.contiguous(out);
  c.writable(out);

  SelectPagesParams p{};
  p.scores = scores.data<float>();
  p.score_batch = scores.stride[0], p.score_head = scores.stride[1];
  p.seq_lens = seq_lens.data<int32_t>();
  if (row_k) {
    p.row_k = row_k.data<int32_t>();
    p.row_k_batch = row_k.stride[0], p.row_k_head = row_k.stride[1];
  }
  p.B = scores.size[0], p.H = scores.size[1], p.n = scores.size[2];
  p.k = k;
  p.item_tokens = item_tokens;
  p.sink = sink, p.recent = recent;
  p.out = out.mutable_data<int32_t>();
  if (p.B == 0 || p.H == 0) return;
  if (c.on_cpu()) {
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t len = p.seq_lens[b], items = (len + item_tokens - 1) / item_tokens;
      if (len < 0) c.refuse("seq_lens[", b, "] = ", len, " is negative");
      if (items > p.n)
        c.refuse("scores is too narrow: seq_lens[", b, "] = ", len, " has ", items, " ", what,
                 ", but scores.size(2) = ", p.n);
    }
  }
  on_device(c, [&](const auto& exec) {
    const Workspace workspace(c, backend::select_pages_workspace(p, exec));
    p.workspace = workspace.data();
    backend::select_pages(p, exec);
  });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "select_pages(Tensor scores, Tensor seq_lens, SymInt k, SymInt item_tokens, SymInt sink, SymInt recent, Tensor? "
      "row_k, bool tokens, Tensor(a!) out) -> ()");
}
KK_REGISTER(select_pages)
