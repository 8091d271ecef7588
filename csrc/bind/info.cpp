// build_info, page_bytes: what the library knows about itself.
#include <torch/csrc/stable/library.h>

#include "bind/check.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace kk::bind {
namespace {

std::string build_info() {
  std::string s = "{\"isa\": \"" + std::string(cpu::isa_name(cpu::isa())) + "\", \"isas\": [";
  for (const auto isa : {cpu::Isa::base, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::avx512vnni})
    if (cpu::isa_available(isa)) s += (isa == cpu::Isa::base ? "\"" : ", \"") + std::string(cpu::isa_name(isa)) + "\"";
  s += kAsserts ? "], \"assert\": true" : "], \"assert\": false";
#if defined(KK_CUDA)
  s += ", \"cuda\": \"" KK_CUDA "\"";  // CMAKE_CUDA_ARCHITECTURES
#else
  s += ", \"cuda\": null";
#endif
  s += kEmulated ? ", \"simt\": true" : ", \"simt\": false";
  return s + ", \"compiler\": \"" __VERSION__ "\"}";
}

int64_t page_bytes_checked(int64_t k_format, int64_t v_format, int64_t page_size, int64_t head_dim) {
  const Check c("page_bytes");
  const FormatCode f = format_code(c, "page", k_format | v_format << 8);
  check_geometry(c, "page", f, page_size, head_dim, "head_dim");
  return page_bytes(f.k, f.v, page_size, head_dim);
}

}  // namespace
}  // namespace kk::bind

STABLE_TORCH_LIBRARY_FRAGMENT(kvkernels, m) {
  m.def("build_info() -> str");
  m.def("page_bytes(int k_format, int v_format, int page_size, int head_dim) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(kvkernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&kk::bind::build_info));
  m.impl("page_bytes", TORCH_BOX(&kk::bind::page_bytes_checked));
}
