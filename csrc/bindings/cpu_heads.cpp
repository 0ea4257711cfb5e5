// cpu_heads.cpp: rotary and attention, whose tensors are [B, H, L, D] of any strides.

#include "cpu_module.h"

#include <algorithm>
#include <array>

namespace deltaops_bindings {

namespace {

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
  run(deltaops_cpu_rotary, args);
}

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

// Keys and values of a prefix, or their gradients: address and strides of the head and the token.
using PrefixStrides = std::array<int64_t, 2>;

// Strides of all four axes.
using PairStrides = std::array<int64_t, 4>;

template <class Args>
void add_bias(Args *args, Address bias, const PairStrides &strides, int64_t from) {
  args->bias = reinterpret_cast<const float *>(bias);
  args->bias_from = from;
  std::copy(strides.begin(), strides.end(), args->bias_strides);
}

deltaops_heads prefix_heads(Address data, const PrefixStrides &strides) {
  return {reinterpret_cast<void *>(data), {0, strides[0], strides[1]}};
}

// What both directions take besides where there is a prefix.
template <class Args>
void add_prefix(Args *args, int dtype, int64_t length, Address k, const PrefixStrides &k_strides,
                Address v, const PrefixStrides &v_strides) {
  args->prefix_dtype = dtype;
  args->prefix_length = length;
  args->prefix_k = prefix_heads(k, k_strides);
  args->prefix_v = prefix_heads(v, v_strides);
}

// Angles that q and k are turned by; cos 0: they are not.
struct Tables {
  Tables(int dtype, Address cos, Address sin, const std::array<int64_t, 2> &strides)
      : given(cos != 0) {
    all.cos = reinterpret_cast<const void *>(cos);
    all.sin = reinterpret_cast<const void *>(sin);
    std::copy(strides.begin(), strides.end(), all.strides);
    all.dtype = dtype;
  }
  bool given;
  deltaops_rotary_tables all = {};
};

void attention_forward(int dtype, const std::array<int64_t, 6> &sizes, Address q,
                       const Strides &q_strides, Address k, const Strides &k_strides, Address v,
                       const Strides &v_strides, Address mask,
                       const std::array<int64_t, 4> &mask_strides, Address y,
                       const Strides &y_strides, Address lse, float scale, bool causal,
                       int num_threads, int prefix_dtype, int64_t prefix_length, Address prefix_k,
                       const PrefixStrides &prefix_k_strides, Address prefix_v,
                       const PrefixStrides &prefix_v_strides, Address bias,
                       const PairStrides &bias_strides, int64_t bias_from, int table_dtype,
                       Address cos, Address sin, const std::array<int64_t, 2> &table_strides) {
  auto args = attention_args<deltaops_attention_forward_args>(
      dtype, sizes, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, y, y_strides, lse,
      scale, causal, num_threads);
  add_prefix(&args, prefix_dtype, prefix_length, prefix_k, prefix_k_strides, prefix_v,
             prefix_v_strides);
  add_bias(&args, bias, bias_strides, bias_from);
  const Tables tables(table_dtype, cos, sin, table_strides);
  if (!tables.given) return run(deltaops_cpu_attention_forward, args);
  without_gil([&] { return deltaops_cpu_rotary_attention_forward(&args, &tables.all); });
}

void attention_backward(
    int dtype, const std::array<int64_t, 6> &sizes, Address grad_y, const Strides &grad_y_strides,
    Address q, const Strides &q_strides, Address k, const Strides &k_strides, Address v,
    const Strides &v_strides, Address mask, const std::array<int64_t, 4> &mask_strides, Address y,
    const Strides &y_strides, Address lse, Address grad_q, const Strides &grad_q_strides,
    Address grad_k, const Strides &grad_k_strides, Address grad_v, const Strides &grad_v_strides,
    float scale, bool causal, int num_threads, int prefix_dtype, int64_t prefix_length,
    Address prefix_k, const PrefixStrides &prefix_k_strides, Address prefix_v,
    const PrefixStrides &prefix_v_strides, Address grad_prefix_k, Address grad_prefix_v,
    Address bias, const PairStrides &bias_strides, int64_t bias_from, int table_dtype, Address cos,
    Address sin, const std::array<int64_t, 2> &table_strides) {
  auto args = attention_args<deltaops_attention_backward_args>(
      dtype, sizes, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, y, y_strides, lse,
      scale, causal, num_threads);
  args.grad_y = heads(grad_y, grad_y_strides);
  args.grad_q = heads(grad_q, grad_q_strides);
  args.grad_k = heads(grad_k, grad_k_strides);
  args.grad_v = heads(grad_v, grad_v_strides);
  add_prefix(&args, prefix_dtype, prefix_length, prefix_k, prefix_k_strides, prefix_v,
             prefix_v_strides);
  const PrefixStrides dense = {prefix_length * sizes[5], sizes[5]};
  args.grad_prefix_k = prefix_heads(grad_prefix_k, dense);
  args.grad_prefix_v = prefix_heads(grad_prefix_v, dense);
  add_bias(&args, bias, bias_strides, bias_from);
  const Tables tables(table_dtype, cos, sin, table_strides);
  if (!tables.given) return run(deltaops_cpu_attention_backward, args);
  without_gil([&] { return deltaops_cpu_rotary_attention_backward(&args, &tables.all); });
}

}  // namespace

void add_heads(py::module_ &m) {
  m.def("rotary", &rotary, py::arg("dtype"), py::arg("sizes"), py::arg("x"), py::arg("x_strides"),
        py::arg("y"), py::arg("y_strides"), py::arg("table_dtype"), py::arg("cos"), py::arg("sin"),
        py::arg("table_strides"), py::arg("backward"), py::arg("num_threads"));
  m.def("attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"), py::arg("q"),
        py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
        py::arg("v_strides"), py::arg("mask"), py::arg("mask_strides"), py::arg("y"),
        py::arg("y_strides"), py::arg("lse"), py::arg("scale"), py::arg("causal"),
        py::arg("num_threads"), py::arg("prefix_dtype") = 0, py::arg("prefix_length") = 0,
        py::arg("prefix_k") = 0, py::arg("prefix_k_strides") = PrefixStrides{},
        py::arg("prefix_v") = 0, py::arg("prefix_v_strides") = PrefixStrides{}, py::arg("bias") = 0,
        py::arg("bias_strides") = PairStrides{}, py::arg("bias_from") = 0,
        py::arg("table_dtype") = 0, py::arg("cos") = 0, py::arg("sin") = 0,
        py::arg("table_strides") = std::array<int64_t, 2>{},
        "sizes: B, H, Hkv, Lq, Lk, D; mask and lse: 0 where absent.");
  m.def("attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("grad_y"), py::arg("grad_y_strides"), py::arg("q"), py::arg("q_strides"),
        py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("mask"),
        py::arg("mask_strides"), py::arg("y"), py::arg("y_strides"), py::arg("lse"),
        py::arg("grad_q"), py::arg("grad_q_strides"), py::arg("grad_k"), py::arg("grad_k_strides"),
        py::arg("grad_v"), py::arg("grad_v_strides"), py::arg("scale"), py::arg("causal"),
        py::arg("num_threads"), py::arg("prefix_dtype") = 0, py::arg("prefix_length") = 0,
        py::arg("prefix_k") = 0, py::arg("prefix_k_strides") = PrefixStrides{},
        py::arg("prefix_v") = 0, py::arg("prefix_v_strides") = PrefixStrides{},
        py::arg("grad_prefix_k") = 0, py::arg("grad_prefix_v") = 0, py::arg("bias") = 0,
        py::arg("bias_strides") = PairStrides{}, py::arg("bias_from") = 0,
        py::arg("table_dtype") = 0, py::arg("cos") = 0, py::arg("sin") = 0,
        py::arg("table_strides") = std::array<int64_t, 2>{},
        "Gradients of address 0 are not wanted; those of a prefix are contiguous.");
}

}  // namespace deltaops_bindings
