#include "bind/lists.h"

namespace kk::bind {

Lists check_lists(Check& c, const char* name, const Tensor& t) {
  static constexpr const char* shapes[2][2] = {{"B Hkv K", "B 1 K"}, {"1 Hkv K", "1 1 K"}};
  static const int32_t none = -1;
  const bool several = t.dim() == 3;
  const bool one_row = several && t.size(0) == 1, one_head = several && t.size(1) == 1;
  const View v = c.is(name, t, kI32, shapes[one_row][one_head]);
  const int32_t* index = v.data<int32_t>();
  return {v, index ? index : &none, v.size[2], one_row ? 0 : v.stride[0], one_head ? 0 : v.stride[1]};
}

}  // namespace kk::bind
