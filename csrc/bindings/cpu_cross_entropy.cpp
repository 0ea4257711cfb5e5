// cpu_cross_entropy.cpp: cross_entropy.

#include "cpu_module.h"

namespace deltaops_bindings {

namespace {

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
  run(deltaops_cpu_cross_entropy_forward, args);
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
  run(deltaops_cpu_cross_entropy_backward, args);
}

}  // namespace

void add_cross_entropy(py::module_ &m) {
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace deltaops_bindings
