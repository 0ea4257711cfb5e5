// cpu_module.h: what the files of deltaops._cpu share. Each op family has one, which adds its
// functions to the module.

#ifndef DELTAOPS_BINDINGS_CPU_MODULE_H
#define DELTAOPS_BINDINGS_CPU_MODULE_H

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "deltaops.h"

namespace deltaops_bindings {

namespace py = pybind11;

using Address = uintptr_t;

// The status as Python's own exception, with the core's sentence.
void raise_unless_ok(deltaops_status status);

inline deltaops_matrix matrix(Address data, int64_t rows, int64_t cols, int64_t row_stride,
                              int64_t col_stride, int dtype) {
  return {reinterpret_cast<void *>(data), rows, cols, row_stride, col_stride, dtype, 0};
}

// The core's call, while other Python threads run.
template <class Function>
void without_gil(Function call) {
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  raise_unless_ok(status);
}

template <class Args>
void run(deltaops_status (*core)(const Args *), const Args &args) {
  without_gil([&] { return core(&args); });
}

void add_delta_linear(py::module_ &m);
void add_adapters(py::module_ &m);
void add_cross_entropy(py::module_ &m);
void add_gated(py::module_ &m);
void add_heads(py::module_ &m);

}  // namespace deltaops_bindings

#endif
