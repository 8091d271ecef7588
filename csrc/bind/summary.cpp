#include "bind/summary.h"

namespace kk::bind {
namespace {

constexpr const char* kRecords[kMaxPools] = {"records[0]", "records[1]", "records[2]", "records[3]",
                                             "records[4]", "records[5]", "records[6]", "records[7]"};

const char* kind_name(SummaryKind kind) {
  return kind == SummaryKind::minmax ? "minmax" : kind == SummaryKind::mean ? "mean" : "channels";
}

}  // namespace

SummaryLayout make_layout(const Check& c, SummaryKind kind, int64_t bits, int64_t head_dim, int64_t channels,
                          int64_t page_size) {
  const bool labels = kind == SummaryKind::channels;
  if (kind != SummaryKind::minmax && kind != SummaryKind::mean && !labels)
    c.refuse("kind must be 0 (minmax), 1 (mean) or 2 (channels), got ", static_cast<int>(kind));
  if (bits != 16 && bits != 8 && !(labels && bits == 4))
    c.refuse("bits must be ", labels ? "16, 8 or 4" : "16 or 8", " of summaries of kind ", kind_name(kind), ", got ",
             bits);
  if (page_size < 1) c.refuse("page_size must be at least 1, got ", page_size);
  if (labels && bits != 16 && page_size % 16)
    c.refuse("page_size must be a multiple of 16, because the channels have ", bits, " bits; got ", page_size);
  return {kind, static_cast<int32_t>(bits), head_dim, channels, page_size};
}

std::vector<View> check_records(Check& c, const std::vector<Tensor>& records, const SummaryLayout& layout) {
  if (records.empty() || records.size() > kMaxPools)
    c.refuse("summaries have 1 to ", kMaxPools, " tensors of records, got ", records.size());
  const int64_t need = summary_bytes(layout);
  std::vector<View> views;
  for (size_t i = 0; i < records.size(); ++i) {
    const View v = c.is(kRecords[i], records[i], kU8, "?num_pages Hkv ?record_bytes");
    if (v.size[2] != need)
      c.refuse(v.name, ": records of ", v.size[2], " bytes, but ", kind_name(layout.kind), " at ", layout.bits,
               " bits with head_dim ", layout.head_dim, " needs ", need);
    c.contiguous(v);
    if (reinterpret_cast<uintptr_t>(v.data()) % 16) c.refuse(v.name, " must begin at a multiple of 16 bytes");
    views.push_back(v);
  }
  return views;
}

View check_channels(Check& c, const Tensor& channels, int64_t head_dim) {
  const View v = c.is("channels", channels, kI32, "Hkv r");
  c.contiguous(v);
  if (v.size[1] < 1) c.refuse("channels must be [Hkv, r] with r at least 1, got ", shape_text(v.size, 2));
  if (!c.on_cpu()) return v;
  const int32_t* channel = v.data<int32_t>();
  for (int64_t i = 0; i < v.size[0] * v.size[1]; ++i)
    if (channel[i] < 0 || channel[i] >= head_dim)
      c.refuse("channels[", i / v.size[1], ", ", i % v.size[1], "] = ", channel[i], ", but head_dim is ", head_dim);
  return v;
}

View check_segments(Check& c, const Tensor& segments) {
  const View v = c.is("segments", segments, kI32, "B ?num_segments");
  if (v.size[1] < 1) c.refuse("segments must be [B, num_segments + 1], got ", shape_text(v.size, 2));
  if (!c.on_cpu()) return v;
  for (int64_t b = 0; b < v.size[0]; ++b) {
    const int32_t* row = v.data<int32_t>() + b * v.stride[0];
    for (int64_t s = 0; s < v.size[1]; ++s)
      if (row[s] < (s ? row[s - 1] : 0))
        c.refuse("segments[", b, ", ", s, "] = ", row[s], " comes after ", s ? row[s - 1] : 0,
                 ", but the offsets of segments must not be negative or descend");
  }
  return v;
}

}  // namespace kk::bind
