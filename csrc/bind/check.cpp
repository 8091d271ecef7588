#include "bind/check.h"

#include <cstring>

namespace kk::bind {
namespace {

struct DTypeName {
  int32_t id;
  unsigned bit;
  const char* name;
};

const DTypeName* dtypes() {
  static const DTypeName table[] = {
      {aoti_torch_dtype_float32(), kF32, "float32"},
      {aoti_torch_dtype_bfloat16(), kBF16, "bfloat16"},
      {aoti_torch_dtype_uint8(), kU8, "uint8"},
      {aoti_torch_dtype_int32(), kI32, "int32"},
      {aoti_torch_dtype_int64(), kI64, "int64"},
      {aoti_torch_dtype_float16(), kF16, "float16"},
      {aoti_torch_dtype_float64(), kF64, "float64"},
      {aoti_torch_dtype_int8(), 0, "int8"},
      {aoti_torch_dtype_int16(), 0, "int16"},
      {aoti_torch_dtype_bool(), 0, "bool"},
      {aoti_torch_dtype_complex64(), 0, "complex64"},
      {aoti_torch_dtype_complex128(), 0, "complex128"},
      {-1, 0, "another dtype"},
  };
  return table;
}

std::string set_text(unsigned set) {
  std::string s;
  for (const DTypeName* d = dtypes(); d->id >= 0; ++d)
    if (d->bit & set) s += (s.empty() ? "" : " or ") + std::string(d->name);
  return s;
}

std::string device_text(int32_t type, int32_t index) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(index);
  if (type == aoti_torch_device_type_meta()) return "meta";
  return "device type " + std::to_string(type);
}

// None arrives as a tensor that is not defined. Its dtype is none of those allowed, so it is looked at on refusals alone.
void refuse_none(const Check& c, const View& v) {
  bool defined = true;
  aoti_torch_is_defined(v.handle, &defined);
  if (!defined) c.refuse(v.name, " must be a tensor, got None");
}

// [begin, end) of the next word, or false
bool next_word(const char** text, const char** begin, int* len) {
  const char* p = *text;
  while (*p == ' ') ++p;
  *begin = p;
  while (*p && *p != ' ') ++p;
  *text = p;
  *len = static_cast<int>(p - *begin);
  return *len > 0;
}

}  // namespace

View view(const char* name, const Tensor& t) {
  View v;
  v.name = name;
  v.handle = t.get();
  aoti_torch_get_dim(v.handle, &v.dim);
  int64_t *size = nullptr, *stride = nullptr;
  aoti_torch_get_sizes(v.handle, &size);
  aoti_torch_get_strides(v.handle, &stride);
  v.size = size;
  v.stride = stride;
  int32_t id = -2;
  aoti_torch_get_dtype(v.handle, &id);
  const DTypeName* d = dtypes();
  while (d->id >= 0 && d->id != id) ++d;
  v.dtype = d->bit;
  return v;
}

bool View::contiguous() const {
  int64_t expect = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (size[i] == 0) return true;
    if (size[i] != 1 && stride[i] != expect) return false;
    expect *= size[i];
  }
  return true;
}

int64_t View::span() const {
  int64_t last = 0;  // element
  for (int64_t i = 0; i < dim; ++i) {
    if (size[i] == 0) return 0;
    last += (size[i] - 1) * stride[i];
  }
  const int64_t item = dtype & kU8 ? 1 : dtype & (kF16 | kBF16) ? 2 : dtype & (kF32 | kI32) ? 4 : 8;
  return (last + 1) * item;
}

std::string shape_text(const int64_t* size, int64_t dim) {
  std::string s = "[";
  for (int64_t i = 0; i < dim; ++i) s += (i ? ", " : "") + std::to_string(size[i]);
  return s + "]";
}

std::string dtype_text(const View& v) {
  int32_t id = -2;
  aoti_torch_get_dtype(v.handle, &id);
  const DTypeName* d = dtypes();
  while (d->id >= 0 && d->id != id) ++d;
  return d->name;
}

DType dtype_of(const View& v) {
  switch (v.dtype) {
    case kF16:
      return DType::f16;
    case kBF16:
      return DType::bf16;
    case kF64:
      return DType::f64;
    default:
      return DType::f32;
  }
}

View Check::any(const char* name, const Tensor& t, unsigned allowed, LastDim last) {
  const View v = view(name, t);
  int32_t type = 0, index = 0;
  aoti_torch_get_device_type(v.handle, &type);
  aoti_torch_get_device_index(v.handle, &index);
  if (!first_) {
    first_ = name;
    device_type_ = type;
    device_index_ = index;
  } else if (type != device_type_ || index != device_index_) {
    refuse_none(*this, v);
    refuse(name, " is on ", device_text(type, index), ", but ", first_, " is on ",
           device_text(device_type_, device_index_));
  }
  if (!(v.dtype & allowed)) {
    refuse_none(*this, v);
    refuse(name, " must be ", set_text(allowed), ", got ", dtype_text(v));
  }
  if (last == LastDim::dense && v.dim > 0 && v.size[v.dim - 1] > 1 && v.stride[v.dim - 1] != 1)
    refuse(name, " must be contiguous in its last dim, got strides ", shape_text(v.stride, v.dim));
  if constexpr (kEmulated) arguments_.add(v.name, v.data(), v.span(), false);
  return v;
}

View Check::is(const char* name, const Tensor& t, unsigned allowed, const char* shape, LastDim last) {
  const View v = any(name, t, allowed, last);
  const char *text = shape, *word;
  int len;
  int64_t i = 0;
  for (; next_word(&text, &word, &len); ++i) {
    if (i >= v.dim) refuse_shape(v, shape, nullptr);
    if (*word == '?') continue;
    const int64_t got = v.size[i];
    if (*word >= '0' && *word <= '9') {
      if (got != std::strtoll(word, nullptr, 10)) refuse_shape(v, shape, nullptr);
      continue;
    }
    const Bound* b = bound_;
    const Bound* const end = bound_ + num_bound_;
    while (b != end && (b->len != len || std::memcmp(b->dim, word, len) != 0)) ++b;
    if (b == end) {
      if (num_bound_ == kMaxBound) refuse("more than ", kMaxBound, " dim names");
      bound_[num_bound_++] = {word, len, got, name, static_cast<int>(i)};
    } else if (b->value != got) {
      refuse_shape(v, shape, b);
    }
  }
  if (i != v.dim) refuse_shape(v, shape, nullptr);
  return v;
}

void Check::bind(const char* dim, int64_t value, const char* from) {
  bound_[num_bound_++] = {dim, static_cast<int>(std::strlen(dim)), value, from, -1};
}

void Check::refuse_shape(const View& v, const char* shape, const Bound* why) const {
  std::string rule = "[";
  const char *text = shape, *word;
  int len;
  while (next_word(&text, &word, &len)) {
    if (rule.size() > 1) rule += ", ";
    const int skip = *word == '?';
    rule.append(word + skip, len - skip);
  }
  std::string from;
  if (why) {
    from = "; " + std::string(why->dim, why->len) + " = " + std::to_string(why->value) + " from " + why->from;
    if (why->from_dim >= 0) from += ".size(" + std::to_string(why->from_dim) + ")";
  }
  refuse(v.name, " must be ", rule, "], got ", shape_text(v.size, v.dim), from);
}

void Check::same_dtype(const View& v, const View& like) const {
  if (v.dtype != like.dtype)
    refuse(v.name, " must be ", dtype_text(like), " like ", like.name, ", got ", dtype_text(v));
}

void Check::contiguous(const View& v) const {
  if (!v.contiguous()) refuse(v.name, " must be contiguous, got strides ", shape_text(v.stride, v.dim));
}

void Check::writable(const View& v) const {
  for (int64_t i = 0; i < v.dim; ++i)
    if (v.stride[i] == 0 && v.size[i] > 1)
      refuse(v.name, " is written, so its elements must not share memory, got strides ", shape_text(v.stride, v.dim));
  if constexpr (kEmulated) arguments_.add(v.name, v.data(), v.span(), true);
}

std::string Check::device() const { return device_text(device_type_, device_index_); }

}  // namespace kk::bind
