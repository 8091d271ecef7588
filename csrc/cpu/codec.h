// Rows of K and V on their way between tensors and page bytes: one token and head at a time, any format, dtype and head dim.
// The same bytes on every ISA (tests/cpp/test_codec.cpp compares them with the scalar definitions in include/).
#pragma once
#include "cpu/code_bytes.h"
#include "kvkernels/format.h"

KK_BEGIN

struct Row {
  uint8_t* x;  // in the tensor; encoding only reads it
  uint8_t* side;
  int64_t token;
  KeyTransform transform;  // of this head; null where it does not apply
};

struct RowCodec;

// Channels of a rotated row that share a scale, in the stored basis. Of its tokens' rows in a plane or among the scales: the
// bytes from the side's begin to the first, and from one to the next.
struct Group {
  void (*encode)(const Group&, const float* x, int64_t stride, const Row* rows, int64_t n);
  void (*decode)(const Group&, const Row* rows, int64_t n, float* x, int64_t stride);
  int64_t channel;  // the first
  int64_t low, high, scale;
  int64_t low_stride, high_stride, scale_stride;
  bool unbiased, short_scale;  // as core/grid.h has it for values; ScaleE5M3
};

struct RowCodec {
  // Row.x -> Row.side, `n` rows. rows[n] .. rows[named - 1] come next: they are prefetched. Null: kivi2 keys.
  void (*encode)(const RowCodec&, const Row* rows, int64_t n, int64_t named);
  // Row.side -> Row.x in the user's basis: rotation and key transform undone.
  void (*decode)(const RowCodec&, const Row* rows, int64_t n);
  int64_t page_size, head_dim;
  int64_t token_stride;   // bytes from token to token, 16-bit sides
  int64_t element_bytes;  // of the tensor
  // Rotated formats:
  void (*to_stored)(const Row& row, float* x);    // Row.x -> stored basis
  void (*from_stored)(float* x, const Row& row);  // and back; overwrites x
  int num_groups;
  Group groups[2];
};

RowCodec row_codec(Format, Side, DType, int64_t page_size, int64_t head_dim);

// Tokens of a rotated format -> x [n][head_dim] in fp32, still rotated.
inline void decode_stored(const RowCodec& codec, const Row* rows, int64_t n, float* x) {
  for (int g = 0; g < codec.num_groups; ++g)
    codec.groups[g].decode(codec.groups[g], rows, n, x + codec.groups[g].channel, codec.head_dim);
}

// One side of a pool: where the rows of (page, head, token) are and how they are coded.
struct PoolSide {
  uint8_t* data;
  int64_t page_stride, head_stride;
  KeyTransform transform;  // of head 0; null where it does not apply
  RowCodec codec;

  PoolSide() = default;
  PoolSide(const Pool& p, Side side, const KeyTransform& t, DType dtype, int64_t page_size, int64_t head_dim) {
    const bool keys = side == Side::K;
    const Format format = keys ? p.k_format : p.v_format;
    data = keys ? p.k : p.v;
    page_stride = keys ? p.k_page : p.v_page;
    head_stride = keys ? p.k_head : p.v_head;
    codec = row_codec(format, side, dtype, page_size, head_dim);
    codec.token_stride = keys ? p.k_token : p.v_token;
    transform = keys && codec.num_groups > 0 ? t : KeyTransform{};
  }

  Row row(int64_t page, int64_t head, int64_t token, uint8_t* x) const {
    const int64_t c = head * codec.head_dim;
    const KeyTransform& t = transform;
    return {x,
            data + page * page_stride + head * head_stride,
            token,
            {t.centre ? t.centre + c : nullptr, t.balance ? t.balance + c : nullptr, t.order ? t.order + c : nullptr}};
  }
  void encode(const Row* rows, int64_t n, int64_t named) const { codec.encode(codec, rows, n, named); }
  void decode(const Row* rows, int64_t n) const { codec.decode(codec, rows, n); }
};

constexpr int64_t kRowBatch = 32;  // rows named before they are coded; enough to prefetch ahead

KK_END
