// cudaxla_module.cpp: deltaops._xla_cuda, the CUDA library (csrc/include/deltaops_cuda.h) as
// handlers of XLA's FFI in capsules that jax.ffi registers for "CUDA".

#include <pybind11/pybind11.h>

#include "cudaxla_module.h"

PYBIND11_MODULE(_xla_cuda, m) {
  namespace py = pybind11;
  using namespace deltaops_bindings;
  m.doc() = "The CUDA library (csrc/include/deltaops_cuda.h) as handlers of XLA's FFI.";
  if (deltaops_cuda_abi_version() != DELTAOPS_CUDA_ABI_VERSION)
    throw py::import_error(
        "deltaops._xla_cuda and libdeltaops_cuda.so must be of one build. "
        "Rebuild deltaops.");
  Targets targets;
  add_dropout(&targets);
  add_products(&targets);
  py::dict capsules;
  for (const Target &target : targets)
    capsules[target.name] = py::capsule(target.handler, "xla._CUSTOM_CALL_TARGET");
  m.attr("TARGETS") = capsules;
  // bytes that a part wants as its workspace
  m.def("project_workspace", &deltaops_cuda_project_workspace);
  m.def("grad_up_workspace", &deltaops_cuda_grad_up_workspace);
  m.def("grad_down_workspace", &deltaops_cuda_grad_down_workspace);
}
