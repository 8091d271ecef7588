// From a format, a dtype and a head dim of run time to the code of their rows. Compiled here and nowhere else.
#include "cpu/codec.h"

#include "cpu/kivi2_rows.h"
#include "cpu/token_rows.h"

KK_BEGIN

namespace {

template <DType To, DType T>
struct PlainRows {  // bf16 f16; head_dim a multiple of 16
  static void encode(const RowCodec& at, const Row* rows, int64_t n, int64_t named) {
    for (int64_t r = 0; r < n; ++r) {
      uint8_t* side = rows[r].side + rows[r].token * at.token_stride;
      if (r + kBlock < named) {
        const Row& next = rows[r + kBlock];
        uint8_t* next_side = next.side + next.token * at.token_stride;
        for (int64_t i = 0; i < at.head_dim * kElementBytes<T>; i += 64) __builtin_prefetch(next.x + i);
        for (int64_t i = 0; i < at.head_dim * 2; i += 64) __builtin_prefetch(next_side + i, 1);
      }
      for (int64_t i = 0; i < at.head_dim; i += F::W)
        store<To>(load<T>(rows[r].x + i * kElementBytes<T>), side + i * 2);
    }
  }
  static void decode(const RowCodec& at, const Row* rows, int64_t n) {
    for (const Row* r = rows; r < rows + n; ++r)
      for (int64_t i = 0; i < at.head_dim; i += F::W)
        store<T>(load<To>(r->side + r->token * at.token_stride + i * 2), r->x + i * kElementBytes<T>);
  }
};

template <typename Fmt>
inline constexpr DType kPlainType = DType::bf16;
template <>
inline constexpr DType kPlainType<f16> = DType::f16;

void encode_rotated(const RowCodec& at, const Row* rows, int64_t n, int64_t named) {
  alignas(64) float x[kBlock * 256];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t m = n - first < kBlock ? n - first : kBlock;
    for (int64_t r = 0; r < (m + kRows - 1) / kRows * kRows; ++r) {  // the last row fills up those coded together
      if (first + r + kBlock < named) {
        const Row& next = rows[first + r + kBlock];
        for (int64_t i = 0; i < at.head_dim * at.element_bytes; i += 64) __builtin_prefetch(next.x + i);
        for (int g = 0; g < at.num_groups; ++g) {
          __builtin_prefetch(next.side + at.groups[g].low + next.token * at.groups[g].low_stride, 1);
          __builtin_prefetch(next.side + at.groups[g].scale + next.token * at.groups[g].scale_stride, 1);
        }
      }
      at.to_stored(rows[first + (r < m ? r : m - 1)], x + r * at.head_dim);
    }
    for (int g = 0; g < at.num_groups; ++g) {
      const Group& group = at.groups[g];
      group.encode(group, x + group.channel, at.head_dim, rows + first, m);
    }
  }
}

void decode_rotated(const RowCodec& at, const Row* rows, int64_t n) {
  alignas(64) float x[kBlock * 256];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t m = n - first < kBlock ? n - first : kBlock;
    decode_stored(at, rows + first, m, x);
    for (int64_t r = 0; r < m; ++r) at.from_stored(x + r * at.head_dim, rows[first + r]);
  }
}

// The groups of part p of a side.
template <typename Fmt, int p, int D>
void add_groups(RowCodec& c, Side side) {
  using Part = typename Fmt::template Part<p>;
  using Grid = typename Part::Grid;
  constexpr int width = D / Fmt::parts, len = static_cast<int>(Part::group_channels(width));
  const int64_t begin = Fmt::part_offset(p, c.page_size, D), scale_bytes = sizeof(typename Part::Scale::Bits);
  for (int64_t g = 0; g < Part::groups(width); ++g)
    c.groups[c.num_groups++] = {GroupRows<Grid, len>::encode,
                                GroupRows<Grid, len>::decode,
                                p * width + g * len,
                                begin + g * Grid::low_bytes(len),
                                begin + Part::plane1_offset(c.page_size, width) + g * Grid::high_bytes(len),
                                begin + Part::scales_offset(c.page_size, width) + g * scale_bytes,
                                Part::low_row(width),
                                Part::high_row(width),
                                Part::scale_row(width),
                                side == Side::V && Grid::unbiased_values,
                                scale_bytes == 1};
}

template <typename Fmt, DType T>
void set_codec(RowCodec& c, Side side) {
  if constexpr (!Fmt::packed) {
    one_of<64, 80, 96, 112, 128, 192, 256>("head_dim", c.head_dim, [&](auto) {
      c.encode = PlainRows<kPlainType<Fmt>, T>::encode;
      c.decode = PlainRows<kPlainType<Fmt>, T>::decode;
    });
  } else {
    one_of<64, 128, 256>("head_dim", c.head_dim, [&](auto dim) {
      constexpr int D = dim.value;
      if constexpr (Fmt::rotated) {
        c.encode = encode_rotated;
        c.decode = decode_rotated;
        c.to_stored = RotatedRows<T, D, Fmt::parts>::to_stored;
        c.from_stored = RotatedRows<T, D, Fmt::parts>::from_stored;
        add_groups<Fmt, 0, D>(c, side);
        if constexpr (Fmt::parts == 2) add_groups<Fmt, 1, D>(c, side);
      } else {
        c.encode = side == Side::K ? nullptr : Kivi2Values<T, D>::encode;
        c.decode = side == Side::K ? Kivi2Keys<T, D>::decode : Kivi2Values<T, D>::decode;
      }
    });
  }
}

}  // namespace

RowCodec row_codec(Format format, Side side, DType dtype, int64_t page_size, int64_t head_dim) {
  RowCodec c{};
  c.page_size = page_size;
  c.head_dim = head_dim;
  c.element_bytes = dtype == DType::f32 ? 4 : 2;
  with_dtype(dtype,
             [&](auto type) { with_format(format, [&](auto tag) { set_codec<decltype(tag), type.value>(c, side); }); });
  return c;
}

KK_END
