// page_summaries: schema, checks.
#include "kvkernels/ops/page_summaries.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind/exec.h"
#include "bind/page_table.h"
#include "bind/pool.h"
#include "bind/summary.h"

namespace kk::bind {
namespace {

// Pages of runs that stay as they are may be anything.
void check_pages(const Check& c, const PageSummariesParams& p) {
  const PageTable table = page_table_of(p);
  check_lengths(c, table);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t len = p.seq_lens[b], start = p.start ? p.start[b] : 0;
    if (start < 0) c.refuse("start[", b, "] = ", start, " is negative");
    if (!p.offsets) {
      check_entries(c, table, b, start / p.page_size, table.pages_of(len));
      continue;
    }
    const int32_t* offset = p.offsets + b * p.offsets_stride;
    for (int64_t s = 0; s < p.num_segments; ++s)
      if (offset[s + 1] > std::max<int64_t>(offset[s], start) && offset[s + 1] <= len)
        check_entries(c, table, b, offset[s] / p.page_size, table.pages_of(offset[s + 1]));
  }
}

void page_summaries(const std::vector<Tensor>& pools, const std::vector<int64_t>& formats, int64_t page_size,
                    int64_t head_dim, const std::optional<Tensor>& centre, const std::optional<Tensor>& balance,
                    const std::optional<Tensor>& order, const Tensor& page_table_arg, const Tensor& seq_lens_arg,
                    int64_t kind, int64_t bits, const std::optional<Tensor>& channels_arg,
                    const std::optional<Tensor>& segments_arg, const std::optional<Tensor>& start_arg,
                    const std::vector<Tensor>& records_arg) {
  Check c("page_summaries");
  c.bind("D", head_dim, "head_dim");
  PageSummariesParams p{};
  p.num_pools = make_pools(c, pools, formats, page_size, head_dim, "head_dim", p.pools);
  p.transform = make_transform(c, {centre, balance, order});
  const View page_table = c.is("page_table", page_table_arg, kI32, "B ?max_pages");
  const View seq_lens = c.is("seq_lens", seq_lens_arg, kI32, "B");
  const bool labels = static_cast<SummaryKind>(kind) == SummaryKind::channels;
  if (labels != channels_arg.has_value())
    c.refuse(labels ? "kind channels needs channels" : "channels are of kind channels alone");
  if (labels && segments_arg) c.refuse("segments cannot go together with kind channels");
  const View channels = channels_arg ? check_channels(c, *channels_arg, head_dim) : View{};
  p.layout = make_layout(c, static_cast<SummaryKind>(kind), bits, head_dim, channels ? channels.size[1] : 0, page_size);
  const View start = c.is("start", start_arg, kI32, "B");
  p.B = page_table.size[0], p.Hkv = pools[0].size(1), p.D = head_dim;
  if (segments_arg) {
    const View segments = check_segments(c, *segments_arg);
    p.offsets = segments.data<int32_t>();
    p.num_segments = segments.size[1] - 1;
    p.offsets_stride = segments.stride[0];
  }
  const std::vector<View> records = check_records(c, records_arg, p.layout);
  const size_t expected = segments_arg ? 1 : static_cast<size_t>(p.num_pools);
  if (records.size() != expected)
    c.refuse("records must be ", expected, segments_arg ? " tensor of segments" : " tensors, one for each pool",
             ", got ", records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    const int64_t rows = segments_arg ? p.B * p.num_segments : p.pools[i].num_pages;
    if (records[i].size[0] != rows)
      c.refuse(records[i].name, " has ", records[i].size[0], " records of a head, but there are ", rows,
               segments_arg ? " segments" : " pages in the pool");
    c.writable(records[i]);
    p.records[i] = records[i].mutable_data<uint8_t>();
  }

  p.page_table = page_table.data<int32_t>();
  p.max_pages = page_table.size[1];
  p.table_stride = page_table.stride[0];
  p.page_size = page_size;
  p.seq_lens = seq_lens.data<int32_t>();
  p.start = start ? start.data<int32_t>() : nullptr;
  p.channels = channels ? channels.data<int32_t>() : nullptr;
  if (p.B == 0 || p.Hkv == 0) return;
  if (c.on_cpu()) check_pages(c, p);
  on_device(c, [&](const auto& exec) { backend::page_summaries(p, exec); });
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def(
      "page_summaries(Tensor[] pools, int[] formats, SymInt page_size, SymInt head_dim, Tensor? centre, Tensor? "
      "balance, Tensor? order, Tensor page_table, Tensor seq_lens, int kind, int bits, Tensor? channels, Tensor? "
      "segments, Tensor? start, Tensor(a!)[] records) -> ()");
}
KK_REGISTER(page_summaries)
