// xla_elementwise.cpp: gated, cross_entropy and the dropout stream for XLA's CPU client. Operands
// come in the order of the functions' comments, from
// deltaops/bindings/jax/{elementwise,draws}.py.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

// gate, up -> y
ffi::Error gated_forward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t activation,
                         int32_t num_threads) {
  Buffers buffers(args, rets);
  const View gate = buffers.operand(2), up = buffers.operand(2), y = buffers.result(2);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_gated_forward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.gate = item.matrix(gate);
    call.up = item.matrix(up);
    call.y = item.matrix(y);
    call.activation = activation;
    return deltaops_cpu_gated_forward(&call);
  });
}

// grad_y, gate, [up, where gate's gradient is wanted] -> the wanted ones of gate, up
ffi::Error gated_backward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t activation,
                          Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  buffers.expect(wanted.size() == 2, "gated: wanted must be two numbers.");
  if (!buffers.error().success()) return buffers.error();
  const View grad_y = buffers.operand(2), gate = buffers.operand(2);
  const View up = buffers.operand(2, wanted[0] != 0);
  const View grad_gate = buffers.result(2, wanted[0] != 0);
  const View grad_up = buffers.result(2, wanted[1] != 0);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_gated_backward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.grad_y = item.matrix(grad_y);
    call.gate = item.matrix(gate);
    call.up = item.matrix(up);
    call.grad_gate = item.matrix(grad_gate);
    call.grad_up = item.matrix(grad_up);
    call.activation = activation;
    return deltaops_cpu_gated_backward(&call);
  });
}

// Classes as the core takes them: JAX has int32 unless it is told otherwise.
std::vector<int64_t> classes(const Item &item, const View &target) {
  std::vector<int64_t> wide(static_cast<size_t>(target.elements));
  const void *from = item.pointer(target);
  if (target.width == 8)
    std::copy_n(static_cast<const int64_t *>(from), wide.size(), wide.begin());
  else
    std::copy_n(static_cast<const int32_t *>(from), wide.size(), wide.begin());
  if (wide.empty()) wide.push_back(0);  // null would say that they are absent
  return wide;
}

void expect_classes(Buffers *buffers, const View &logits, const View &target) {
  buffers->expect(!buffers->error().success() || (target.dtype == kBytes && target.width >= 4 &&
                                                  target.size(0) == logits.size(0)),
                  "cross_entropy: target must be int32 or int64, one class a row of logits.");
}

// logits, target -> loss, state
ffi::Error cross_entropy_forward(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                 int64_t ignore_index, int32_t reduction, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View logits = buffers.operand(2), target = buffers.operand(1);
  const View loss = buffers.result(0), state = buffers.result(2);
  expect_classes(&buffers, logits, target);
  return for_each_item(buffers, [&](const Item &item) {
    const std::vector<int64_t> wide = classes(item, target);
    deltaops_cross_entropy_forward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.logits = item.matrix(logits);
    call.target = wide.data();
    call.ignore_index = ignore_index;
    call.reduction = reduction;
    call.state = item.matrix(state);
    call.loss = static_cast<float *>(item.pointer(loss));
    return deltaops_cpu_cross_entropy_forward(&call);
  });
}

// grad_loss, logits, target, state -> the gradient of the logits
ffi::Error cross_entropy_backward(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                  int64_t ignore_index, int32_t reduction, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View grad_loss = buffers.operand(0), logits = buffers.operand(2);
  const View target = buffers.operand(1), state = buffers.operand(2);
  const View grad_logits = buffers.result(2);
  expect_classes(&buffers, logits, target);
  return for_each_item(buffers, [&](const Item &item) {
    const std::vector<int64_t> wide = classes(item, target);
    deltaops_cross_entropy_backward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.logits = item.matrix(logits);
    call.target = wide.data();
    call.ignore_index = ignore_index;
    call.reduction = reduction;
    call.state = item.matrix(state);
    call.grad_loss = static_cast<const float *>(item.pointer(grad_loss));
    call.grad_logits = item.matrix(grad_logits);
    return deltaops_cpu_cross_entropy_backward(&call);
  });
}

// seed [2] -> keep [M, K], a byte each
ffi::Error dropout_mask(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t branch,
                        int32_t threshold) {
  Buffers buffers(args, rets);
  const View seed = buffers.operand(1), keep = buffers.result(2);
  if (!buffers.error().success()) return buffers.error();
  buffers.expect(seed.width == 4 && seed.size(0) == 2 && keep.width == 1,
                 "dropout_mask: seed must be two words, and keep bytes.");
  return for_each_item(buffers, [&](const Item &item) {
    return deltaops_cpu_dropout_mask(
        static_cast<uint8_t *>(item.pointer(keep)), keep.size(0), keep.size(1), seed_of(item, seed),
        static_cast<uint32_t>(branch), static_cast<uint32_t>(threshold));
  });
}

}  // namespace

void add_elementwise(Targets *targets) {
  add<gated_forward>(targets, "gated_forward", "activation", "num_threads");
  add<gated_backward>(targets, "gated_backward", "activation", "wanted", "num_threads");
  add<cross_entropy_forward>(targets, "cross_entropy_forward", "ignore_index", "reduction",
                             "num_threads");
  add<cross_entropy_backward>(targets, "cross_entropy_backward", "ignore_index", "reduction",
                              "num_threads");
  add<dropout_mask>(targets, "dropout_mask", "branch", "threshold");
}

}  // namespace deltaops_bindings
