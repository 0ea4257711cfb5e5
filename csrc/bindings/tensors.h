// tensors.h: torch's tensors as arguments, without torch's headers.
//
// Others (NumPy) pass tuples of numbers: (address, elements), (address, rows, stride).
//
// Attributes of a tensor cost a Python object each. Its type offers DLPack's C exchange table,
// which fills a struct instead; where torch has none, the attributes are read after all.

#ifndef DELTAOPS_BINDINGS_TENSORS_H
#define DELTAOPS_BINDINGS_TENSORS_H

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace deltaops_bindings {

namespace py = pybind11;

// Where a tensor's elements are; null for None.
struct Memory {
  uintptr_t data = 0;
  int64_t elements = 0;
};

// A matrix [rows, ...], and how far apart its rows are; null for None.
struct Rows {
  uintptr_t data = 0;
  int64_t rows = 0, stride = 0;
};

// Names torch.Tensor and torch.nn.Parameter.
void set_tensor_types(const py::type &tensor, const py::type &parameter);

// Whether `object` is a Tensor or a Parameter, and of no other class.
bool is_plain(py::handle object);

// Whether `out` was filled; false, without an exception, where it cannot be.
bool view(py::handle object, DLTensor *out);

Memory memory_of(py::handle object);
Rows rows_of(py::handle object);

}  // namespace deltaops_bindings

namespace pybind11::detail {

template <>
struct type_caster<deltaops_bindings::Memory> {
  PYBIND11_TYPE_CASTER(deltaops_bindings::Memory, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = deltaops_bindings::memory_of(source);
    return true;
  }
};

template <>
struct type_caster<deltaops_bindings::Rows> {
  PYBIND11_TYPE_CASTER(deltaops_bindings::Rows, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = deltaops_bindings::rows_of(source);
    return true;
  }
};

}  // namespace pybind11::detail

#endif
