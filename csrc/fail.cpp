// Out-of-line throwers: the per-ISA objects call these and so hold no STL code of their own.
#include <stdexcept>
#include <string>

#include "kvkernels/core/one_of.h"

namespace kk {

void fail(const char* message) { throw std::invalid_argument(message); }

void fail_one_of(const char* what, const int64_t* allowed, int n, int64_t got) {
  std::string s = std::string(what) + " must be one of ";
  for (int i = 0; i < n; ++i) s += (i ? ", " : "") + std::to_string(allowed[i]);
  throw std::invalid_argument(s + "; got " + std::to_string(got));
}

}  // namespace kk
