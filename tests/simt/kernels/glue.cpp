// The kernels of the emulator's own tests, for Python. Arrays are passed as they lie: a conversion would be a copy outside
// the memory that is watched.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "selftest.h"
#include "simt_host.h"

namespace py = pybind11;
using namespace selftest;

namespace {

const std::map<std::string, Bug>& bugs() {
  static const std::map<std::string, Bug> all = {
#define BUG(name) {#name, Bug::name},
#include "bugs.def"
#undef BUG
  };
  return all;
}

Bug bug_named(const std::string& name) {
  const auto found = bugs().find(name);
  if (found == bugs().end()) throw py::value_error("no such bug: " + name);
  return found->second;
}

// The data of a C-contiguous array of T.
template <typename T>
T* data(const py::array& a) {
  if (!py::isinstance<py::array_t<T>>(a) || !(a.flags() & py::array::c_style))
    throw py::type_error("expected a contiguous array of " + std::string(py::str(py::dtype::of<T>())) + ", got " +
                         std::string(py::str(a.dtype())));
  return static_cast<T*>(const_cast<void*>(a.data()));
}

int size(const py::array& a, int dim) { return static_cast<int>(a.shape(dim)); }

}  // namespace

void selftest::no_such_bug(Bug) { throw std::invalid_argument("this kernel has no such bug"); }

void bind_selftest(py::module_& m) {
  using A = const py::array&;
  using S = const std::string&;
  std::vector<std::string> names;
  for (const auto& [name, bug] : bugs()) names.push_back(name);
  m.attr("BUGS") = names;
  m.def("decode", [](A q, A k, A v, A table, A lens, A out, A partial_out, A partial_ml, S bug) {
    const DecodeParams p{
        data<uint16_t>(q),   data<uint16_t>(k),        data<uint16_t>(v),       data<int>(table), data<int>(lens),
        data<uint16_t>(out), data<float>(partial_out), data<float>(partial_ml), size(q, 0),       size(k, 2),
        size(k, 1),          size(table, 1),           size(partial_out, 2)};
    decode(p, bug_named(bug));
  });
  m.def("scores", [](A q, A k, A s, S bug) {
    scores(data<uint16_t>(q), data<uint16_t>(k), data<float>(s), size(q, 0), size(k, 0), bug_named(bug));
  });
  m.def("scan", [](A q, A k, A v, A beta, A o, S bug) {
    scan(data<float>(q), data<float>(k), data<float>(v), data<float>(beta), data<float>(o), size(q, 0), size(q, 1),
         bug_named(bug));
  });
  m.def("reverse_warps", [](A in, A out, S bug) {
    reverse_warps(data<float>(in), data<float>(out), size(in, 0) / 128, bug_named(bug));
  });
  m.def("sum", [](A in, A partial, A counter, A out, S bug) {
    sum(data<float>(in), data<float>(partial), data<unsigned>(counter), data<float>(out), size(partial, 0), size(in, 0),
        bug_named(bug));
  });
  m.def("histogram", [](A in, A out, S bug) { histogram(data<int>(in), data<int>(out), size(in, 0), bug_named(bug)); });
  m.def("running_sums",
        [](A in, A out, S bug) { running_sums(data<float>(in), data<float>(out), size(in, 0), bug_named(bug)); });
  m.def("rotate", [](A out, S bug) { rotate(data<float>(out), size(out, 0), bug_named(bug)); });
  m.def("reverse_block", [](A out, S bug) { reverse_block(data<float>(out), bug_named(bug)); });
  m.def("handshake", [](A flag, A out) { handshake(data<int>(flag), data<int>(out)); });
  m.def("count_up", [](A io, S bug) { count_up(data<float>(io), size(io, 0), bug_named(bug)); });
  m.def("lanes", [](A out, S bug) { lanes(data<int>(out), bug_named(bug)); });
  m.def("shifts", [](A in, A out, S bug) { shifts(data<int>(in), data<unsigned>(out), bug_named(bug)); });
  m.def("mma", [](bool bf16, A a, A b, A c, A d) {
    mma(bf16, data<uint32_t>(a), data<uint32_t>(b), data<float>(c), data<float>(d));
  });
  m.def("mma_tf32",
        [](A a, A b, A c, A d) { mma_tf32(data<float>(a), data<float>(b), data<float>(c), data<float>(d)); });
  m.def("tf32", [](A in, A out) { tf32(data<float>(in), data<float>(out)); });
  m.def("ldmatrix",
        [](bool transposed, A in, A out) { ldmatrix(transposed, data<uint16_t>(in), data<uint32_t>(out)); });
  m.def("movmatrix", [](A in, A out) { movmatrix(data<uint32_t>(in), data<uint32_t>(out)); });
  // What csrc/bind does with the arguments of an op.
  m.def("add_region", [](S name, A a, bool writable) {
    simt::add_region(name.c_str(), a.data(), static_cast<size_t>(a.nbytes()), writable);
  });
  m.def("clear_regions", &simt::clear_regions);
}
