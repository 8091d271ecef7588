#include "bind/pool.h"

#include <algorithm>
#include <bitset>
#include <iterator>

#include "kvkernels/head_dims.h"

namespace kk::bind {

const PoolNames kPoolNames[kMaxPools] = {
    {"pool 0", "k_cache of pool 0", "v_cache of pool 0"}, {"pool 1", "k_cache of pool 1", "v_cache of pool 1"},
    {"pool 2", "k_cache of pool 2", "v_cache of pool 2"}, {"pool 3", "k_cache of pool 3", "v_cache of pool 3"},
    {"pool 4", "k_cache of pool 4", "v_cache of pool 4"}, {"pool 5", "k_cache of pool 5", "v_cache of pool 5"},
    {"pool 6", "k_cache of pool 6", "v_cache of pool 6"}, {"pool 7", "k_cache of pool 7", "v_cache of pool 7"},
};

namespace {

std::string pair_name(const FormatCode& f) { return std::string(format_name(f.k)) + "/" + format_name(f.v); }

bool known(int64_t number) {
  switch (number) {
#define KK_FORMAT(name, n) case n:
#include "kvkernels/formats.def"
#undef KK_FORMAT
    return true;
  }
  return false;
}

bool is_packed(Format f) {
  bool packed = false;
  with_format(f, [&](auto fmt) { packed = decltype(fmt)::packed; });
  return packed;
}

bool keys_only(Format f) {
  bool keys = false;
  with_format(f, [&](auto fmt) {
    if constexpr (decltype(fmt)::packed) keys = decltype(fmt)::keys_only;
  });
  return keys;
}

// Of a CPU call, where a channel past the head would be read from beside the tensor. Builds with assertions look for channels
// named twice as well.
void check_order(const Check& c, const int32_t* order, int64_t heads, int64_t head_dim) {
  for (int64_t h = 0; h < heads; ++h) {
    std::bitset<256> named;
    for (int64_t j = 0; j < head_dim; ++j) {
      const int32_t channel = order[h * head_dim + j];
      if (channel < 0 || channel >= head_dim)
        c.refuse("order[", h, ", ", j, "] = ", channel, " is no channel of D = ", head_dim);
      if (!kAsserts) continue;
      if (named[channel]) c.refuse("order[", h, "] is no permutation of the channels: it names ", channel, " twice");
      named.set(channel);
    }
  }
}

template <size_t N>
bool is_one_of(const int64_t (&allowed)[N], int64_t n) {
  return std::find(std::begin(allowed), std::end(allowed), n) != std::end(allowed);
}

template <size_t N>
std::string list_text(const int64_t (&allowed)[N]) {
  const std::string s = shape_text(allowed, N);
  return s.substr(1, s.size() - 2);
}

unsigned cache_dtype(Format f) { return f == Format::bf16 ? kBF16 : kF16; }

}  // namespace

const char* format_name(Format f) {
  const char* name = "";
  with_format(f, [&](auto fmt) { name = decltype(fmt)::name; });
  return name;
}

FormatCode format_code(const Check& c, const char* pool, int64_t code, Offloaded offloaded) {
  const int64_t k = code & 255, v = code >> 8 & 255;
  for (const int64_t n : {k, v})
    if (!known(n)) {
      std::string list;
#define KK_FORMAT(fmt, number) list += std::string(" ") + fmt::name + "=" #number;
#include "kvkernels/formats.def"
#undef KK_FORMAT
      c.refuse(pool, ": unknown KV format number ", n, "; there are:", list);
    }
  if (code < 0 || code >> 18)
    c.refuse(pool, ": format code ", code, " is not k | v << 8 | two_caches << 16 | offloaded << 17");
  if (code >> 17 && offloaded == Offloaded::refused)
    c.refuse(pool,
             " holds a cache of pages in main memory, in slots of its own, since kk.offload; only sparse_attention "
             "reads it, with the entries that gather_pages gives");
  FormatCode f{static_cast<Format>(k), static_cast<Format>(v), (code >> 16 & 1) != 0, false};
  f.packed = is_packed(f.k) || is_packed(f.v);
  if (keys_only(f.v))
    c.refuse(pool, ": ", format_name(f.v), " is a format for keys; its values need another one, such as u2");
  if (f.two_caches && f.packed) c.refuse(pool, ": two separate caches hold 16-bit formats, not ", pair_name(f));
  return f;
}

void check_geometry(const Check& c, const char* pool, const FormatCode& f, int64_t page_size, int64_t head_dim,
                    const char* head_dim_from) {
  if (f.packed) {
    if (page_size < 16 || page_size % 16)
      c.refuse("page_size must be a multiple of 16, because ", pool, " is ", pair_name(f), "; got ", page_size);
    if (!is_one_of(kPackedHeadDims, head_dim))
      c.refuse("head_dim must be one of ", list_text(kPackedHeadDims), ", because ", pool, " is ", pair_name(f),
               "; got ", head_dim, " from ", head_dim_from);
    return;
  }
  if (page_size < 1) c.refuse("page_size must be at least 1, got ", page_size);
  check_head_dim(c, head_dim, head_dim_from);
}

void check_head_dim(const Check& c, int64_t head_dim, const char* from, const char* more) {
  if (is_one_of(kHeadDims, head_dim)) return;
  c.refuse("head_dim must be one of ", list_text(kHeadDims), more, "; got ", head_dim, " from ", from);
}

Pool make_pool(Check& c, const PoolNames& names, const FormatCode& f, const Tensor& first, const Tensor* second,
               int64_t page_size, int64_t head_dim) {
  Pool p{};
  p.k_format = f.k;
  p.v_format = f.v;
  if (f.two_caches) {
    if (!second) c.refuse(names.record, " is two 16-bit caches, but ", names.v, " was not given");
    const View k = c.is(names.k, first, cache_dtype(f.k), "?num_pages Hkv ?page_size D");
    const View v = c.is(names.v, *second, cache_dtype(f.v), "?num_pages Hkv ?page_size D");
    for (const View* w : {&k, &v})
      if (w->size[2] != page_size)
        c.refuse(w->name, " must be [num_pages, Hkv, page_size, D], got ", shape_text(w->size, 4),
                 "; page_size = ", page_size);
    if (k.size[0] != v.size[0]) c.refuse(names.v, " has ", v.size[0], " pages, but ", names.k, " has ", k.size[0]);
    p.k = const_cast<uint8_t*>(k.data<uint8_t>());
    p.v = const_cast<uint8_t*>(v.data<uint8_t>());
    p.k_page = k.stride[0] * 2, p.k_head = k.stride[1] * 2, p.k_token = k.stride[2] * 2;
    p.v_page = v.stride[0] * 2, p.v_head = v.stride[1] * 2, p.v_token = v.stride[2] * 2;
    p.num_pages = k.size[0];
    return p;
  }
  if (second) c.refuse(names.record, " is one uint8 tensor of records, but a second cache was given");
  const View r = c.is(names.record, first, kU8, "?num_pages Hkv ?page_bytes");
  const int64_t need = page_bytes(f.k, f.v, page_size, head_dim);
  if (r.size[2] != need)
    c.refuse(names.record, ": pages of ", r.size[2], " bytes, but ", pair_name(f), " with page_size ", page_size,
             " and head_dim ", head_dim, " needs ", need);
  p.k = const_cast<uint8_t*>(r.data<uint8_t>());
  p.v = p.k + side_bytes(f.k, Side::K, page_size, head_dim);
  p.k_page = p.v_page = r.stride[0];
  p.k_head = p.v_head = r.stride[1];
  p.k_token = is_packed(f.k) ? 0 : head_dim * 2;
  p.v_token = is_packed(f.v) ? 0 : head_dim * 2;
  p.num_pages = r.size[0];
  return p;
}

Pool make_writable_pool(Check& c, const PoolNames& names, const FormatCode& f, const Tensor& first,
                        const Tensor* second, int64_t page_size, int64_t head_dim) {
  const Pool p = make_pool(c, names, f, first, second, page_size, head_dim);
  c.writable(view(f.two_caches ? names.k : names.record, first));
  if (second) c.writable(view(names.v, *second));
  return p;
}

int make_pools(Check& c, const std::vector<Tensor>& tensors, const std::vector<int64_t>& formats, int64_t page_size,
               int64_t head_dim, const char* head_dim_from, Pool* pools, Offloaded offloaded) {
  if (formats.empty()) c.refuse("kv needs at least one pool");
  if (formats.size() > kMaxPools)
    c.refuse("kv has ", formats.size(), " pools, but a page table tells at most ", kMaxPools, " apart");
  size_t used = 0;
  for (size_t i = 0; i < formats.size(); ++i) {
    const PoolNames& names = kPoolNames[i];
    const FormatCode f = format_code(c, names.record, formats[i], offloaded);
    check_geometry(c, names.record, f, page_size, head_dim, head_dim_from);
    if (used + 1 + f.two_caches > tensors.size())
      c.refuse("formats ask for more tensors than the ", tensors.size(), " in pools");
    pools[i] = make_pool(c, names, f, tensors[used], f.two_caches ? &tensors[used + 1] : nullptr, page_size, head_dim);
    used += 1 + f.two_caches;
  }
  if (used != tensors.size()) c.refuse("formats ask for ", used, " tensors, but pools has ", tensors.size());
  return static_cast<int>(formats.size());
}

KeyTransform make_transform(Check& c, const TransformArguments& a) {
  const View mu = c.is("centre", a.centre, kF32, "Hkv D"), t = c.is("balance", a.balance, kF32, "Hkv D");
  const View order = c.is("order", a.order, kI32, "Hkv D");
  KeyTransform transform{};
  if (mu) c.contiguous(mu), transform.centre = mu.data<float>();
  if (t) c.contiguous(t), transform.balance = t.data<float>();
  if (order) {
    c.contiguous(order);
    transform.order = order.data<int32_t>();
    if (c.on_cpu()) check_order(c, transform.order, order.size[0], order.size[1]);
  }
  return transform;
}

void check_slots(const Check& c, const View& slots, const char* pool, const Pool& p, int64_t page_size) {
  const int64_t* s = slots.data<int64_t>();
  const int64_t end = p.num_pages * page_size;
  for (int64_t i = 0; i < slots.size[0]; ++i)
    if (s[i] >= end)
      c.refuse("slots[", i, "] = ", s[i], ", but ", pool, " has ", p.num_pages, " pages of ", page_size, " tokens");
}

}  // namespace kk::bind
