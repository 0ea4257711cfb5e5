// cpu_module.cpp: deltaops._cpu, the C ABI of the CPU core as flat Python functions.
//
// Pointers are integers (0: absent), strides count elements, dtype is 0 (f32) or 1 (bf16); a call
// is the conversion of its integers and one C call without the GIL. Only delta_linear, whose small
// layers feel each integer, takes tensors themselves (tensors.h).

#include "cpu_module.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "recycled.h"

namespace deltaops_bindings {

// The status as Python's own exception, with the core's sentence.
void raise_unless_ok(deltaops_status status) {
  switch (status) {
    case DELTAOPS_OK:
      return;
    case DELTAOPS_INVALID_ARGUMENT:
      throw py::value_error(deltaops_last_error());
    case DELTAOPS_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, deltaops_last_error());
      throw py::error_already_set();
    default:
      throw std::runtime_error(deltaops_last_error());
  }
}

namespace {

// GF/s of independent multiply-adds, for about `seconds`.
double fma_peak(int dtype, int threads, double seconds) {
  py::gil_scoped_release release;
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double done = 0.0, elapsed = 0.0;
  while (elapsed < seconds) {
    const int64_t count = deltaops_cpu_fma_peak(dtype, 200000, threads);
    if (count < 0) {
      py::gil_scoped_acquire acquire;
      throw py::value_error(deltaops_last_error());
    }
    done += 2.0 * static_cast<double>(count);
    elapsed = std::chrono::duration<double>(clock::now() - start).count();
  }
  return done / elapsed / 1e9;
}

std::string isa() {
  const char *name = deltaops_cpu_isa();
  if (name == nullptr) throw std::runtime_error(deltaops_last_error());
  return name;
}

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> out;
  for (int32_t i = 0; i < deltaops_cpu_isa_count(); ++i) {
    const char *name = deltaops_cpu_isa_name(i);
    out.emplace_back(name, deltaops_cpu_isa_runs(name) != 0);
  }
  return out;
}

void add_recycling(py::module_ &m) {
  m.def("recycled", &recycled,
        "A DLPack capsule of a matrix [rows, cols]: memory of an earlier one where there is some.");
  m.def("recycle_limit", [](size_t bytes) { Recycler::instance().set_limit(bytes); });
  m.def("recycle_idle", [] { return Recycler::instance().idle_bytes(); });
  m.def("recycle_release", [] { Recycler::instance().release(); });
}

void add_core(py::module_ &m) {
  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &isas, "(name, whether this CPU runs it), slowest first.");
  m.def("set_isa",
        [](const std::string &name) { raise_unless_ok(deltaops_cpu_set_isa(name.c_str())); });
  m.def("abi_version", &deltaops_abi_version);
  m.def("fma_peak", &fma_peak, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        "GF/s that the multiply-add units reach with nothing else in the way.");
}

}  // namespace

}  // namespace deltaops_bindings

PYBIND11_MODULE(_cpu, m) {
  using namespace deltaops_bindings;
  m.doc() = "The native CPU core (csrc/include/deltaops.h): addresses in, statuses as exceptions.";
  add_core(m);
  add_recycling(m);
  add_tensors(m);
  add_delta_linear(m);
  add_adapters(m);
  add_cross_entropy(m);
  add_gated(m);
  add_heads(m);
}
