// The delta rule: what its ops share. A head's state S is a [K, V] matrix in fp32; a token changes it and reads it:
//
//   S   <- diag(alpha) S                     alpha = exp(g), one number or one per row of S: forget
//   d    = w - S^T e                         e = beta * erase o k   what is looked up and taken away
//   S   <- S + k d^T                         w = beta * write o v   what is put there
//   o    = scale * S^T q                     the new state is read
//
// beta scales both sides; erase [K] and write [V] are 1 unless given (GDN-2). No gate: DeltaNet; one gate: Gated DeltaNet;
// K gates: KDA. Value head h uses the keys and queries of head h / (HV / H).
//
// A chunk of C tokens at once. a_i = alpha_1 o ... o alpha_i from the start of the chunk, D_ij = alpha_{j+1} o ... o alpha_i
// (D_ii = 1), S the state before it, rows of K, Q, V the tokens:
//   L_ij = sum_c e_ic k_jc D_ijc  (j < i)         P_ij = scale sum_c q_ic k_jc D_ijc  (j <= i)
//   R_i  = w_i - (a_i o e_i)^T S                  N = (I + L)^-1 R         N_i is d of token i
//   o_i  = scale (a_i o q_i)^T S + (P N)_i        S <- diag(a_C) S + sum_j (D_Cj o k_j) N_j^T
// Decays are always products of alphas, never differences of sums of g: nothing overflows, g = -inf is exact, and a strong
// gate does not cost the bits of those after it. With one gate per head D_ij leaves the sums over channels.
//
// Backward of a chunk, given dO and dS' of the state after it, with x^ = a o x, k-_j = D_Cj o k_j:
//   dN = P^T dO + k- dS'         dR = (I + L)^-T dN        dL = -tril_{-1}(dR N^T)       dP = tril(dO N^T)
//   dw = dR     de^ = -dR S^T    dq^ = scale dO S^T        dk- = N dS'^T
//   dS = diag(a_C) dS' + scale q^^T dO - e^^T dR
// and through the products to q, k, e and g: dg_t is the sum, over every decay that holds alpha_t, of its gradient times it.
//
// Source: Yang et al. 2024, arXiv:2406.06484 (DeltaNet in chunks), arXiv:2412.06464 (Gated DeltaNet); Kimi Team 2025,
// arXiv:2510.26692 (KDA).
#pragma once
#include "kvkernels/core/config.h"
#include "kvkernels/exec.h"
#include "kvkernels/pool.h"

namespace kk {

constexpr int64_t kMaxDeltaDim = 256;  // K and V
constexpr float kL2NormEps = 1e-6f;    // k / sqrt(sum k^2 + eps), in fp32, before scale
constexpr float kKaczmarzEps = 1e-6f;  // beta / (sum k^2 + eps), of k after its norm

// What beta means. sigmoid: 1 / (1 + exp(-beta)); sigmoid2: twice that, eigenvalues of the transition down to -1.
enum class BetaRule : int32_t { raw = 0, sigmoid = 1, sigmoid2 = 2, kaczmarz = 3 };

// Rows [B, T, heads, n], contiguous in the last dim, which [B, T, heads] tensors do not have. Strides in elements.
struct DeltaRows {
  const void* p;  // null: not given
  int64_t batch, token, head;
  DType dtype;  // f32 f16 bf16
};

struct DeltaInputs {
  DeltaRows q;      // [B, T, H, K]; null: only the state is wanted
  DeltaRows k;      // [B, T, H, K]
  DeltaRows v;      // [B, T, HV, V]
  DeltaRows beta;   // [B, T, HV]; null: 1
  DeltaRows g;      // [B, T, HV], or [B, T, HV, K] with vector_gate; natural log of the decay; null: 0
  DeltaRows erase;  // [B, T, HV, K]; null: 1
  DeltaRows write;  // [B, T, HV, V]; null: 1
  bool vector_gate;
  bool l2norm;  // of q and k
  BetaRule rule;
  float scale;
  // [N + 1] int32, B = 1, sequence n is tokens [cu_seqlens[n], cu_seqlens[n + 1]); tokens from cu_seqlens[N] on belong to
  // none and get zeros. Null: N = B sequences of T tokens.
  const int32_t* cu_seqlens;
  int64_t B, T, N, H, HV, K, V;
  const float* initial_state;  // [N, HV, K, V] contiguous, or null: zeros
  int64_t chunk;               // 16, 32 or 64 tokens
};

// Where things of a sequence's tokens [begin, end) that exist once per `every` tokens lie in an array for all sequences:
// item j of the sequence is number first + j. Whole runs (checkpoints): T / every per batch row. Begun runs (chunks):
// one more per sequence. Found from `begin` alone, so that a GPU needs no scan.
struct DeltaSlots {
  int64_t whole, begun;
};
KK_HD DeltaSlots delta_slots(const DeltaInputs& p, int64_t n, int64_t begin, int64_t every) {
  if (p.cu_seqlens) return {begin / every, begin / every + n};
  return {n * (p.T / every), n * ((p.T + every - 1) / every)};
}
KK_HD int64_t delta_whole_slots(const DeltaInputs& p, int64_t every) {
  return p.cu_seqlens ? p.T / every : p.N * (p.T / every);
}
KK_HD int64_t delta_begun_slots(const DeltaInputs& p, int64_t every) {
  return p.cu_seqlens ? p.T / every + p.N : p.N * ((p.T + every - 1) / every);
}

}  // namespace kk
