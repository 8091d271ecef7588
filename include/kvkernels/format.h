// Formats at run time: the numbers of formats.def, the sizes of a page, and the way from a number to a struct.
#pragma once
#include "kvkernels/core/one_of.h"
#include "kvkernels/core/side.h"
#include "kvkernels/formats/b1.h"
#include "kvkernels/formats/b1_e5m3.h"
#include "kvkernels/formats/bf16.h"
#include "kvkernels/formats/f16.h"
#include "kvkernels/formats/kivi2.h"
#include "kvkernels/formats/m21.h"
#include "kvkernels/formats/m31.h"
#include "kvkernels/formats/m42.h"
#include "kvkernels/formats/t1.h"
#include "kvkernels/formats/t1_e5m3.h"
#include "kvkernels/formats/u2.h"
#include "kvkernels/formats/u2_e5m3.h"
#include "kvkernels/formats/u3.h"
#include "kvkernels/formats/u4.h"
#include "kvkernels/formats/u8.h"

namespace kk {
enum class Format : int32_t {
#define KK_FORMAT(name, number) name = number,
#include "kvkernels/formats.def"
#undef KK_FORMAT
};
}  // namespace kk

KK_BEGIN

// with_format(Format::u2, [&](auto fmt) { using Fmt = decltype(fmt); ... })
template <typename F>
inline void with_format(Format format, F&& f) {
  switch (format) {
#define KK_FORMAT(name, number) \
  case Format::name:            \
    f(name{});                  \
    return;
#include "kvkernels/formats.def"
#undef KK_FORMAT
  }
  fail("unknown format number");
}

inline int64_t side_bytes(Format format, Side side, int64_t page_size, int64_t head_dim) {
  int64_t n = 0;
  with_format(format, [&](auto fmt) { n = decltype(fmt)::side_bytes(side, page_size, head_dim); });
  return n;
}

// One page of one KV head: [K codes | K scales | V codes | V scales], padded to 64 bytes.
inline int64_t page_bytes(Format k, Format v, int64_t page_size, int64_t head_dim) {
  return (side_bytes(k, Side::K, page_size, head_dim) + side_bytes(v, Side::V, page_size, head_dim) + 63) / 64 * 64;
}

KK_END
