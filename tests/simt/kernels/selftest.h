// The kernels of the emulator's own tests. Each runs right with Bug::none; the others plant one mistake.
#pragma once
#include <cstdint>

namespace selftest {

enum class Bug {
#define BUG(name) name,
#include "bugs.def"
#undef BUG
};

// f(Planted<bug>{}) for the bug of the list that was asked for.
template <Bug b>
struct Planted {
  static constexpr Bug bug = b;
};
void no_such_bug(Bug);
template <Bug... bugs, typename F>
void plant(Bug got, F&& f) {
  if (!((got == bugs && (f(Planted<bugs>{}), true)) || ...)) no_such_bug(got);
}

// out [B][4 Hkv][64] of q, over pages k, v [pages][page_size][Hkv][64]; partial_out [B][4 Hkv][splits][64], partial_ml
// [B][4 Hkv][splits][2]. fp16 numbers are passed as their bits.
struct DecodeParams {
  const uint16_t *q, *k, *v;
  const int *table, *lens;  // [B][max_pages], [B]
  uint16_t* out;
  float *partial_out, *partial_ml;
  int batch, kv_heads, page_size, max_pages, splits;
};
void decode(const DecodeParams&, Bug);
// s [M][N] = q [M][64] k^T [64][N]
void scores(const uint16_t* q, const uint16_t* k, float* s, int m, int n, Bug);
// The delta rule over T tokens of 64 channels, per head: S += beta (v - S k) k^T, o = S q
void scan(const float* q, const float* k, const float* v, const float* beta, float* o, int heads, int tokens, Bug);

void reverse_warps(const float* in, float* out, int blocks, Bug);  // 128 floats a block
void sum(const float* in, float* partial, unsigned* counter, float* out, int blocks, int n, Bug);
void histogram(const int* in, int* out, int n, Bug);         // 16 bins
void running_sums(const float* in, float* out, int n, Bug);  // n = 8; out [32]: the sum plus 8 times the lane
void rotate(float* out, int n, Bug);                         // out[i] = (i + 1) % n, n <= 128
void reverse_block(float* out, Bug);                         // 127 ... 0
void handshake(int* flag, int* out);                         // block 1 waits for block 0: two resident blocks
void count_up(float* io, int n, Bug);                        // io[i] += 1
void lanes(int* out, Bug);                       // [9][32]: votes, shuffles and reductions of the lane number
void shifts(const int* in, unsigned* out, Bug);  // out[i] = 1 << in[i], 32 of them

// One instruction with the registers of every lane as they are: a [32][4], b [32][2], c and d [32][4].
void mma(bool bf16, const uint32_t* a, const uint32_t* b, const float* c, float* d);
void mma_tf32(const float* a, const float* b, const float* c, float* d);
void tf32(const float* in, float* out);                             // [32]
void ldmatrix(bool transposed, const uint16_t* in, uint32_t* out);  // in [4][8][8], out [32][4]
void movmatrix(const uint32_t* in, uint32_t* out);                  // [32]

}  // namespace selftest
