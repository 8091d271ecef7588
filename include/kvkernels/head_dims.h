// What a head may measure. kvkernels/formats/__init__.py has the same for Python; a test holds them equal.
#pragma once
#include <cstdint>

namespace kk {

constexpr int64_t kHeadDims[] = {64, 80, 96, 112, 128, 192, 256};  // of 16-bit rows
constexpr int64_t kPackedHeadDims[] = {64, 128, 256};

}  // namespace kk
