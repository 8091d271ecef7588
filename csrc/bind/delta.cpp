#include "bind/delta.h"

#include "bind/exec.h"

namespace kk::bind {
namespace {

void check_size(const Check& c, const char* name, const char* from, int64_t n) {
  if (n < 1 || n > kMaxDeltaDim) c.refuse(name, " must be 1 to ", kMaxDeltaDim, ", got ", n, " from ", from);
}

// [B, T, HV]: the elements of a row are the heads, which may stand apart.
DeltaRows number_per_head(const View& v, bool several) {
  if (!v) return {};
  return {v.data(), v.stride[0], several ? v.stride[1] : 0, v.stride[v.dim - 1], dtype_of(v)};
}

}  // namespace

DeltaRows delta_rows(const View& v, bool several) {
  if (!v) return {};
  return {v.data(), v.stride[0], several ? v.stride[1] : 0, v.stride[v.dim - 2], dtype_of(v)};
}

DeltaInputs check_delta(Check& c, const DeltaTensors& t, bool several, double scale, bool l2norm, int64_t rule) {
  DeltaInputs in{};
  const char* const key_shape = several ? "B T H K" : "B H K";
  const char* const key_gate_shape = several ? "B T HV K" : "B HV K";
  const char* const value_shape = several ? "B T HV V" : "B HV V";
  const char* const number_shape = several ? "B T HV" : "B HV";
  const View q = c.is("q", t.q, kFloats, key_shape), k = c.is("k", t.k, kFloats, key_shape);
  const View v = c.is("v", t.v, kFloats, value_shape);
  if (q) c.same_dtype(k, q);
  c.same_dtype(v, q ? q : k);
  in.B = k.size[0], in.T = several ? k.size[1] : 1;
  in.H = k.size[k.dim - 2], in.K = k.size[k.dim - 1];
  in.HV = v.size[v.dim - 2], in.V = v.size[v.dim - 1];
  check_size(c, "K", several ? "k.size(3)" : "k.size(2)", in.K);
  check_size(c, "V", several ? "v.size(3)" : "v.size(2)", in.V);
  if (in.H < 1 || in.HV < 1 || in.HV % in.H != 0)
    c.refuse("the ", in.HV, " heads of v must be a multiple of the ", in.H, " heads of k");

  in.q = delta_rows(q, several), in.k = delta_rows(k, several), in.v = delta_rows(v, several);
  in.beta = number_per_head(c.is("beta", t.beta, kFloats, number_shape, LastDim::strided), several);
  if (t.g) {
    const int64_t dim = view("g", *t.g).dim;
    in.vector_gate = dim == v.dim;
    if (!in.vector_gate && dim != v.dim - 1)
      c.refuse("g must have a gate per head, ", v.dim - 1, " dims, or per head and channel, ", v.dim, "; got ", dim);
    in.g = in.vector_gate ? delta_rows(c.is("g", *t.g, kFloats, key_gate_shape), several)
                          : number_per_head(c.is("g", *t.g, kFloats, number_shape, LastDim::strided), several);
  }
  in.erase = delta_rows(c.is("erase", t.erase, kFloats, key_gate_shape), several);
  in.write = delta_rows(c.is("write", t.write, kFloats, value_shape), several);
  if (rule < 0 || rule > static_cast<int64_t>(BetaRule::kaczmarz)) c.refuse("beta_rule must be 0 to 3, got ", rule);
  in.rule = static_cast<BetaRule>(rule);
  in.l2norm = l2norm;
  in.scale = static_cast<float>(scale);
  in.N = in.B;
  return in;
}

void check_sequences(Check& c, DeltaInputs& in, const std::optional<Tensor>& initial_state,
                     const std::optional<Tensor>& cu_seqlens, std::optional<int64_t> chunk, int64_t every) {
  if (cu_seqlens) {
    const View cu = c.is("cu_seqlens", *cu_seqlens, kI32, "?N+1");
    c.contiguous(cu);
    if (in.B != 1) c.refuse("cu_seqlens divides the tokens of one row, so B must be 1, got ", in.B, " from k.size(0)");
    if (cu.size[0] < 2) c.refuse("cu_seqlens must be [N + 1] with N at least 1, got ", shape_text(cu.size, cu.dim));
    in.N = cu.size[0] - 1;
    in.cu_seqlens = cu.data<int32_t>();
    c.bind("N", in.N, "cu_seqlens.size(0) - 1");
    if (c.on_cpu()) {
      const int32_t* const p = in.cu_seqlens;
      if (p[0] != 0) c.refuse("cu_seqlens[0] = ", p[0], ", but the first sequence begins at 0");
      for (int64_t n = 1; n <= in.N; ++n)
        if (p[n] < p[n - 1])
          c.refuse("cu_seqlens[", n, "] = ", p[n], " is less than cu_seqlens[", n - 1, "] = ", p[n - 1]);
      if (p[in.N] > in.T)
        c.refuse("cu_seqlens[", in.N, "] = ", p[in.N], ", but there are T = ", in.T, " tokens, from k.size(1)");
    }
  } else {
    c.bind("N", in.B, "k.size(0)");
  }
  if (initial_state) {
    const View s = c.is("initial_state", *initial_state, kF32, "N HV K V");
    c.contiguous(s);
    in.initial_state = s.data<float>();
  }
  if (every < 0) c.refuse("checkpoint_every must not be negative, got ", every);
  if (chunk) {
    if (*chunk != 16 && *chunk != 32 && *chunk != 64) c.refuse("chunk_size must be 16, 32 or 64, got ", *chunk);
    in.chunk = *chunk;
  } else {
    in.chunk = c.on_cpu() && !kEmulated ? 32 : 64;
    while (in.chunk > 16 && every % in.chunk != 0) in.chunk /= 2;
  }
  if (every % in.chunk != 0) c.refuse("checkpoint_every must be a multiple of ", in.chunk, ", a chunk; got ", every);
}

Tensor new_like(Check& c, const char* name, const View& like) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(like.handle, &dtype);
  Tensor made = empty(like.size, like.dim, dtype, c.device_type(), c.device_index());
  c.writable(view(name, made));
  return made;
}

Tensor new_f32(Check& c, const char* name, const int64_t* size, int64_t dim) {
  Tensor made = empty(size, dim, aoti_torch_dtype_float32(), c.device_type(), c.device_index());
  c.writable(view(name, made));
  return made;
}

Tensor no_tensor(const Check& c) {
  const int64_t size = 0;
  return empty(&size, 1, aoti_torch_dtype_float32(), c.device_type(), c.device_index());
}

}  // namespace kk::bind
