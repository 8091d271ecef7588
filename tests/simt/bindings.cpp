// The Python side of the emulator. Compiled into every shared object that holds emulated kernels, under its module's name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "simt_host.h"
#if defined(KK_SIMT_SELFTEST)
void bind_selftest(pybind11::module_& m);
#endif

namespace py = pybind11;

namespace {

template <typename E>
E one_of(const char* option, const std::string& got, std::initializer_list<std::pair<const char*, E>> allowed) {
  std::string names;
  for (const auto& [name, value] : allowed) {
    if (got == name) return value;
    names += names.empty() ? name : std::string(", ") + name;
  }
  throw py::value_error(std::string(option) + " must be one of " + names + "; got " + got);
}

simt::Order order(const char* option, const std::string& got) {
  using simt::Order;
  return one_of<Order>(option, got,
                       {{"ascending", Order::ascending}, {"descending", Order::descending}, {"random", Order::random}});
}

void set_options(const std::string& threads, const std::string& blocks, const std::string& copies, uint64_t seed,
                 int resident, int preempt, int sms, int smem, int max_reports) {
  using simt::Copies;
  if (resident < 1 || resident > 4) throw py::value_error("resident must be in 1..4; got " + std::to_string(resident));
  simt::Options o;
  o.threads = order("threads", threads);
  o.blocks = order("blocks", blocks);
  o.copies =
      one_of<Copies>("copies", copies, {{"late", Copies::late}, {"early", Copies::early}, {"random", Copies::random}});
  o.seed = seed;
  o.resident = resident;
  o.preempt = preempt;
  o.sms = sms;
  o.smem = smem;
  o.max_reports = max_reports;
  simt::options() = o;
}

py::array array(const std::string& name, const py::array& values, bool writable) {
  const py::array dense = py::array::ensure(values, py::array::c_style);
  const size_t bytes = static_cast<size_t>(dense.nbytes());
  void* memory = simt::alloc(name.c_str(), bytes, writable);
  std::memcpy(memory, dense.data(), bytes);
  // Python may write what a kernel must not: the view is always writable.
  const py::capsule owner(memory, [](void* p) { simt::free(p); });
  return py::array(dense.dtype(), std::vector<py::ssize_t>(dense.shape(), dense.shape() + dense.ndim()), memory, owner);
}

}  // namespace

PYBIND11_MODULE(KK_SIMT_MODULE, m) {
  m.doc() = "CUDA kernels on this machine's CPU, one fiber per CUDA thread.";
  m.attr("checking") = simt::checking();
  m.def("options", &set_options, py::kw_only(), py::arg("threads") = "ascending", py::arg("blocks") = "ascending",
        py::arg("copies") = "late", py::arg("seed") = 1, py::arg("resident") = 1, py::arg("preempt") = 0,
        py::arg("sms") = 3, py::arg("smem") = 100 * 1024, py::arg("max_reports") = 8,
        "Sets the schedule and the device; what is not named goes back to its default.");
  m.def("errors", [] { return simt::reports(); }, "Reports since clear().");
  m.def("clear", &simt::clear_reports);
  m.def("array", &array, py::arg("name"), py::arg("values"), py::arg("writable") = false,
        "A copy of values in known memory with a guard page behind it, as a numpy array that owns the memory.");
#if defined(KK_SIMT_SELFTEST)
  bind_selftest(m);
#endif
}
