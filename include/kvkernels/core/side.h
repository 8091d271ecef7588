// A page holds keys, then values; a format may store the two sides differently.
#pragma once
#include "kvkernels/core/config.h"

namespace kk {
enum class Side : int { K = 0, V = 1 };
}
