// Lists of pages or tokens, one for each sequence and KV head.
#pragma once
#include "bind/check.h"

namespace kk::bind {

// [B, Hkv, K], with 1 in place of B or Hkv where sequences or heads share one: its stride is then 0. B and Hkv are bound.
struct Lists {
  View view;
  const int32_t* index;  // not null, also where K is 0
  int64_t count, batch, head;
};
Lists check_lists(Check& c, const char* name, const Tensor& t);

}  // namespace kk::bind
