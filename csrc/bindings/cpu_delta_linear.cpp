// cpu_delta_linear.cpp: delta_linear by layers and groups, its dropout and its packed weights.

#include "cpu_module.h"
#include "tensors.h"

#include <string>
#include <tuple>
#include <vector>

namespace deltaops_bindings {

namespace {

// A layer whose shapes, strides and settings are converted once; a call brings the tensors.
// Calls copy the branches before they write into them, so several threads may share one layer.
class DeltaLinear {
 public:
  // A branch: (a_row_stride, a_col_stride, b_row_stride, b_col_stride, R, dtype, scaling,
  // drop_threshold, activation); its stream is its number.
  using Branch = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, float, uint32_t, int>;

  DeltaLinear(int dtype, int64_t N, int64_t K, int64_t w_row_stride, int64_t w_col_stride,
              const std::vector<Branch> &branches)
      : dtype_(dtype), N_(N), K_(K), w_row_stride_(w_row_stride), w_col_stride_(w_col_stride) {
    branches_.reserve(branches.size());
    for (const auto &[a_row, a_col, b_row, b_col, R, type, scaling, threshold, activation] :
         branches) {
      const auto stream = static_cast<uint32_t>(branches_.size());
      branches_.push_back({matrix(0, R, K, a_row, a_col, type), matrix(0, N, R, b_row, b_col, type),
                           matrix(0, 1, R, R, 1, type), scaling, threshold, stream, activation});
      ranks_ += R;
    }
  }

  using Branches = std::vector<deltaops_branch>;

  // One call's arguments, and the memory that they point to.
  struct Forward {
    Branches branches;
    deltaops_delta_linear_forward_args args;
  };
  struct Backward {
    Branches branches;
    std::vector<deltaops_matrix> wanted;
    deltaops_delta_linear_backward_args args;
  };

  // operands: the tensors a..., b..., branch_bias...
  Forward forward_of(Rows x, Memory w, Memory bias, Memory y, Memory s, const py::handle &operands,
                     uint64_t seed, int num_threads, Memory packed, Memory adapter) const {
    Forward call = {with(operands), {}};
    auto &args = call.args;
    args.struct_size = sizeof args;
    args.num_threads = num_threads;
    args.x = matrix(x.data, x.rows, K_, x.stride, 1, dtype_);
    args.weight = weight(w.data);
    args.bias = matrix(bias.data, 1, N_, N_, 1, dtype_);
    args.y = matrix(y.data, x.rows, N_, N_, 1, dtype_);
    args.s = matrix(s.data, x.rows, ranks_, ranks_, 1, DELTAOPS_F32);
    args.branches = call.branches.data();
    args.num_branches = static_cast<int32_t>(call.branches.size());
    args.seed = seed;
    args.packed_weight = reinterpret_cast<const void *>(packed.data);
    args.packed_bytes = packed.elements;  // of one byte each
    args.adapter = ids(adapter, x.rows);
    return call;
  }

  // operands as in forward; grads: their gradients, contiguous and of their dtype.
  Backward backward_of(Rows grad_y, Rows x, Memory w, Memory s, const py::handle &operands,
                       uint64_t seed, int num_threads, Memory grad_x, Memory grad_bias,
                       const py::handle &grads, Memory packed, Memory adapter) const {
    Backward call = {with(operands), {}, {}};
    const Branches &branches = call.branches;
    const size_t count = branches.size();
    const Items wanted_tensors = items("grads", grads);
    std::vector<deltaops_matrix> &wanted = call.wanted;
    wanted.resize(3 * count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t R = branches[i].a.rows;
      const int type = branches[i].a.dtype;
      wanted[i] = matrix(wanted_tensors[i], R, K_, K_, 1, type);
      wanted[count + i] = matrix(wanted_tensors[count + i], N_, R, R, 1, type);
      wanted[2 * count + i] = matrix(wanted_tensors[2 * count + i], 1, R, R, 1, type);
    }
    auto &args = call.args;
    args.struct_size = sizeof args;
    args.num_threads = num_threads;
    const int64_t M = grad_y.rows;
    args.grad_y = matrix(grad_y.data, M, N_, grad_y.stride, 1, dtype_);
    args.x = matrix(x.data, M, K_, x.stride, 1, dtype_);
    args.weight = weight(w.data);
    args.s = matrix(s.data, M, ranks_, ranks_, 1, DELTAOPS_F32);
    args.branches = branches.data();
    args.num_branches = static_cast<int32_t>(count);
    args.seed = seed;
    args.grad_x = matrix(grad_x.data, M, K_, K_, 1, dtype_);
    args.grad_bias = matrix(grad_bias.data, 1, N_, N_, 1, dtype_);
    args.grad_a = wanted.data();
    args.grad_b = wanted.data() + count;
    args.grad_branch_bias = wanted.data() + 2 * count;
    args.packed_weight = reinterpret_cast<const void *>(packed.data);
    args.packed_bytes = packed.elements;  // of one byte each
    args.adapter = ids(adapter, M);
    return call;
  }

 private:
  // The addresses of three tensors a branch, each of which may be None.
  class Items {
   public:
    explicit Items(py::handle sequence)
        : list_(py::reinterpret_steal<py::object>(
              PySequence_Fast(sequence.ptr(), "deltaops._cpu: expected a sequence of tensors"))) {
      if (!list_) throw py::error_already_set();
    }
    size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(list_.ptr())); }
    Address operator[](size_t i) const {
      return memory_of(PySequence_Fast_GET_ITEM(list_.ptr(), static_cast<Py_ssize_t>(i))).data;
    }

   private:
    py::object list_;
  };

  deltaops_matrix weight(Address w) const {
    return matrix(w, N_, K_, w_row_stride_, w_col_stride_, dtype_);
  }

  // int32, one for each row, or none.
  static const int32_t *ids(Memory adapter, int64_t rows) {
    if (adapter.data != 0 && adapter.elements != rows)
      throw py::value_error("deltaops._cpu: adapter must have one number for each of " +
                            std::to_string(rows) + " rows, got " +
                            std::to_string(adapter.elements) + ".");
    return reinterpret_cast<const int32_t *>(adapter.data);
  }

  Items items(const char *name, const py::handle &given) const {
    Items found(given);
    if (found.size() != 3 * branches_.size())
      throw py::value_error("deltaops._cpu: " + std::string(name) +
                            " must be the tensors a..., b..., branch_bias... of " +
                            std::to_string(branches_.size()) + " branches, got " +
                            std::to_string(found.size()) + " of them.");
    return found;
  }

  Branches with(const py::handle &operands) const {
    const Items tensors = items("operands", operands);
    Branches branches = branches_;
    const size_t count = branches.size();
    for (size_t i = 0; i < count; ++i) {
      branches[i].a.data = reinterpret_cast<void *>(tensors[i]);
      branches[i].b.data = reinterpret_cast<void *>(tensors[count + i]);
      branches[i].bias.data = reinterpret_cast<void *>(tensors[2 * count + i]);
    }
    return branches;
  }

  int dtype_;
  int64_t N_, K_, w_row_stride_, w_col_stride_;
  int64_t ranks_ = 0;
  Branches branches_;
};

// Layers that share x, in one call; or one.
template <class Call, class Args>
void run_group(const std::vector<const Call *> &calls,
               deltaops_status (*core)(const Args *, int32_t)) {
  std::vector<Args> layers;
  layers.reserve(calls.size());
  for (const Call *call : calls) layers.push_back(call->args);
  without_gil([&] { return core(layers.data(), static_cast<int32_t>(layers.size())); });
}

void group_forward(const std::vector<const DeltaLinear::Forward *> &calls) {
  run_group(calls, deltaops_cpu_delta_linear_group_forward);
}

void group_backward(const std::vector<const DeltaLinear::Backward *> &calls) {
  run_group(calls, deltaops_cpu_delta_linear_group_backward);
}

// What makes a call's arguments, as a function that makes the call.
template <class Call, class Args, class... Given>
auto runs(Call (DeltaLinear::*call_of)(Given...) const, deltaops_status (*core)(const Args *)) {
  return [call_of, core](const DeltaLinear &layer, Given... given) {
    const Call call = (layer.*call_of)(given...);
    run(core, call.args);
  };
}

void dropout_mask(Address keep, int64_t M, int64_t K, uint64_t seed, uint32_t stream,
                  uint32_t drop_threshold) {
  without_gil([&] {
    return deltaops_cpu_dropout_mask(reinterpret_cast<uint8_t *>(keep), M, K, seed, stream,
                                     drop_threshold);
  });
}

int64_t packed_bytes(Address w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                     int dtype) {
  const deltaops_matrix weight = matrix(w, rows, cols, row_stride, col_stride, dtype);
  int64_t bytes = 0;
  raise_unless_ok(deltaops_cpu_packed_bytes(&weight, &bytes));
  return bytes;
}

void pack_weight(Address w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                 int dtype, Address packed, int64_t bytes, int num_threads) {
  const deltaops_matrix weight = matrix(w, rows, cols, row_stride, col_stride, dtype);
  without_gil([&] {
    return deltaops_cpu_pack_weight(&weight, reinterpret_cast<void *>(packed), bytes, num_threads);
  });
}

uint64_t fingerprint(Address w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                     int dtype) {
  const deltaops_matrix weight = matrix(w, rows, cols, row_stride, col_stride, dtype);
  uint64_t hash = 0;
  raise_unless_ok(deltaops_cpu_fingerprint(&weight, &hash));
  return hash;
}

}  // namespace

void add_delta_linear(py::module_ &m) {
  py::class_<DeltaLinear>(m, "DeltaLinear")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t,
                    const std::vector<DeltaLinear::Branch> &>())
      .def("forward", runs(&DeltaLinear::forward_of, deltaops_cpu_delta_linear_forward))
      .def("backward", runs(&DeltaLinear::backward_of, deltaops_cpu_delta_linear_backward))
      .def("forward_call", &DeltaLinear::forward_of)
      .def("backward_call", &DeltaLinear::backward_of);
  py::class_<DeltaLinear::Forward>(m, "DeltaLinearForward");
  py::class_<DeltaLinear::Backward>(m, "DeltaLinearBackward");
  m.def("delta_linear_group_forward", &group_forward);
  m.def("delta_linear_group_backward", &group_backward);
  m.def("dropout_mask", &dropout_mask, py::arg("keep_ptr"), py::arg("M"), py::arg("K"),
        py::arg("seed"), py::arg("stream"), py::arg("drop_threshold"));
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack_weight);
  m.def("fingerprint", &fingerprint);
}

}  // namespace deltaops_bindings
