// xla_adapters.cpp: bottleneck and norm_bias for XLA's CPU client. Operands come in the order of
// the functions' comments, from deltaops/bindings/jax/adapters.py.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

// Which operands and results there are, as bits of one attribute.
enum Present : int32_t {
  kX = 1,
  kResidual = 2,
  kGamma = 4,
  kBeta = 8,
  kDownBias = 16,
  kUpBias = 32,
  kState = 64
};

// x, [residual], [gamma], [beta], down, [down_bias], up, [up_bias] -> y, [h, stats with a norm]
ffi::Error bottleneck_forward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                              bool residual_is_x, float scaling, float eps, int32_t activation,
                              int32_t norm, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(2), residual = buffers.operand(2, present & kResidual);
  const View gamma = buffers.operand(1, present & kGamma);
  const View beta = buffers.operand(1, present & kBeta);
  const View down = buffers.operand(2), down_bias = buffers.operand(1, present & kDownBias);
  const View up = buffers.operand(2), up_bias = buffers.operand(1, present & kUpBias);
  const View y = buffers.result(2), h = buffers.result(2, present & kState);
  const View stats = buffers.result(2, (present & kState) && norm != DELTAOPS_NO_NORM);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_bottleneck_forward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.x = item.matrix(x);
    call.residual = residual_is_x ? call.x : item.matrix(residual);
    call.gamma = item.row(gamma);
    call.beta = item.row(beta);
    call.down = item.matrix(down);
    call.down_bias = item.row(down_bias);
    call.up = item.matrix(up);
    call.up_bias = item.row(up_bias);
    call.y = item.matrix(y);
    call.h = item.matrix(h);
    call.stats = item.matrix(stats);
    call.scaling = scaling;
    call.eps = eps;
    call.activation = activation;
    call.norm = norm;
    return deltaops_cpu_bottleneck_forward(&call);
  });
}

// grad_y, [x], h, [stats with a norm], [gamma], [beta], down, up -> the wanted ones of x, gamma,
// beta, down, down_bias, up, up_bias
ffi::Error bottleneck_backward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                               bool residual_is_x, float scaling, int32_t activation, int32_t norm,
                               Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View grad_y = buffers.operand(2), x = buffers.operand(2, present & kX);
  const View h = buffers.operand(2), stats = buffers.operand(2, norm != DELTAOPS_NO_NORM);
  const View gamma = buffers.operand(1, present & kGamma);
  const View beta = buffers.operand(1, present & kBeta);
  const View down = buffers.operand(2), up = buffers.operand(2);
  buffers.expect(wanted.size() == 7, "bottleneck: wanted must be seven numbers.");
  if (!buffers.error().success()) return buffers.error();
  constexpr size_t kAxes[7] = {2, 1, 1, 2, 1, 2, 1};
  View grads[7];
  for (size_t i = 0; i < 7; ++i) grads[i] = buffers.result(kAxes[i], wanted[i] != 0);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_bottleneck_backward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.grad_y = item.matrix(grad_y);
    call.x = item.matrix(x);
    call.h = item.matrix(h);
    call.stats = item.matrix(stats);
    call.gamma = item.row(gamma);
    call.beta = item.row(beta);
    call.down = item.matrix(down);
    call.up = item.matrix(up);
    call.grad_x = item.matrix(grads[0]);
    call.grad_gamma = item.row(grads[1]);
    call.grad_beta = item.row(grads[2]);
    call.grad_down = item.matrix(grads[3]);
    call.grad_down_bias = item.row(grads[4]);
    call.grad_up = item.matrix(grads[5]);
    call.grad_up_bias = item.row(grads[6]);
    call.scaling = scaling;
    call.activation = activation;
    call.norm = norm;
    call.residual_is_x = residual_is_x;
    return deltaops_cpu_bottleneck_backward(&call);
  });
}

// x, [gamma], [bias: beta's bit] -> y, [stats: with a norm]
ffi::Error norm_bias_forward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                             float eps, int32_t norm, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(2), gamma = buffers.operand(1, present & kGamma);
  const View bias = buffers.operand(1, present & kBeta);
  const View y = buffers.result(2);
  const View stats = buffers.result(2, (present & kState) && norm != DELTAOPS_NO_NORM);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_norm_bias_forward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.x = item.matrix(x);
    call.gamma = item.row(gamma);
    call.bias = item.row(bias);
    call.y = item.matrix(y);
    call.stats = item.matrix(stats);
    call.eps = eps;
    call.norm = norm;
    return deltaops_cpu_norm_bias_forward(&call);
  });
}

// grad_y, [x], [stats: with a norm], [gamma] -> the wanted ones of x, gamma, bias
ffi::Error norm_bias_backward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                              int32_t norm, Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View grad_y = buffers.operand(2), x = buffers.operand(2, present & kX);
  const View stats = buffers.operand(2, norm != DELTAOPS_NO_NORM);
  const View gamma = buffers.operand(1, present & kGamma);
  buffers.expect(wanted.size() == 3, "norm_bias: wanted must be three numbers.");
  if (!buffers.error().success()) return buffers.error();
  const View grad_x = buffers.result(2, wanted[0] != 0);
  const View grad_gamma = buffers.result(1, wanted[1] != 0);
  const View grad_bias = buffers.result(1, wanted[2] != 0);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_norm_bias_backward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.grad_y = item.matrix(grad_y);
    call.x = item.matrix(x);
    call.stats = item.matrix(stats);
    call.gamma = item.row(gamma);
    call.grad_x = item.matrix(grad_x);
    call.grad_gamma = item.row(grad_gamma);
    call.grad_bias = item.row(grad_bias);
    call.norm = norm;
    return deltaops_cpu_norm_bias_backward(&call);
  });
}

}  // namespace

void add_adapters(Targets *targets) {
  add<bottleneck_forward>(targets, "bottleneck_forward", "present", "residual_is_x", "scaling",
                          "eps", "activation", "norm", "num_threads");
  add<bottleneck_backward>(targets, "bottleneck_backward", "present", "residual_is_x", "scaling",
                           "activation", "norm", "wanted", "num_threads");
  add<norm_bias_forward>(targets, "norm_bias_forward", "present", "eps", "norm", "num_threads");
  add<norm_bias_backward>(targets, "norm_bias_backward", "present", "norm", "wanted",
                          "num_threads");
}

}  // namespace deltaops_bindings
