// cpu_gated.cpp: gated.

#include "cpu_module.h"

namespace deltaops_bindings {

namespace {

void gated_forward(int dtype, int64_t M, int64_t K, Address gate, int64_t ld_gate, Address up,
                   int64_t ld_up, Address y, int activation, int num_threads) {
  deltaops_gated_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.gate = matrix(gate, M, K, ld_gate, 1, dtype);
  if (up) args.up = matrix(up, M, K, ld_up, 1, dtype);
  args.y = matrix(y, M, K, K, 1, dtype);
  args.activation = activation;
  run(deltaops_cpu_gated_forward, args);
}

void gated_backward(int dtype, int64_t M, int64_t K, Address grad_y, int64_t ldg, Address gate,
                    int64_t ld_gate, Address up, int64_t ld_up, Address grad_gate, Address grad_up,
                    int activation, int num_threads) {
  deltaops_gated_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = num_threads;
  args.grad_y = matrix(grad_y, M, K, ldg, 1, dtype);
  args.gate = matrix(gate, M, K, ld_gate, 1, dtype);
  if (up || grad_up) args.up = matrix(up, M, K, ld_up, 1, dtype);
  args.grad_gate = matrix(grad_gate, M, K, K, 1, dtype);
  args.grad_up = matrix(grad_up, M, K, K, 1, dtype);
  args.activation = activation;
  run(deltaops_cpu_gated_backward, args);
}

}  // namespace

void add_gated(py::module_ &m) {
  m.def("gated_forward", &gated_forward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("gate"), py::arg("ld_gate"), py::arg("up"), py::arg("ld_up"), py::arg("y"),
        py::arg("activation"), py::arg("num_threads"));
  m.def("gated_backward", &gated_backward, py::arg("dtype"), py::arg("M"), py::arg("K"),
        py::arg("grad_y"), py::arg("ldg"), py::arg("gate"), py::arg("ld_gate"), py::arg("up"),
        py::arg("ld_up"), py::arg("grad_gate"), py::arg("grad_up"), py::arg("activation"),
        py::arg("num_threads"));
}

}  // namespace deltaops_bindings
