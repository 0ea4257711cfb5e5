// cpu_tensors.cpp: what is read of tensors, and the signature of a delta_linear
// (deltaops/ops/plans.py).

#include "tensors.h"

#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "cpu_module.h"

namespace deltaops_bindings {

namespace {

// Set once, with the GIL, and kept alive: the types outlive the module anyway.
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
const DLPackExchange *exchange = nullptr;

const DLPackExchange *exchange_of(const py::type &tensor) {
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), kExchangeName)) return nullptr;
  const auto *header =
      static_cast<const DLPackExchangeHeader *>(PyCapsule_GetPointer(capsule.ptr(), kExchangeName));
  while (header != nullptr && header->major != 1) header = header->previous;
  const auto *table = reinterpret_cast<const DLPackExchange *>(header);
  return table != nullptr && table->view != nullptr ? table : nullptr;
}

uintptr_t address(const DLTensor &t) { return reinterpret_cast<uintptr_t>(t.data) + t.byte_offset; }

// Whether the elements are those in memory with their signs turned, of which DLPack says nothing.
bool is_negative(py::handle tensor) {
  static PyObject *const name = PyUnicode_InternFromString("is_neg");
  const py::object found =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

// The bytes of a signature, on the stack as long as they are few.
class Key {
 public:
  void add(int64_t value) { append(&value, sizeof value); }

  void add(double value) { append(&value, sizeof value); }

  // False where it is no plain tensor with memory of its own, and the signs of that memory.
  bool add_tensor(py::handle object) {
    DLTensor t;
    if (!is_plain(object) || is_negative(object) || !view(object, &t)) return false;
    add(static_cast<int64_t>(t.device.device_type) << 32 |
        static_cast<uint32_t>(t.device.device_id));
    add(static_cast<int64_t>(t.ndim) << 32 | t.dtype.code << 24 | t.dtype.bits << 16 |
        t.dtype.lanes);
    append(t.shape, sizeof(int64_t) * static_cast<size_t>(t.ndim));
    append(t.strides, sizeof(int64_t) * static_cast<size_t>(t.ndim));
    return true;
  }

  bool add_optional(py::handle object) {
    if (!object.is_none()) return add_tensor(object);
    add(int64_t{-1});  // no tensor starts with it
    return true;
  }

  // False where it is no text: the checks have words for that.
  bool add_text(py::handle text) {
    if (!PyUnicode_Check(text.ptr())) return false;
    Py_ssize_t size = 0;
    const char *data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    add(static_cast<int64_t>(size));
    append(data, static_cast<size_t>(size));
    return true;
  }

  py::bytes bytes() const {
    return used_ <= few_.size() ? py::bytes(few_.data(), used_) : py::bytes(many_);
  }

 private:
  void append(const void *data, size_t size) {
    if (used_ + size <= few_.size()) {
      std::memcpy(few_.data() + used_, data, size);
    } else {
      if (many_.empty()) many_.assign(few_.data(), used_);
      many_.append(static_cast<const char *>(data), size);
    }
    used_ += size;
  }

  std::array<char, 1024> few_;
  std::string many_;
  size_t used_ = 0;
};

double number(py::handle value) {
  const double found = PyFloat_AsDouble(value.ptr());
  if (found == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// (the signature, the branches' tensors a... b... bias...), or None where one has no view or a name
// is no text.
// branches: tuples (a, b, scaling, dropout, activation, bias).
py::object look(const py::object &x, const py::object &weight, const py::object &bias,
                const py::object &branches, const py::object &backend, bool strict) {
  Key key;
  if (!key.add_text(backend)) return py::none();
  key.add(int64_t{strict});
  if (!key.add_tensor(x) || !key.add_tensor(weight) || !key.add_optional(bias)) return py::none();
  const py::object list = py::reinterpret_steal<py::object>(
      PySequence_Fast(branches.ptr(), "branches must be a sequence"));
  if (!list) throw py::error_already_set();
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(list.ptr()));
  py::list operands(3 * count);
  for (size_t i = 0; i < count; ++i) {
    const py::handle branch = PySequence_Fast_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyTuple_Check(branch.ptr()) || PyTuple_GET_SIZE(branch.ptr()) != 6)
      throw py::type_error("delta_linear: branches must be deltaops.ops.Branch.");
    const auto part = [&](Py_ssize_t at) { return py::handle(PyTuple_GET_ITEM(branch.ptr(), at)); };
    if (!key.add_tensor(part(0)) || !key.add_tensor(part(1)) || !key.add_optional(part(5)))
      return py::none();
    key.add(number(part(2)));
    key.add(number(part(3)));
    if (!key.add_text(part(4))) return py::none();
    operands[i] = part(0);
    operands[count + i] = part(1);
    operands[2 * count + i] = part(5);
  }
  return py::make_tuple(key.bytes(), operands);
}

}  // namespace

void set_tensor_types(const py::type &tensor, const py::type &parameter) {
  tensor_type = reinterpret_cast<PyTypeObject *>(py::object(tensor).release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject *>(py::object(parameter).release().ptr());
  exchange = exchange_of(tensor);
}

bool is_plain(py::handle object) {
  const PyTypeObject *type = Py_TYPE(object.ptr());
  return type == tensor_type || type == parameter_type;
}

bool view(py::handle object, DLTensor *out) {
  if (exchange == nullptr) return false;
  if (exchange->view(object.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

Memory memory_of(py::handle object) {
  if (object.is_none()) return {};
  if (PyTuple_Check(object.ptr())) {
    const auto [data, elements] = object.cast<std::pair<uintptr_t, int64_t>>();
    return {data, elements};
  }
  DLTensor t;
  if (!view(object, &t))
    return {object.attr("data_ptr")().cast<uintptr_t>(), object.attr("numel")().cast<int64_t>()};
  int64_t elements = 1;
  for (int32_t i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  return {address(t), elements};
}

Rows rows_of(py::handle object) {
  if (object.is_none()) return {};
  if (PyTuple_Check(object.ptr())) {
    const auto [data, rows, stride] = object.cast<std::tuple<uintptr_t, int64_t, int64_t>>();
    return {data, rows, stride};
  }
  DLTensor t;
  if (view(object, &t) && t.ndim > 0) return {address(t), t.shape[0], t.strides[0]};
  return {object.attr("data_ptr")().cast<uintptr_t>(), object.attr("size")(0).cast<int64_t>(),
          object.attr("stride")(0).cast<int64_t>()};
}

void add_tensors(py::module_ &m) {
  m.def("set_tensor_types", &set_tensor_types);
  m.def("views", [] { return exchange != nullptr; }, "Whether look() can be used.");
  m.def("look", &look);
}

}  // namespace deltaops_bindings
