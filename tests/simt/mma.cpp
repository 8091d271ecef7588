// The matrix instructions. Their layouts, from the PTX ISA ("Matrix fragments for mma.m16n8k16", "ldmatrix", "movmatrix"):
//   8x8 matrix of 16-bit elements   lane 4r + c holds elements (r, 2c) and (r, 2c + 1), the first in the low half
//   A [16][16]                      4 such matrices: a[0] rows 0-7, a[1] rows 8-15, a[2] and a[3] the same of columns 8-15
//   B [16][8]                       2 such matrices, transposed: b[0] k 0-7, b[1] k 8-15
//   tf32                            lane 4r + c holds element (r, c) of an 8x4 part of A [16][8]: a[0] rows 0-7, a[1] rows
//                                   8-15, a[2] and a[3] the same of columns 4-7; (c, r) of a 4x8 part of B [8][8]
//   C, D [16][8] fp32               lane 4r + c: [0], [1] are (r, 2c), (r, 2c + 1); [2], [3] the same of row r + 8
#include <cmath>

#include "runtime.h"

namespace simt {
namespace {

struct LdmatrixArgument {
  uint32_t* r;
  int matrices;
  bool transposed;
  uint32_t address;
};
void run_ldmatrix(Block& b, int warp, Meeting& m) {
  const auto argument = [&](int l) -> LdmatrixArgument& { return *static_cast<LdmatrixArgument*>(m.argument[l]); };
  for (int i = 0; i < argument(0).matrices; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {  // lane 8i + row brings the address of the row
      const int l = 8 * i + row;
      Thread& by = b.thread[warp * 32 + l];
      const uint32_t address = argument(l).address;
      if (address % 16)
        report(m.site, Then::abandon, "ldmatrix: row address %#x is not 16-byte aligned, by %s", address,
               text(by).c_str());
      const char* p = shared_at(address, 16, by, m.site);
      if (instrumented) check_shared_race(p, 16, Access::read, by, m.site);
      memcpy(matrix[row], p, 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, column = 2 * (l % 4);
      const bool t = argument(l).transposed;
      const uint32_t low = t ? matrix[column][row] : matrix[row][column];
      const uint32_t high = t ? matrix[column + 1][row] : matrix[row][column + 1];
      argument(l).r[i] = low | high << 16;
    }
  }
}
constexpr Collective kLdmatrix{"ldmatrix", true, run_ldmatrix};

void run_movmatrix(Block&, int, Meeting& m) {
  uint16_t matrix[8][8];
  for (int l = 0; l < 32; ++l) memcpy(&matrix[l / 4][2 * (l % 4)], m.argument[l], 4);
  for (int l = 0; l < 32; ++l) {
    const int row = l / 4, column = 2 * (l % 4);
    *static_cast<uint32_t*>(m.argument[l]) = matrix[column][row] | uint32_t{matrix[column + 1][row]} << 16;
  }
}
constexpr Collective kMovmatrix{"movmatrix", true, run_movmatrix};

struct F16 {
  // Exponents are rebased by a multiplication, which subnormal numbers survive.
  static float to_float(uint16_t h) {
    const uint32_t magnitude = bits<uint32_t>(bits<float>((h & 0x7fffu) << 13) * 0x1p112f);
    const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bits<float>(magnitude | special | (h & 0x8000u) << 16);
  }
};
struct Bf16 {
  static float to_float(uint16_t h) { return bits<float>(uint32_t{h} << 16); }
};

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};
// A GPU adds the products of an instruction in an order and a width of its own; here it is fp32 in order of k.
template <typename T>
void run_mma(Block&, int, Meeting& m) {
  uint16_t a_bits[16][16], b_bits[8][16];
  float c[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<const MmaArgument*>(m.argument[l]);
    const int row = l / 4, column = 2 * (l % 4);
    memcpy(&a_bits[row][column], &x.a[0], 4);
    memcpy(&a_bits[row + 8][column], &x.a[1], 4);
    memcpy(&a_bits[row][column + 8], &x.a[2], 4);
    memcpy(&a_bits[row + 8][column + 8], &x.a[3], 4);
    memcpy(&b_bits[row][column], &x.b[0], 4);
    memcpy(&b_bits[row][column + 8], &x.b[1], 4);
    memcpy(&c[row][column], &x.c[0], 8);
    memcpy(&c[row + 8][column], &x.c[2], 8);
  }
  float a[16][16], b[16][8];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = T::to_float(a_bits[i][k]);
  for (int n = 0; n < 8; ++n)
    for (int k = 0; k < 16; ++k) b[k][n] = T::to_float(b_bits[n][k]);
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[i][k] * b[k][n];
    for (int n = 0; n < 8; ++n) c[i][n] += sum[n];
  }
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<const MmaArgument*>(m.argument[l]);
    const int row = l / 4, column = 2 * (l % 4);
    memcpy(&x.d[0], &c[row][column], 8);
    memcpy(&x.d[2], &c[row + 8][column], 8);
  }
}
constexpr Collective kMmaF16{"mma.sync f16", true, run_mma<F16>}, kMmaBf16{"mma.sync bf16", true, run_mma<Bf16>};

struct MmaTf32Argument {
  float* d;
  const float *a, *b, *c;
};
// The low 13 bits of an operand are ignored: what was not rounded to tf32 is truncated.
float tf32_operand(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return std::isnan(x) ? x : bits<float>(u & ~0x1fffu);
}
void run_mma_tf32(Block&, int, Meeting& m) {
  float a[16][8], b[8][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<const MmaTf32Argument*>(m.argument[l]);
    const int row = l / 4, column = l % 4;
    for (int i = 0; i < 4; ++i) a[row + 8 * (i % 2)][column + 4 * (i / 2)] = tf32_operand(x.a[i]);
    for (int i = 0; i < 2; ++i) b[column + 4 * i][row] = tf32_operand(x.b[i]);
    memcpy(&c[row][2 * column], &x.c[0], 8);
    memcpy(&c[row + 8][2 * column], &x.c[2], 8);
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < 8; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[i][k] * b[k][n];
    for (int n = 0; n < 8; ++n) c[i][n] += sum[n];
  }
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<const MmaTf32Argument*>(m.argument[l]);
    const int row = l / 4, column = 2 * (l % 4);
    memcpy(&x.d[0], &c[row][column], 8);
    memcpy(&x.d[2], &c[row + 8][column], 8);
  }
}
constexpr Collective kMmaTf32{"mma.sync tf32", true, run_mma_tf32};

}  // namespace

void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t address, Site site) {
  LdmatrixArgument a{r, matrices, transposed, address};
  meet(kLdmatrix, ~0u, &a, site);
}
uint32_t movmatrix(uint32_t a, Site site) {
  meet(kMovmatrix, ~0u, &a, site);
  return a;
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  MmaArgument x{d, a, b, c};
  meet(kMmaF16, ~0u, &x, site);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  MmaArgument x{d, a, b, c};
  meet(kMmaBf16, ~0u, &x, site);
}
void mma_tf32(float* d, const float* a, const float* b, const float* c, Site site) {
  MmaTf32Argument x{d, a, b, c};
  meet(kMmaTf32, ~0u, &x, site);
}

}  // namespace simt
