// cpu_adapters.cpp: bottleneck and norm_bias.

#include "cpu_module.h"

#include <utility>

namespace deltaops_bindings {

namespace {

// Vectors and matrices of parameters, and their gradients, are contiguous: (address, dtype), 0
// where absent.
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
  run(deltaops_cpu_bottleneck_forward, args);
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
  run(deltaops_cpu_bottleneck_backward, args);
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
  run(deltaops_cpu_norm_bias_forward, args);
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
  run(deltaops_cpu_norm_bias_backward, args);
}

}  // namespace

void add_adapters(py::module_ &m) {
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
}

}  // namespace deltaops_bindings
