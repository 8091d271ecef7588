// The sizes of what one warp of attention_kernel works on, and what lies in shared memory.
//
// Tokens are the 16 rows of mma.m16n8k16 and query rows its 8 columns, so that a group of 1 to 8 heads wastes half as
// much as with the roles exchanged:
//   S^T [16 tokens x 8 rows] = K [16 x D] Q^T        O^T [D x 8 rows] += V^T [D x 16 tokens] P^T
// Row m of an operand is token m ^ (m >> 2 & 1) of its eight: lanes that read tokens 0 2 4 6 of 32 bytes would meet in
// the same banks of shared memory, those that read 0 2 5 7 do not. Lane = 4 g + c throughout, as in ptx.cuh.
#pragma once
#include "cuda/attention_schedule.cuh"

namespace kk::cuda {

template <int D, int NT>
struct Tile {
  static constexpr int kDv = D == 576 ? 512 : D;
  static constexpr int kRows = 8 * NT;
  static constexpr int kSteps = D / 16;         // of 16 channels: k in scores,
  static constexpr int kValueSteps = kDv / 16;  // rows of O^T in the sums
  static constexpr int kStepPairs = (kSteps + 1) / 2;
  static constexpr int kQueryBytes = NT * kStepPairs * 32 * 16;
  static constexpr int kRowLanes = D <= 64 ? 8 : D <= 128 ? 16 : 32;   // lanes that hold a row, 8 channels each,
  static constexpr int kOctets = (D / 8 + kRowLanes - 1) / kRowLanes;  // or these times as many
  static constexpr int kValueOctets = (kDv / 8 + kRowLanes - 1) / kRowLanes;
  static constexpr int kPitch = D * 2 + 16;         // bytes of a 16-bit row in a stage: 8 rows, all banks
  static constexpr int kSumPitch = kDv + 4;         // floats of a row of sums
  static constexpr int kGroup = D < 128 ? D : 128;  // channels that share a scale
  [[maybe_unused]] static constexpr int kGroups = D / kGroup;
  [[maybe_unused]] static constexpr int kHalf = D / 2;  // the same of keys of two parts
};

// What sums over V are in: order of channels and basis.
enum Basis : int { kNoBasis, kRowBasis, kRotatedBasis, kPlainBasis };

struct Row {
  float q_scale;  // from the product with scaled queries to the score
  float q_mu;     // what centring took from the scores of rotated keys
  float slope;    // ALiBi
  int before;     // the row sees tokens before this one,
  uint32_t bits;  // and token before + j if bit j is set
  int position;   // of the query, from which windows and ALiBi count
  int b;          // sequence
  int16_t t, head;
};

// Of the query with this tree mask, or of its token: ancestors in the tree.
__device__ __forceinline__ int depth(uint32_t bits) { return __popc(bits) - 1; }

// Header of a stage: place of its first token, pool (-1: nothing); with a selection two positions, from the first on
// and before the other (or, where some of 16 are missing, any), positions of 16 tokens where these are gathered (-1:
// none), and words with their scales in them, of both parts of K and of V.
template <bool Sparse>
constexpr int kHeader = Sparse ? 16 + 16 * 4 + 3 * 16 * 4 : 16;
constexpr int kPositions = 16, kScaleWords = kPositions + 16 * 4;

__device__ __forceinline__ bool is_rows(Format f) { return f == Format::bf16 || f == Format::f16; }

}  // namespace kk::cuda
