// cpu_module.cpp: deltaops._cpu, the C ABI of the CPU core as flat Python functions.
//
// Pointers are integers (0: absent), strides count elements, dtype is 0 (f32) or 1 (bf16). Nothing
// here looks at a tensor: a call is the conversion of its integers and one C call without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "deltaops.h"
#include "recycled.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

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

deltaops_matrix matrix(Address data, int64_t rows, int64_t cols, int64_t row_stride,
                       int64_t col_stride, int dtype) {
  return {reinterpret_cast<void *>(data), rows, cols, row_stride, col_stride, dtype, 0};
}

// A layer whose shapes, strides and settings are converted once; a call brings the addresses.
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

  // operands: the addresses a..., b..., branch_bias...
  Forward forward_of(int64_t M, Address x, int64_t ldx, Address w, Address bias, Address y,
                     Address s, const py::tuple &operands, uint64_t seed, int num_threads,
                     Address packed, int64_t packed_bytes) const {
    Forward call = {with(operands), {}};
    auto &args = call.args;
    args.struct_size = sizeof args;
    args.num_threads = num_threads;
    args.x = matrix(x, M, K_, ldx, 1, dtype_);
    args.weight = weight(w);
    args.bias = matrix(bias, 1, N_, N_, 1, dtype_);
    args.y = matrix(y, M, N_, N_, 1, dtype_);
    args.s = matrix(s, M, ranks_, ranks_, 1, DELTAOPS_F32);
    args.branches = call.branches.data();
    args.num_branches = static_cast<int32_t>(call.branches.size());
    args.seed = seed;
    args.packed_weight = reinterpret_cast<const void *>(packed);
    args.packed_bytes = packed_bytes;
    return call;
  }

  // operands as in forward; grads: the addresses of their gradients, contiguous and of their dtype.
  Backward backward_of(int64_t M, Address grad_y, int64_t ldg, Address x, int64_t ldx, Address w,
                       Address s, const py::tuple &operands, uint64_t seed, int num_threads,
                       Address grad_x, Address grad_bias, const py::tuple &grads, Address packed,
                       int64_t packed_bytes) const {
    Backward call = {with(operands), {}, {}};
    const Branches &branches = call.branches;
    const size_t count = branches.size();
    expect_addresses("grads", grads);
    std::vector<deltaops_matrix> &wanted = call.wanted;
    wanted.resize(3 * count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t R = branches[i].a.rows;
      const int type = branches[i].a.dtype;
      wanted[i] = matrix(address(grads, i), R, K_, K_, 1, type);
      wanted[count + i] = matrix(address(grads, count + i), N_, R, R, 1, type);
      wanted[2 * count + i] = matrix(address(grads, 2 * count + i), 1, R, R, 1, type);
    }
    auto &args = call.args;
    args.struct_size = sizeof args;
    args.num_threads = num_threads;
    args.grad_y = matrix(grad_y, M, N_, ldg, 1, dtype_);
    args.x = matrix(x, M, K_, ldx, 1, dtype_);
    args.weight = weight(w);
    args.s = matrix(s, M, ranks_, ranks_, 1, DELTAOPS_F32);
    args.branches = branches.data();
    args.num_branches = static_cast<int32_t>(count);
    args.seed = seed;
    args.grad_x = matrix(grad_x, M, K_, K_, 1, dtype_);
    args.grad_bias = matrix(grad_bias, 1, N_, N_, 1, dtype_);
    args.grad_a = wanted.data();
    args.grad_b = wanted.data() + count;
    args.grad_branch_bias = wanted.data() + 2 * count;
    args.packed_weight = reinterpret_cast<const void *>(packed);
    args.packed_bytes = packed_bytes;
    return call;
  }

 private:
  static Address address(const py::tuple &addresses, size_t i) {
    return addresses[i].cast<Address>();
  }

  deltaops_matrix weight(Address w) const {
    return matrix(w, N_, K_, w_row_stride_, w_col_stride_, dtype_);
  }

  void expect_addresses(const char *name, const py::tuple &given) const {
    if (given.size() != 3 * branches_.size())
      throw py::value_error("deltaops._cpu: " + std::string(name) +
                            " must be the addresses a..., b..., branch_bias... of " +
                            std::to_string(branches_.size()) + " branches, got " +
                            std::to_string(given.size()) + " addresses.");
  }

  Branches with(const py::tuple &operands) const {
    expect_addresses("operands", operands);
    Branches branches = branches_;
    const size_t count = branches.size();
    for (size_t i = 0; i < count; ++i) {
      branches[i].a.data = reinterpret_cast<void *>(address(operands, i));
      branches[i].b.data = reinterpret_cast<void *>(address(operands, count + i));
      branches[i].bias.data = reinterpret_cast<void *>(address(operands, 2 * count + i));
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
void run(const std::vector<const Call *> &calls, deltaops_status (*core)(const Args *, int32_t)) {
  std::vector<Args> layers;
  layers.reserve(calls.size());
  for (const Call *call : calls) layers.push_back(call->args);
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = core(layers.data(), static_cast<int32_t>(layers.size()));
  }
  raise_unless_ok(status);
}

void group_forward(const std::vector<const DeltaLinear::Forward *> &calls) {
  run(calls, deltaops_cpu_delta_linear_group_forward);
}

void group_backward(const std::vector<const DeltaLinear::Backward *> &calls) {
  run(calls, deltaops_cpu_delta_linear_group_backward);
}

// What makes a call's arguments, as a function that makes the call.
template <class Call, class Args, class... Given>
auto runs(Call (DeltaLinear::*call_of)(Given...) const, deltaops_status (*core)(const Args *)) {
  return [call_of, core](const DeltaLinear &layer, Given... given) {
    const Call call = (layer.*call_of)(given...);
    deltaops_status status;
    {
      py::gil_scoped_release release;
      status = core(&call.args);
    }
    raise_unless_ok(status);
  };
}

void dropout_mask(Address keep, int64_t M, int64_t K, uint64_t seed, uint32_t stream,
                  uint32_t drop_threshold) {
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_dropout_mask(reinterpret_cast<uint8_t *>(keep), M, K, seed, stream,
                                       drop_threshold);
  }
  raise_unless_ok(status);
}

float cross_entropy_forward(int dtype, int64_t M, int64_t V, Address logits, int64_t ld,
                            Address target, int64_t ignore_index, bool mean, Address state,
                            int num_threads) {
  float loss = 0.0f;
  deltaops_cross_entropy_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.logits = matrix(logits, M, V, ld, 1, dtype);
  args.target = reinterpret_cast<const int64_t *>(target);
  args.ignore_index = ignore_index;
  args.reduction = mean ? DELTAOPS_MEAN : DELTAOPS_SUM;
  args.state = matrix(state, M, 2, 2, 1, DELTAOPS_F32);
  args.loss = &loss;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_cross_entropy_forward(&args);
  }
  raise_unless_ok(status);
  return loss;
}

void cross_entropy_backward(int dtype, int64_t M, int64_t V, Address logits, int64_t ld,
                            Address target, int64_t ignore_index, bool mean, Address state,
                            float grad_loss, Address grad_logits, int num_threads) {
  deltaops_cross_entropy_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.logits = matrix(logits, M, V, ld, 1, dtype);
  args.target = reinterpret_cast<const int64_t *>(target);
  args.ignore_index = ignore_index;
  args.reduction = mean ? DELTAOPS_MEAN : DELTAOPS_SUM;
  args.state = matrix(state, M, 2, 2, 1, DELTAOPS_F32);
  args.grad_loss = &grad_loss;
  args.grad_logits = matrix(grad_logits, M, V, V, 1, dtype);
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_cross_entropy_backward(&args);
  }
  raise_unless_ok(status);
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
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status =
        deltaops_cpu_pack_weight(&weight, reinterpret_cast<void *>(packed), bytes, num_threads);
  }
  raise_unless_ok(status);
}

uint64_t fingerprint(Address w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                     int dtype) {
  const deltaops_matrix weight = matrix(w, rows, cols, row_stride, col_stride, dtype);
  uint64_t hash = 0;
  raise_unless_ok(deltaops_cpu_fingerprint(&weight, &hash));
  return hash;
}

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

// ---- bottleneck and norm_bias. Vectors and matrices of parameters, and their gradients, are
// contiguous: (address, dtype), 0 where absent.

using Parameter = std::pair<Address, int>;

deltaops_matrix contiguous(const Parameter &p, int64_t rows, int64_t cols) {
  return matrix(p.first, rows, cols, cols, 1, p.second);
}

void bottleneck_forward(int dtype, int64_t M, int64_t K, int64_t R, Address x, int64_t ldx,
                        Address residual, int64_t ld_residual, Parameter gamma, Parameter beta,
                        Parameter down, Parameter down_bias, Parameter up, Parameter up_bias,
                        Address y, Address h, Address stats, float scaling, float eps,
                        int activation, int norm, int num_threads) {
  deltaops_bottleneck_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.x = matrix(x, M, K, ldx, 1, dtype);
  args.residual = matrix(residual, M, K, ld_residual, 1, dtype);
  args.gamma = contiguous(gamma, 1, K);
  args.beta = contiguous(beta, 1, K);
  args.down = contiguous(down, R, K);
  args.down_bias = contiguous(down_bias, 1, R);
  args.up = contiguous(up, K, R);
  args.up_bias = contiguous(up_bias, 1, K);
  args.y = matrix(y, M, K, K, 1, dtype);
  args.h = matrix(h, M, R, R, 1, DELTAOPS_F32);
  args.stats = matrix(stats, M, 2, 2, 1, DELTAOPS_F32);
  args.scaling = scaling;
  args.eps = eps;
  args.activation = activation;
  args.norm = norm;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_bottleneck_forward(&args);
  }
  raise_unless_ok(status);
}

void bottleneck_backward(int dtype, int64_t M, int64_t K, int64_t R, Address grad_y, int64_t ldg,
                         Address x, int64_t ldx, Address h, Address stats, Parameter gamma,
                         Parameter beta, Parameter down, Parameter up, Address grad_x,
                         Parameter grad_gamma, Parameter grad_beta, Parameter grad_down,
                         Parameter grad_down_bias, Parameter grad_up, Parameter grad_up_bias,
                         float scaling, int activation, int norm, bool residual_is_x,
                         int num_threads) {
  deltaops_bottleneck_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.grad_y = matrix(grad_y, M, K, ldg, 1, dtype);
  args.x = matrix(x, M, K, ldx, 1, dtype);
  args.h = matrix(h, M, R, R, 1, DELTAOPS_F32);
  args.stats = matrix(stats, M, 2, 2, 1, DELTAOPS_F32);
  args.gamma = contiguous(gamma, 1, K);
  args.beta = contiguous(beta, 1, K);
  args.down = contiguous(down, R, K);
  args.up = contiguous(up, K, R);
  args.grad_x = matrix(grad_x, M, K, K, 1, dtype);
  args.grad_gamma = contiguous(grad_gamma, 1, K);
  args.grad_beta = contiguous(grad_beta, 1, K);
  args.grad_down = contiguous(grad_down, R, K);
  args.grad_down_bias = contiguous(grad_down_bias, 1, R);
  args.grad_up = contiguous(grad_up, K, R);
  args.grad_up_bias = contiguous(grad_up_bias, 1, K);
  args.scaling = scaling;
  args.activation = activation;
  args.norm = norm;
  args.residual_is_x = residual_is_x;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_bottleneck_backward(&args);
  }
  raise_unless_ok(status);
}

void norm_bias_forward(int dtype, int64_t M, int64_t K, Address x, int64_t ldx, Parameter gamma,
                       Parameter bias, Address y, Address stats, float eps, int norm,
                       int num_threads) {
  deltaops_norm_bias_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.x = matrix(x, M, K, ldx, 1, dtype);
  args.gamma = contiguous(gamma, 1, K);
  args.bias = contiguous(bias, 1, K);
  args.y = matrix(y, M, K, K, 1, dtype);
  args.stats = matrix(stats, M, 2, 2, 1, DELTAOPS_F32);
  args.eps = eps;
  args.norm = norm;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_norm_bias_forward(&args);
  }
  raise_unless_ok(status);
}

void norm_bias_backward(int dtype, int64_t M, int64_t K, Address grad_y, int64_t ldg, Address x,
                        int64_t ldx, Address stats, Parameter gamma, Address grad_x,
                        Parameter grad_gamma, Parameter grad_bias, int norm, int num_threads) {
  deltaops_norm_bias_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.grad_y = matrix(grad_y, M, K, ldg, 1, dtype);
  args.x = matrix(x, M, K, ldx, 1, dtype);
  args.stats = matrix(stats, M, 2, 2, 1, DELTAOPS_F32);
  args.gamma = contiguous(gamma, 1, K);
  args.grad_x = matrix(grad_x, M, K, K, 1, dtype);
  args.grad_gamma = contiguous(grad_gamma, 1, K);
  args.grad_bias = contiguous(grad_bias, 1, K);
  args.norm = norm;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_norm_bias_backward(&args);
  }
  raise_unless_ok(status);
}

// ---- gated

void gated_forward(int dtype, int64_t M, int64_t K, Address gate, int64_t ld_gate, Address up,
                   int64_t ld_up, Address y, int activation, int num_threads) {
  deltaops_gated_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.gate = matrix(gate, M, K, ld_gate, 1, dtype);
  args.up = matrix(up, M, K, ld_up, 1, dtype);
  args.y = matrix(y, M, K, K, 1, dtype);
  args.activation = activation;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_gated_forward(&args);
  }
  raise_unless_ok(status);
}

void gated_backward(int dtype, int64_t M, int64_t K, Address grad_y, int64_t ldg, Address gate,
                    int64_t ld_gate, Address up, int64_t ld_up, Address grad_gate, Address grad_up,
                    int activation, int num_threads) {
  deltaops_gated_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.grad_y = matrix(grad_y, M, K, ldg, 1, dtype);
  args.gate = matrix(gate, M, K, ld_gate, 1, dtype);
  args.up = matrix(up, M, K, ld_up, 1, dtype);
  args.grad_gate = matrix(grad_gate, M, K, K, 1, dtype);
  args.grad_up = matrix(grad_up, M, K, K, 1, dtype);
  args.activation = activation;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_gated_backward(&args);
  }
  raise_unless_ok(status);
}

// ---- rotary

void rotary(int dtype, const std::array<int64_t, 4> &sizes, Address x,
            const std::array<int64_t, 3> &x_strides, Address y,
            const std::array<int64_t, 3> &y_strides, int table_dtype, Address cos, Address sin,
            const std::array<int64_t, 2> &table_strides, bool backward, int num_threads) {
  deltaops_rotary_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  std::copy(sizes.begin(), sizes.end(), args.sizes);
  args.x = reinterpret_cast<const void *>(x);
  std::copy(x_strides.begin(), x_strides.end(), args.x_strides);
  args.y = reinterpret_cast<void *>(y);
  std::copy(y_strides.begin(), y_strides.end(), args.y_strides);
  args.cos = reinterpret_cast<const void *>(cos);
  args.sin = reinterpret_cast<const void *>(sin);
  std::copy(table_strides.begin(), table_strides.end(), args.table_strides);
  args.dtype = dtype;
  args.table_dtype = table_dtype;
  args.backward = backward;
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_rotary(&args);
  }
  raise_unless_ok(status);
}

// ---- attention

using Strides = std::array<int64_t, 3>;

deltaops_heads heads(Address data, const Strides &strides) {
  return {reinterpret_cast<void *>(data), {strides[0], strides[1], strides[2]}};
}

// What both directions take.
template <class Args>
Args attention_args(int dtype, const std::array<int64_t, 6> &sizes, Address q,
                    const Strides &q_strides, Address k, const Strides &k_strides, Address v,
                    const Strides &v_strides, Address mask,
                    const std::array<int64_t, 4> &mask_strides, Address y, const Strides &y_strides,
                    Address lse, float scale, bool causal, int num_threads) {
  Args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  std::copy(sizes.begin(), sizes.end(), args.sizes);
  args.q = heads(q, q_strides);
  args.k = heads(k, k_strides);
  args.v = heads(v, v_strides);
  args.mask = reinterpret_cast<const uint8_t *>(mask);
  std::copy(mask_strides.begin(), mask_strides.end(), args.mask_strides);
  args.y = heads(y, y_strides);
  args.lse = reinterpret_cast<float *>(lse);
  args.scale = scale;
  args.causal = causal;
  args.dtype = dtype;
  return args;
}

void attention_forward(int dtype, const std::array<int64_t, 6> &sizes, Address q,
                       const Strides &q_strides, Address k, const Strides &k_strides, Address v,
                       const Strides &v_strides, Address mask,
                       const std::array<int64_t, 4> &mask_strides, Address y,
                       const Strides &y_strides, Address lse, float scale, bool causal,
                       int num_threads) {
  const auto args = attention_args<deltaops_attention_forward_args>(
      dtype, sizes, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, y, y_strides, lse,
      scale, causal, num_threads);
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_attention_forward(&args);
  }
  raise_unless_ok(status);
}

void attention_backward(int dtype, const std::array<int64_t, 6> &sizes, Address grad_y,
                        const Strides &grad_y_strides, Address q, const Strides &q_strides,
                        Address k, const Strides &k_strides, Address v, const Strides &v_strides,
                        Address mask, const std::array<int64_t, 4> &mask_strides, Address y,
                        const Strides &y_strides, Address lse, Address grad_q,
                        const Strides &grad_q_strides, Address grad_k,
                        const Strides &grad_k_strides, Address grad_v,
                        const Strides &grad_v_strides, float scale, bool causal, int num_threads) {
  auto args = attention_args<deltaops_attention_backward_args>(
      dtype, sizes, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, y, y_strides, lse,
      scale, causal, num_threads);
  args.grad_y = heads(grad_y, grad_y_strides);
  args.grad_q = heads(grad_q, grad_q_strides);
  args.grad_k = heads(grad_k, grad_k_strides);
  args.grad_v = heads(grad_v, grad_v_strides);
  deltaops_status status;
  {
    py::gil_scoped_release release;
    status = deltaops_cpu_attention_backward(&args);
  }
  raise_unless_ok(status);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The native CPU core (csrc/include/deltaops.h): addresses in, statuses as exceptions.";
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
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  using deltaops_bindings::Recycler;
  m.def("recycled", &deltaops_bindings::recycled,
        "A DLPack capsule of a matrix [rows, cols]: memory of an earlier one where there is some.");
  m.def("recycle_limit", [](size_t bytes) { Recycler::instance().set_limit(bytes); });
  m.def("recycle_idle", [] { return Recycler::instance().idle_bytes(); });
  m.def("recycle_release", [] { Recycler::instance().release(); });
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack_weight);
  m.def("fingerprint", &fingerprint);
  m.def("fma_peak", &fma_peak, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        "GF/s that the multiply-add units reach with nothing else in the way.");
  m.def("dropout_mask", &dropout_mask, py::arg("keep_ptr"), py::arg("M"), py::arg("K"),
        py::arg("seed"), py::arg("stream"), py::arg("drop_threshold"));
  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &isas, "(name, whether this CPU runs it), slowest first.");
  m.def("set_isa",
        [](const std::string &name) { raise_unless_ok(deltaops_cpu_set_isa(name.c_str())); });
  m.def("abi_version", &deltaops_abi_version);
  m.def("bottleneck_forward", &bottleneck_forward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("R"), py::arg("x"), py::arg("ldx"), py::arg("residual"), py::arg("ld_residual"),
        py::arg("gamma"), py::arg("beta"), py::arg("down"), py::arg("down_bias"), py::arg("up"),
        py::arg("up_bias"), py::arg("y"), py::arg("h"), py::arg("stats"), py::arg("scaling"),
        py::arg("eps"), py::arg("activation"), py::arg("norm"), py::arg("num_threads"));
  m.def("bottleneck_backward", &bottleneck_backward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("R"), py::arg("grad_y"), py::arg("ldg"), py::arg("x"), py::arg("ldx"), py::arg("h"),
        py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("down"), py::arg("up"),
        py::arg("grad_x"), py::arg("grad_gamma"), py::arg("grad_beta"), py::arg("grad_down"),
        py::arg("grad_down_bias"), py::arg("grad_up"), py::arg("grad_up_bias"), py::arg("scaling"),
        py::arg("activation"), py::arg("norm"), py::arg("residual_is_x"), py::arg("num_threads"));
  m.def("norm_bias_forward", &norm_bias_forward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("x"), py::arg("ldx"), py::arg("gamma"), py::arg("bias"), py::arg("y"),
        py::arg("stats"), py::arg("eps"), py::arg("norm"), py::arg("num_threads"));
  m.def("norm_bias_backward", &norm_bias_backward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("grad_y"), py::arg("ldg"), py::arg("x"), py::arg("ldx"), py::arg("stats"),
        py::arg("gamma"), py::arg("grad_x"), py::arg("grad_gamma"), py::arg("grad_bias"),
        py::arg("norm"), py::arg("num_threads"));
  m.def("gated_forward", &gated_forward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("gate"), py::arg("ld_gate"), py::arg("up"), py::arg("ld_up"), py::arg("y"),
        py::arg("activation"), py::arg("num_threads"));
  m.def("gated_backward", &gated_backward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("grad_y"), py::arg("ldg"), py::arg("gate"), py::arg("ld_gate"), py::arg("up"),
        py::arg("ld_up"), py::arg("grad_gate"), py::arg("grad_up"), py::arg("activation"),
        py::arg("num_threads"));
  m.def("rotary", &rotary, py::arg("dtype"), py::arg("sizes"), py::arg("x"), py::arg("x_strides"),
        py::arg("y"), py::arg("y_strides"), py::arg("table_dtype"), py::arg("cos"), py::arg("sin"),
        py::arg("table_strides"), py::arg("backward"), py::arg("num_threads"));
  m.def("attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"), py::arg("q"),
        py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
        py::arg("v_strides"), py::arg("mask"), py::arg("mask_strides"), py::arg("y"),
        py::arg("y_strides"), py::arg("lse"), py::arg("scale"), py::arg("causal"),
        py::arg("num_threads"), "sizes: B, H, Hkv, Lq, Lk, D; mask and lse: 0 where absent.");
  m.def("attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("grad_y"), py::arg("grad_y_strides"), py::arg("q"), py::arg("q_strides"),
        py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("mask"),
        py::arg("mask_strides"), py::arg("y"), py::arg("y_strides"), py::arg("lse"),
        py::arg("grad_q"), py::arg("grad_q_strides"), py::arg("grad_k"), py::arg("grad_k_strides"),
        py::arg("grad_v"), py::arg("grad_v_strides"), py::arg("scale"), py::arg("causal"),
        py::arg("num_threads"), "Gradients of address 0 are not wanted.");
}
