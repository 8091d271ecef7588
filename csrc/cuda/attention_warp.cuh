// What one warp of attention_kernel does in a segment: it loads units, scores them, and sums over V.
//
// Scales stay out of the products: those of K go on the scores, those of V on the weights, which become fp16 with a
// power of two common to the warp. Packed formats sum in the rotated basis; sums of different bases are brought to the
// plain one when a warp goes from one to another, and at the end.
//
// Warps that share the units of a segment go their own ways. Where each has rows of its own (`Shared`,
// Segment::own_rows) every warp still loads only its units, but all of them use what all have loaded: the stages come
// from L2 once for the rows of a block, and a barrier in every step keeps the warps together.
#pragma once
#include "cuda/attention_queries.cuh"
#include "cuda/attention_stages.cuh"
#include "kvkernels/core/grid.h"

namespace kk::cuda {

// The running maximum before a score was seen. Finite, so that a difference of two is never NaN; a row whose scores are
// all masked keeps it and has l = 0.
constexpr float kLowest = -3.402823466e38f;
constexpr float kNoFactor = 1099511627776.0f;  // 2^40: the first scale above 0 exceeds what this allows
constexpr uint32_t kQuarters = twice(0x3400);  // fp16 (0.25, 0.25)
constexpr float kWeightFactor = 32768.0f;      // on weights in fp16, which are at most 1: small ones keep their bits

// The tokens of a stage, in tiles of 16.
struct Tokens {
  uint8_t *k, *v;        // sides
  int count;             // laid out in the stage
  int place;             // of the first: its position, or number among the selected ones
  int begin, end;        // tiles that hold visible tokens
  bool edge;             // some row does not see some token of these tiles
  int position;          // of the first, with a selection
  const int* positions;  // of 16, where they are gathered
};

// What a warp does in a segment.
template <int D, int NT, bool Packed, bool Shared, bool Sparse>
struct Warp {
  using T = Tile<D, NT>;
  static constexpr bool kKeepQueries = Shared && !Packed && D <= 128;  // in registers; more would spill

  const ParamsOf<Sparse>& p;
  const Segment& seg;
  const uint8_t* queries;
  const Row* rows;
  float4* tile_scores;  // [unit / 16][NT][32]
  float* sums;          // [kRows][kSumPitch]
  State* state;         // [kRows]
  int lane, g, c;
  const uint32_t bias;  // kBias

  uint32_t kept_queries[kKeepQueries ? T::kStepPairs : 1][NT][2][2];
  int kept;                          // kind of these
  float acc[T::kValueSteps][NT][4];  // (two channels, rows 8 nt + 2 c and + 1)
  float m[NT][2], l[NT][2];          // l: of this lane's tokens only
  float q_scale[NT][2];
  float v_factor;  // power of two on the weights of rotated values
  int basis;       // of acc
  bool sums_used;

  Stages<D, NT, Packed, Shared, Sparse> loads;

  __device__ Warp(const ParamsOf<Sparse>& params, const Segment& segment, const uint8_t* own_queries, const Row* row,
                  uint8_t* own, float4* own_scores, float* own_sums, State* own_state, uint32_t fp16_bias)
      : p(params),
        seg(segment),
        queries(own_queries),
        rows(row),
        tile_scores(own_scores),
        sums(own_sums),
        state(own_state),
        bias(fp16_bias),
        loads(params, segment, own) {
    lane = threadIdx.x % 32;
    g = lane / 4;
    c = lane % 4;
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][nt][j] = 0.0f;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        m[nt][i] = kLowest;
        l[nt][i] = 0.0f;
        q_scale[nt][i] = rows[8 * nt + 2 * c + i].q_scale;
      }
    kept = kQueryKinds;
    v_factor = kNoFactor;
    basis = kNoBasis;
    sums_used = false;
  }

  __device__ void run() {
    const int n_stages = p.layout.stages, warp = threadIdx.x / 32;
    const bool own_rows = Shared && seg.own_rows, idle = own_rows && warp * T::kRows >= seg.rows;
    // Tokens that all rows see; with a tree, depths are at most 31.
    const int tokens = Sparse ? seg.node.end : seg.span.end;
    const int last_position = p.tree_mask ? tokens - static_cast<int>(p.Tq) + 31 : tokens - 1;
    const int seen_by_all_from = seg.span.window < 0 ? 0 : max(last_position - seg.span.window, 0);
    const int seen_by_all_to = seg.node.sequences > 1 ? tokens : min(rows[0].before + !p.tree_mask, tokens);
    int filled = 0, used = 0;
    for (int step = 1 - n_stages; own_rows || step < loads.issued; ++step) {  // the first steps only load
      uint8_t* stage = loads.stages + used * p.layout.stage_bytes;
      if (step >= 0) {
        loads.wait_oldest();
        if constexpr (Packed) loads.finish(stage);
        // everybody's copies have landed, and everybody has left the stage that is filled now
        if (own_rows)
          __syncthreads();
        else
          __syncwarp();
      }
      loads.issue(filled);
      __syncwarp();  // the products below are for whole warps
      filled = filled + 1 == n_stages ? 0 : filled + 1;
      if (step < 0) continue;
      used = used + 1 == n_stages ? 0 : used + 1;
      if (own_rows) stage -= warp * p.layout.warp_bytes;
      bool more = false;
      for (int i = 0; i < (own_rows ? p.layout.warps : 1); ++i, stage += p.layout.warp_bytes) {
        if (reinterpret_cast<const int2*>(stage)->y < 0) continue;
        more = true;
        if (!idle) use(stage, seen_by_all_from, seen_by_all_to);
      }
      if (!more) break;
    }
    if (own_rows)
      __syncthreads();  // the sums may lie over the stages
    else
      __syncwarp();
    flush();
  }

  __device__ void use(uint8_t* stage, int seen_by_all_from, int seen_by_all_to) {
    const int2 header = *reinterpret_cast<const int2*>(stage);
    const Pool& pool = p.pools[header.y];
    const PoolLayout& layout = p.layout.pools[header.y];
    Tokens t;
    t.k = stage + kHeader<Sparse>;
    t.v = stage + layout.v_offset;
    t.count = Packed ? layout.tokens : 16;
    t.place = header.x;
    t.begin = t.place < seg.span.sink ? 0 : max(seg.span.first_token - t.place, 0) / 16;
    t.end = min(t.count, seg.span.end - t.place + 15) / 16;
    int from = t.place + 16 * t.begin, to = t.place + 16 * t.end;
    const bool behind_sink = to > seg.span.sink;
    if constexpr (Sparse) {
      const int2 positions = reinterpret_cast<const int2*>(stage)[1];
      from = t.position = positions.x;
      to = positions.y;
      t.positions = reinterpret_cast<const int*>(stage + kPositions);
    }
    t.edge = (from < seen_by_all_from && behind_sink) || to > seen_by_all_to;
    if (t.begin >= t.end) return;  // 16 rows of a unit, before the window
    float top[NT][2];
    scores(pool.k_format, layout.codes[0], t, top);
    raise_maximum(top);
    values(pool.v_format, layout.codes[1], t);
  }

  // ---- scores

  // Token of row m of an operand, of its eight.
  static __device__ __forceinline__ int token_of(int row) { return row ^ (row >> 2 & 1); }

  static __device__ __forceinline__ float half_at(const uint8_t* p, int i) {
    return __half2float(reinterpret_cast<const __half*>(p)[i]);
  }

  // Scores of tile i as the mma leaves them: (token g, rows 2 c and 2 c + 1), (token g + 8, the same). They wait in
  // shared memory between K and V, so that either side goes through all tiles of a stage at a time. Each lane has its
  // own.
  __device__ float4* scores_of(int i, int nt) const { return tile_scores + (i * NT + nt) * 32 + lane; }

  // Products with scaled queries -> scores, in units of log 2; top: the largest of this lane.
  __device__ void keep_scores(int i, const float (&x)[NT][4], const float (&add)[NT][2], float (&top)[NT][2]) const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      float s[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = fmaf(x[nt][j], q_scale[nt][j % 2], add[nt][j % 2]);
      *scores_of(i, nt) = make_float4(s[0], s[1], s[2], s[3]);
#pragma unroll
      for (int j = 0; j < 2; ++j) top[nt][j] = fmaxf(top[nt][j], fmaxf(s[j], s[j + 2]));
    }
  }

  // What most calls do not need: softcap, ALiBi, tokens that some row does not see.
  __device__ void finish_scores(const Tokens& t, float (&top)[NT][2]) const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) top[nt][0] = top[nt][1] = kLowest;
    for (int i = t.begin; i < t.end; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const float4 x = *scores_of(i, nt);
        float s[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Row& row = rows[8 * nt + 2 * c + j % 2];
          const int in_stage = 16 * i + token_of(g) + j / 2 * 8, place = t.place + in_stage;
          const int token = !Sparse ? place : p.layout.gather ? t.positions[in_stage] : t.position + in_stage;
          const int of_queries = token - row.before;
          bool seen = place < seg.span.end && (of_queries < 0 || (row.bits >> of_queries & 1));
          if (Sparse) seen &= token >= 0;
          int distance = row.position - token;
          if (p.tree_mask && seen && of_queries >= 0)
            distance = row.position - row.before - depth(p.tree_mask[row.b * p.tree_stride + of_queries]);
          if (p.softcap > 0.0f) s[j] = p.softcap * tanhf(s[j] / p.softcap) * kLog2e;
          if (p.alibi_slopes) s[j] -= row.slope * static_cast<float>(distance);
          if (seg.span.window >= 0) seen &= distance <= seg.span.window || place < seg.span.sink;
          if (!seen) s[j] = -INFINITY;
          top[nt][j % 2] = fmaxf(top[nt][j % 2], s[j]);
        }
        *scores_of(i, nt) = make_float4(s[0], s[1], s[2], s[3]);
      }
  }

  template <bool Bf16>
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (Bf16)
      ptx::mma_m16n8k16_bf16(d, a, b, d);
    else
      ptx::mma_m16n8k16_f16(d, a, b, d);
  }

  __device__ void scores(Format format, const Codes& codes, const Tokens& t, float (&top)[NT][2]) {
    float add[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        add[nt][i] = Packed && codes.parts > 0 ? rows[8 * nt + 2 * c + i].q_mu : 0.0f;
        top[nt][i] = kLowest;
      }
    if (format == Format::bf16) {
      row_scores<true>(t, add, top);
    } else if (!Packed || format == Format::f16) {
      row_scores<false>(t, add, top);
    } else if constexpr (Packed) {
      if (format == Format::kivi2)
        kivi2_scores(t, add, top);
      else if (codes.parts == 2)
        halves_scores(codes, t, add, top);
      else if (codes.bits[0] == 2)
        code_scores<2>(codes, t, add, top);
      else if (codes.bits[0] == 1)
        code_scores<1>(codes, t, add, top);
      else if (codes.bits[0] == 4)
        code_scores<4>(codes, t, add, top);
      else if (codes.bits[0] == 3)
        code_scores<3>(codes, t, add, top);
      else
        code_scores<8>(codes, t, add, top);
    }
    if (p.softcap > 0.0f || p.alibi_slopes || t.edge) finish_scores(t, top);
  }

  // B operands of steps 2 n and 2 n + 1.
  __device__ void load_queries(Queries kind, int nt, int n, uint32_t (&q)[2][2]) const {
    const uint4 w =
        *reinterpret_cast<const uint4*>(queries + p.layout.queries[kind] + ((nt * T::kStepPairs + n) * 32 + lane) * 16);
    q[0][0] = w.x, q[0][1] = w.y, q[1][0] = w.z, q[1][1] = w.w;
  }

  // Where warps have rows of their own, shared memory is what they wait for, and a third of it would be queries.
  __device__ void keep_queries(Queries kind) {
    if (kept == kind) return;
    kept = kind;
#pragma unroll
    for (int n = 0; n < T::kStepPairs; ++n)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) load_queries(kind, nt, n, kept_queries[n][nt]);
  }

  template <bool Bf16>
  __device__ void row_scores(const Tokens& t, const float (&add)[NT][2], float (&top)[NT][2]) {
    // matrices 0 1: tokens 0-7 and 8-15 of channels 0-7; 2 3: of channels 8-15
    const uint32_t at = ptx::smem_u32(t.k) + (token_of(lane % 8) + (lane & 8)) * T::kPitch + (lane >> 4) * 16;
    constexpr Queries kind = Bf16 ? kQueriesBf16 : kQueriesF16;
    if constexpr (kKeepQueries) keep_queries(kind);
    float x[NT][4] = {};
#pragma unroll
    for (int n = 0; n < T::kStepPairs; ++n) {
      uint32_t q[NT][2][2];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        if constexpr (kKeepQueries)
          memcpy(q[nt], kept_queries[n][nt], sizeof(q[nt]));
        else
          load_queries(kind, nt, n, q[nt]);
#pragma unroll
      for (int i = 0; i < 2 && 2 * n + i < T::kSteps; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, at + (2 * n + i) * 32);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) mma<Bf16>(x[nt], a, q[nt][i]);
      }
    }
    keep_scores(0, x, add, top);
  }

  // 64 channels, four steps, or fewer: operands of this lane's two tokens as unpack() leaves them.
  template <int Steps = 4>
  __device__ void channel_scores(Queries kind, int first_step, const uint32_t (&a)[8], const uint32_t (&b)[8],
                                 float (&x)[NT][4]) const {
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      const uint32_t k[4] = {a[2 * s], b[2 * s], a[2 * s + 1], b[2 * s + 1]};
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        uint32_t q[2][2];
        load_queries(kind, nt, (first_step + s) / 2, q);
        mma<false>(x[nt], k, q[s % 2]);
      }
    }
  }

  // Lane c reads the c-th quarter of each scale group's channels, of tokens g and g + 8.
  template <int B>
  __device__ void code_scores(const Codes& codes, const Tokens& t, const float (&add)[NT][2],
                              float (&top)[NT][2]) const {
    constexpr int bits = B == 3 ? 2 : B, token_bytes = D * bits / 8;
    constexpr int bytes = T::kGroup / 4 * bits / 8, words = bytes < 4 ? 1 : bytes / 4, high_bytes = T::kGroup / 32;
    const uint8_t* high = t.k + t.count * token_bytes;
    const uint8_t* scales = high + (B == 3 ? t.count * (D / 8) : 0);
    const Constants constants(bias, codes.trits);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      const int a = 16 * i + token_of(g), b = a + 8;
      float x[NT][4] = {};
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        uint32_t wa[words], wb[words], ha[1] = {}, hb[1] = {};
        const uint8_t* at = t.k + (4 * group + c) * bytes;
        load_words<bytes>(at + a * token_bytes, wa);
        load_words<bytes>(at + b * token_bytes, wb);
        if constexpr (B == 3) {
          load_words<high_bytes>(high + a * (D / 8) + (4 * group + c) * high_bytes, ha);
          load_words<high_bytes>(high + b * (D / 8) + (4 * group + c) * high_bytes, hb);
        }
        float part[NT][4] = {};
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t xa[8], xb[8];
          unpack<B>(pair_channels<B>(wa, ha[0], n), constants, xa);
          unpack<B>(pair_channels<B>(wb, hb[0], n), constants, xb);
          const int first_step = group * (T::kGroup / 16) + 4 * n;
          channel_scores(kQueriesRotated, first_step, xa, xb, part);
          if (p.layout.queries[kQueriesRotatedRest] >= 0) channel_scores(kQueriesRotatedRest, first_step, xa, xb, part);
        }
        const float s[2] = {half_at(scales, a * T::kGroups + group), half_at(scales, b * T::kGroups + group)};
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int j = 0; j < 4; ++j) x[nt][j] += part[nt][j] * s[j / 2];
      }
      keep_scores(i, x, add, top);
    }
  }

  // Keys of two parts, each with bits of its own and one scale per token. The number of bits is looked at for every 64
  // channels: a loop for each pair of formats would take longer to compile than all others.
  __device__ void halves_scores(const Codes& codes, const Tokens& t, const float (&add)[NT][2],
                                float (&top)[NT][2]) const {
    static_assert(T::kHalf <= kScaleGroup);
    constexpr int channels = T::kHalf < 64 ? T::kHalf : 64;
    const Constants constants(bias);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      const int a = 16 * i + token_of(g), b = a + 8;
      float x[NT][4] = {};
      const uint8_t* side = t.k;
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const int bits = codes.bits[part];
        const uint8_t* scales = side + t.count * (T::kHalf * bits / 8);
        float sum[NT][4] = {};
#pragma unroll 1
        for (int n = 0; n < T::kHalf / channels; ++n) {
          uint32_t xa[8], xb[8];
          const int at = c * (T::kHalf / 4) + 16 * n;  // of this lane's channels
          if (bits == 1)
            half_codes<1>(side, t.count, a, at, constants, xa, xb);
          else if (bits == 2)
            half_codes<2>(side, t.count, a, at, constants, xa, xb);
          else if (bits == 3)
            half_codes<3>(side, t.count, a, at, constants, xa, xb);
          else
            half_codes<4>(side, t.count, a, at, constants, xa, xb);
          const int first_step = part * (T::kHalf / 16) + 4 * n;
          channel_scores<channels / 16>(kQueriesHalves, first_step, xa, xb, sum);
          if (p.layout.queries[kQueriesHalvesRest] >= 0)
            channel_scores<channels / 16>(kQueriesHalvesRest, first_step, xa, xb, sum);
        }
        const float s[2] = {half_at(scales, a), half_at(scales, b)};
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int j = 0; j < 4; ++j) x[nt][j] += sum[nt][j] * s[j / 2];
        side = scales + t.count * 2;
      }
      keep_scores(i, x, add, top);
    }
  }

  // Of one part: a lane's channels, from number `at` on, of tokens a and a + 8.
  template <int B>
  __device__ void half_codes(const uint8_t* side, int count, int a, int at, const Constants& constants,
                             uint32_t (&xa)[8], uint32_t (&xb)[8]) const {
    constexpr int low_bits = B == 3 ? 2 : B, row = T::kHalf * low_bits / 8, high_row = T::kHalf / 8;
    constexpr int mine = T::kHalf < 64 ? 8 : 16, bytes = mine * low_bits / 8, words = bytes < 4 ? 1 : bytes / 4;
    const uint8_t *low = side + a * row + at * low_bits / 8, *high = side + count * row + a * high_row + at / 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t w[words], h[1] = {};
      load_words<bytes>(low + j * 8 * row, w);
      if constexpr (B == 3) load_words<mine / 8>(high + j * 8 * high_row, h);
      uint32_t (&x)[8] = j == 0 ? xa : xb;
      if constexpr (mine == 8)
        unpack<B>(pair_few_channels<B>(w[0], h[0]), constants, x);
      else
        unpack<B>(pair_channels<B>(w, h[0], 0), constants, x);
    }
  }

  // On a quarter of every key, because zero + 3 scale may exceed what fp16 holds.
  __device__ void kivi2_scores(const Tokens& t, const float (&add)[NT][2], float (&top)[NT][2]) const {
    constexpr int bytes = T::kGroup / 16;
    const uint8_t* scales = t.k + t.count * (D / 4);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      const int a = 16 * i + token_of(g), b = a + 8;
      float x[NT][4] = {};
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        uint32_t wa[bytes / 4], wb[bytes / 4];
        const uint8_t* at = t.k + (4 * group + c) * bytes;
        load_words<bytes>(at + a * (D / 4), wa);
        load_words<bytes>(at + b * (D / 4), wb);
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          const uint8_t* affine = scales + (group * T::kGroup + c * (T::kGroup / 4) + 16 * n) * 2;
          uint32_t scale[8], zero[8], xa[8], xb[8];
          load_words<32>(affine, scale);
          load_words<32>(affine + D * 2, zero);
          unpack<2, true>(pair_channels<2>(wa, 0, n), Constants(bias), xa);
          unpack<2, true>(pair_channels<2>(wb, 0, n), Constants(bias), xb);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t both = j % 2 == 0 ? 0x5410 : 0x7632;  // channels j and j + 8
            const uint32_t s = __byte_perm(scale[j / 2], scale[j / 2 + 4], both);
            const uint32_t z = fma2(__byte_perm(zero[j / 2], zero[j / 2 + 4], both), kQuarters, 0u);
            xa[j] = fma2(xa[j], s, z);
            xb[j] = fma2(xb[j], s, z);
          }
          channel_scores(kQueriesPlain, group * (T::kGroup / 16) + 4 * n, xa, xb, x);
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) x[nt][j] *= 4.0f;
      keep_scores(i, x, add, top);
    }
  }

  // ---- online softmax

  __device__ void scale_acc(const float (&f)[NT][2]) {
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][nt][j] *= f[nt][j % 2];
  }

  static __device__ __forceinline__ float max_over_tokens(float x) {  // lanes of the same c hold the same rows
#pragma unroll
    for (int h = 4; h < 32; h *= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, h));
    return x;
  }

  // Soon the maximum is rarely exceeded, and nothing is to be done.
  __device__ void raise_maximum(const float (&top)[NT][2]) {
    bool above = false;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) above |= top[nt][0] > m[nt][0] || top[nt][1] > m[nt][1];
    if (!__any_sync(kWholeWarp, above)) return;
    float f[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float to = fmaxf(m[nt][i], max_over_tokens(top[nt][i]));
        f[nt][i] = ptx::ex2(m[nt][i] - to);
        m[nt][i] = to;
        l[nt][i] *= f[nt][i];
      }
    scale_acc(f);
  }

  // Weights exp2(score - m) of tile i.
  __device__ void weights_of(int i, float (&w)[NT][4]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float4 x = *scores_of(i, nt);
      w[nt][0] = ptx::ex2(x.x - m[nt][0]);
      w[nt][1] = ptx::ex2(x.y - m[nt][1]);
      w[nt][2] = ptx::ex2(x.z - m[nt][0]);
      w[nt][3] = ptx::ex2(x.w - m[nt][1]);
      l[nt][0] += w[nt][0] + w[nt][2];
      l[nt][1] += w[nt][1] + w[nt][3];
    }
  }

  // ---- sums over V

  __device__ void values(Format format, const Codes& codes, const Tokens& t) {
    const int to = is_rows(format) ? kRowBasis : format == Format::kivi2 ? kPlainBasis : kRotatedBasis;
    if (Packed && basis != to && basis != kNoBasis) flush();
    basis = to;
    if (format == Format::bf16) {
      row_values<true>(t);
    } else if (!Packed || format == Format::f16) {
      row_values<false>(t);
    } else if constexpr (Packed) {
      if (format == Format::kivi2) return kivi2_values(t);
      raise_factor(t, codes.bits[0]);
      if (codes.bits[0] == 2)
        code_values<2>(codes, t);
      else if (codes.bits[0] == 1)
        code_values<1>(codes, t);
      else if (codes.bits[0] == 4)
        code_values<4>(codes, t);
      else if (codes.bits[0] == 3)
        code_values<3>(codes, t);
      else
        code_values<8>(codes, t);
    }
  }

  // Weights -> B operands: (tokens 2 c and 2 c + 1, row g), (the same + 8).
  template <bool Bf16>
  static __device__ __forceinline__ void operands(const float (&w)[NT][4], uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lo = w[nt][2 * i], hi = w[nt][2 * i + 1];
        b[nt][i] = ptx::movmatrix_trans(Bf16 ? pack_bf16(lo, hi) : pack_f16(lo, hi));
      }
  }

  template <bool Bf16>
  __device__ void row_values(const Tokens& t) {
    float w[NT][4];
    uint32_t b[NT][2];
    weights_of(0, w);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int j = 0; j < 4; ++j) w[nt][j] *= p.layout.row_factor;
    operands<Bf16>(w, b);
    // matrices 0 1: channels 0-7 and 8-15 of tokens 0-7; 2 3: of tokens 8-15
    const uint32_t at = ptx::smem_u32(t.v) + (token_of(lane % 8) + (lane >> 4) * 8) * T::kPitch + (lane & 8) * 2;
#pragma unroll
    for (int i = 0; i < T::kValueSteps; ++i) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a, at + i * 32);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma<Bf16>(acc[i][nt], a, b[nt]);
    }
  }

  // 8 channels, four steps: of tokens 2 c and 2 c + 1, and of the tokens 8 further on.
  __device__ void channel_values(int first_step, const uint32_t (&lo)[8], const uint32_t (&hi)[8],
                                 const uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t v[4] = {lo[2 * s], lo[2 * s + 1], hi[2 * s], hi[2 * s + 1]};
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma<false>(acc[first_step + s][nt], v, b[nt]);
    }
  }

  // Token i = 0 ... 3 of this lane in the B operands' order.
  __device__ int value_token(int i) const { return token_of(2 * c + i % 2) + i / 2 * 8; }

  // fp16 holds weight * scale * v_factor: that keeps the largest scale so far between 2^14 and 2^15, so that nothing
  // overflows and what is down to 2^-28 of it keeps all its bits.
  __device__ void raise_factor(const Tokens& t, int bits) {
    const uint8_t* scales = t.v + t.count * (D * bits / 8);
    float top = 0.0f;
#pragma unroll 1
    for (int i = 2 * lane; i < t.count * T::kGroups; i += 64) {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(scales + 2 * i));
      top = fmaxf(top, fmaxf(both.x, both.y));
    }
    if (!__any_sync(kWholeWarp, top * v_factor >= 32768.0f)) return;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, h));
    top = fminf(top, kMaxScale);  // Inf may stay Inf
    const float factor = bits_float((127u + 14u + 127u - (float_bits(top) >> 23)) << 23);
    float f[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) f[nt][0] = f[nt][1] = factor / v_factor;
    scale_acc(f);
    v_factor = factor;
  }

  // Lane g reads the g-th eighth of each scale group's channels, of its four tokens.
  template <int B>
  __device__ void code_values(const Codes& codes, const Tokens& t) {
    constexpr int bits = B == 3 ? 2 : B, token_bytes = D * bits / 8;
    constexpr int bytes = T::kGroup / 8 * bits / 8, words = bytes < 4 ? 1 : bytes / 4, high_bytes = T::kGroup / 64;
    const uint8_t* high = t.v + t.count * token_bytes;
    const uint8_t* scales = high + (B == 3 ? t.count * (D / 8) : 0);
    const Constants constants(bias, codes.trits);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      float weight[NT][4];
      weights_of(i, weight);
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float w[NT][4];
        const int a = (16 * i + token_of(g)) * T::kGroups + group;
        const float s[2] = {half_at(scales, a) * v_factor, half_at(scales, a + 8 * T::kGroups) * v_factor};
        bool nan = false;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[nt][j] = weight[nt][j] * s[j / 2];
            nan |= w[nt][j] != w[nt][j];
          }
        if (t.edge && __any_sync(kWholeWarp,
                                 nan)) {  // a row that does not see a token does not see its NaN
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int j = 0; j < 4; ++j) w[nt][j] = weight[nt][j] == 0.0f ? 0.0f : w[nt][j];
        }
        uint32_t b[NT][2], x[4][words], h[4][1] = {};
        operands<false>(w, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = 16 * i + value_token(j);
          load_words<bytes>(t.v + token * token_bytes + (8 * group + g) * bytes, x[j]);
          if constexpr (B == 3) load_words<high_bytes>(high + token * (D / 8) + (8 * group + g) * high_bytes, h[j]);
        }
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t lo[8], hi[8];
          unpack<B>(pair_tokens<B>(x[0], h[0][0], x[1], h[1][0], n), constants, lo);
          unpack<B>(pair_tokens<B>(x[2], h[2][0], x[3], h[3][0], n), constants, hi);
          channel_values(group * (T::kGroup / 16) + 4 * n, lo, hi, b);
        }
      }
    }
  }

  // On a quarter of every value, as kivi2_scores.
  __device__ void kivi2_values(const Tokens& t) {
    constexpr int bytes = T::kGroup / 32, groups = D / 32;
    const uint8_t* scales = t.v + t.count * (D / 4);
    const uint8_t* zeros = scales + t.count * (groups * 2);
#pragma unroll 1
    for (int i = t.begin; i < t.end; ++i) {
      float w[NT][4];
      weights_of(i, w);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int j = 0; j < 4; ++j) w[nt][j] *= kWeightFactor;
      uint32_t b[NT][2];
      operands<false>(w, b);
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        const int of_32 = group * (T::kGroup / 32) + g * (T::kGroup / 8) / 32;
        uint32_t x[4][1], s[4], z[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = 16 * i + value_token(j);
          load_words<bytes>(t.v + token * (D / 4) + (8 * group + g) * bytes, x[j]);
          s[j] = reinterpret_cast<const uint16_t*>(scales)[token * groups + of_32];
          z[j] = reinterpret_cast<const uint16_t*>(zeros)[token * groups + of_32];
        }
#pragma unroll
        for (int n = 0; n < T::kGroup / 64; ++n) {
          uint32_t v[2][8];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            unpack<2, true>(pair_tokens<2>(x[2 * h], 0, x[2 * h + 1], 0, n), Constants(bias), v[h]);
            const uint32_t zero = fma2(z[2 * h] | z[2 * h + 1] << 16, kQuarters, 0u);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[h][j] = fma2(v[h][j], s[2 * h] | s[2 * h + 1] << 16, zero);
          }
          channel_values(group * (T::kGroup / 16) + 4 * n, v[0], v[1], b);
        }
      }
    }
  }

  // ---- sums in shared memory

  // Rows of `sums` <- H rows / sqrt(D).
  __device__ void rotate_sums() const {
    if constexpr (Packed) {
      __syncwarp();
      const int at = lane % T::kRowLanes * kPerLane;
      for (int r = lane / T::kRowLanes; r < T::kRows; r += 32 / T::kRowLanes) {
        float x[8];
        load8<DType::f32>(sums + r * T::kSumPitch + at, true, x);
        hadamard(x, D);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] *= fwht_scale(D);
        store8<DType::f32>(x, true, sums + r * T::kSumPitch + at);
      }
      __syncwarp();
    }
  }

  // Channel of acc[step][nt][0 and 1] for which = 0, of [2 and 3] for 1.
  __device__ int channel(int step, int which) const {
    if (!Packed || basis == kRowBasis) return 16 * step + 8 * which + g;
    constexpr int steps = T::kGroup / 16;
    return step / steps * T::kGroup + g * (T::kGroup / 8) + 2 * (step % steps) + which;
  }

  // acc is added to `sums` and cleared; m and l go to `state`. Sums of different bases meet in the plain one: what is
  // there is rotated before rotated sums are added, and all of it back.
  __device__ void flush() {
    const bool rotate = Packed && basis == kRotatedBasis && p.layout.mixed_basis;
    if (rotate && sums_used) rotate_sums();
    const float factor = basis == kRotatedBasis ? 1.0f / v_factor
                         : basis == kPlainBasis ? 4.0f / kWeightFactor
                                                : 1.0f / p.layout.row_factor;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = 8 * nt + 2 * c + i;
        const float before = sums_used ? ptx::ex2(state[r].m - m[nt][i]) : 0.0f;
#pragma unroll
        for (int step = 0; step < T::kValueSteps; ++step)
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            float* sum = sums + r * T::kSumPitch + channel(step, which);
            float& x = acc[step][nt][2 * which + i];
            *sum = x * factor + (sums_used ? *sum * before : 0.0f);
            x = 0.0f;
          }
      }
    if (rotate) rotate_sums();
    __syncwarp();  // state[].m was read
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = l[nt][i];
#pragma unroll
        for (int h = 4; h < 32; h *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, h);
        if (g == 0) state[8 * nt + 2 * c + i] = {m[nt][i], sum};
      }
    __syncwarp();
    v_factor = kNoFactor;
    sums_used = true;
  }
};

}  // namespace kk::cuda
