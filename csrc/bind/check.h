// Argument checks. A shape is written as in the docstrings, "B Tq Hq D": a name is bound where it is first seen and must
// agree from then on, so that an error can say where the number came from:
//   quant_attention: seq_lens must be [B], got [3]; B = 4 from q.size(0)
// "?name" is any size and is not bound; a number is itself. Success costs compares only: no text is built before a failure.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bind/simt.h"
#include "kvkernels/pool.h"

namespace kk::bind {

using torch::stable::Tensor;

#if defined(KK_DEBUG_ASSERT)
constexpr bool kAsserts = true;
#else
constexpr bool kAsserts = false;
#endif

// Sets of dtypes.
enum : unsigned { kF32 = 1, kF16 = 2, kBF16 = 4, kF64 = 8, kU8 = 16, kI32 = 32, kI64 = 64 };
constexpr unsigned kFloats = kF32 | kF16 | kBF16;

enum class LastDim { dense, strided };  // strided: elements of a row may stand apart

// What a check or a kernel asks of a tensor, fetched once: every question is a call through the C shim.
struct View {
  const char* name = nullptr;  // null: an optional argument that was not given
  AtenTensorHandle handle = nullptr;
  int64_t dim = 0;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;  // elements
  unsigned dtype = 0;               // one bit of the set above; 0: none of them

  explicit operator bool() const { return name != nullptr; }
  bool contiguous() const;
  int64_t span() const;  // bytes from the first element to the end of the last
  template <typename T = void>
  const T* data() const {
    const void* p = nullptr;
    torch_get_const_data_ptr(handle, &p);
    return static_cast<const T*>(p);
  }
  template <typename T = void>
  T* mutable_data() const {
    void* p = nullptr;
    torch_get_mutable_data_ptr(handle, &p);
    return static_cast<T*>(p);
  }
};

View view(const char* name, const Tensor& t);
std::string shape_text(const int64_t* size, int64_t dim);
std::string dtype_text(const View& v);
DType dtype_of(const View& v);  // for kF32 kF16 kBF16 kF64

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // dtype, device (that of the first tensor checked), shape, and a last dim without gaps.
  View is(const char* name, const Tensor& t, unsigned dtypes, const char* shape, LastDim last = LastDim::dense);
  View is(const char* name, const std::optional<Tensor>& t, unsigned dtypes, const char* shape,
          LastDim last = LastDim::dense) {
    return t ? is(name, *t, dtypes, shape, last) : View{};
  }
  // The same without a shape.
  View any(const char* name, const Tensor& t, unsigned dtypes, LastDim last = LastDim::dense);
  // The value of a name that is an argument of its own, or follows from one.
  void bind(const char* dim, int64_t value, const char* from);

  void same_dtype(const View& v, const View& like) const;
  void contiguous(const View& v) const;
  // For what the op writes. Written by several threads: no two elements may share memory.
  void writable(const View& v) const;

  // Of the tensors checked so far.
  bool on_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  std::string device() const;
  Arguments& arguments() { return arguments_; }

  // refuse("q.size(1) = ", n, " is odd") throws ValueError "op: q.size(1) = 3 is odd".
  template <typename... Args>
  [[noreturn]] __attribute__((cold, noinline)) void refuse(const Args&... args) const {
    std::ostringstream s;
    s << op_ << ": ";
    (s << ... << args);
    throw std::invalid_argument(s.str());  // arrives in Python as ValueError
  }

 private:
  struct Bound {
    const char* dim;
    int len;
    int64_t value;
    const char* from;
    int from_dim;  // -1: not the size of a tensor
  };
  static constexpr int kMaxBound = 12;

  [[noreturn]] void refuse_shape(const View& v, const char* shape, const Bound* why) const;

  const char* op_;
  const char* first_ = nullptr;
  int32_t device_type_ = 0, device_index_ = 0;
  Bound bound_[kMaxBound];
  int num_bound_ = 0;
  Arguments arguments_;
};

}  // namespace kk::bind
