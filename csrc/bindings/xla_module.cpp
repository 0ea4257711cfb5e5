// xla_module.cpp: deltaops._xla, the handlers of XLA's FFI as capsules that jax.ffi registers.

#include <pybind11/pybind11.h>

#include "deltaops.h"
#include "xla_module.h"

PYBIND11_MODULE(_xla, m) {
  namespace py = pybind11;
  using namespace deltaops_bindings;
  m.doc() = "The CPU core (csrc/include/deltaops.h) as handlers of XLA's FFI.";
  Targets targets;
  add_delta_linear(&targets);
  add_adapters(&targets);
  add_elementwise(&targets);
  add_heads(&targets);
  py::dict capsules;
  for (const Target &target : targets)
    capsules[target.name] = py::capsule(target.handler, "xla._CUSTOM_CALL_TARGET");
  m.attr("TARGETS") = capsules;
  m.def("abi_version", &deltaops_abi_version);
}
