// xla_heads.cpp: rotary and attention, with a prefix and without, for XLA's CPU client. Operands
// come in the order of the functions' comments, from deltaops/bindings/jax/heads.py.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

// x (or the gradient of y), cos, sin -> y (or the gradient of x)
ffi::Error rotary(ffi::RemainingArgs args, ffi::RemainingRets rets, bool backward,
                  int32_t num_threads) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(4), cos = buffers.operand(3), sin = buffers.operand(3);
  const View y = buffers.result(4);
  if (!buffers.error().success()) return buffers.error();
  const auto alike = [](const View &one, const View &other, size_t axes) {
    for (size_t i = 0; i < axes; ++i)
      if (one.size(i) != other.size(i)) return false;
    return one.dtype == other.dtype;
  };
  const bool shared = cos.size(0) == 1;
  buffers.expect(alike(x, y, 4) && alike(cos, sin, 3) && (shared || cos.size(0) == x.size(0)) &&
                     cos.size(1) == x.size(2) && cos.size(2) == x.size(3),
                 "rotary: y must be as x, and cos and sin [B or 1, L, D].");
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_rotary_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    for (size_t i = 0; i < 4; ++i) call.sizes[i] = x.size(i);
    const int64_t token = x.size(3), head = token * x.size(2), batch = head * x.size(1);
    const int64_t strides[3] = {batch, head, token};
    std::copy(strides, strides + 3, call.x_strides);
    std::copy(strides, strides + 3, call.y_strides);
    call.x = item.pointer(x);
    call.y = item.pointer(y);
    call.cos = item.pointer(cos);
    call.sin = item.pointer(sin);
    call.table_strides[0] = shared ? 0 : head;
    call.table_strides[1] = token;
    call.dtype = x.dtype;
    call.table_dtype = cos.dtype;
    call.backward = backward;
    return deltaops_cpu_rotary(&call);
  });
}

// Heads [B, H, L, D], contiguous.
deltaops_heads heads(const Item &item, const View &v) {
  if (!v) return {};
  const int64_t token = v.size(3), head = token * v.size(2);
  return {item.pointer(v), {head * v.size(1), head, token}};
}

// Those of a prefix [H, P, D].
deltaops_heads prefix_heads(const Item &item, const View &v) {
  if (!v) return {};
  return {item.pointer(v), {0, v.size(1) * v.size(2), v.size(2)}};
}

struct Operands {
  View q, k, v, prefix_k, prefix_v, mask, bias;
  int64_t bias_from;

  static Operands next(Buffers *buffers, bool prefixed, bool masked, int64_t bias_from) {
    Operands found = {};
    for (View *one : {&found.q, &found.k, &found.v}) *one = buffers->operand(4);
    for (View *one : {&found.prefix_k, &found.prefix_v}) *one = buffers->operand(3, prefixed);
    found.mask = buffers->operand(4, masked);
    found.bias = buffers->operand(4, bias_from >= 0);
    found.bias_from = bias_from;
    return found;
  }

  // What both directions take.
  template <class Args>
  void fill(const Item &item, Args *call, float scale, bool causal, int32_t num_threads) const {
    call->struct_size = sizeof *call;
    call->num_threads = num_threads;
    const int64_t sizes[6] = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3)};
    std::copy(sizes, sizes + 6, call->sizes);
    call->q = heads(item, q);
    call->k = heads(item, k);
    call->v = heads(item, v);
    if (prefix_k) {
      call->prefix_k = prefix_heads(item, prefix_k);
      call->prefix_v = prefix_heads(item, prefix_v);
      call->prefix_length = prefix_k.size(1);
      call->prefix_dtype = prefix_k.dtype;
    }
    call->dtype = q.dtype;
    call->scale = scale;
    call->causal = causal;
    call->mask = static_cast<const uint8_t *>(item.pointer(mask));
    if (mask) broadcast(mask, call->mask_strides);
    call->bias = static_cast<const float *>(item.pointer(bias));
    if (!bias) return;
    call->bias_from = bias_from;
    broadcast(bias, call->bias_strides);
  }

  // Strides of a contiguous view whose axes of 1 are broadcast.
  static void broadcast(const View &v, int64_t *strides) {
    int64_t step = 1;
    for (size_t axis = 4; axis-- > 0;) {
      strides[axis] = v.size(axis) == 1 ? 0 : step;
      step *= v.size(axis);
    }
  }
};

// q, k, v, [prefix_k, prefix_v], [mask], [bias] -> y, lse; bias_from < 0: no bias
ffi::Error attention_forward(ffi::RemainingArgs args, ffi::RemainingRets rets, bool prefixed,
                             bool masked, int64_t bias_from, float scale, bool causal,
                             int32_t num_threads) {
  Buffers buffers(args, rets);
  const Operands operands = Operands::next(&buffers, prefixed, masked, bias_from);
  const View y = buffers.result(4), lse = buffers.result(3);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_attention_forward_args call = {};
    operands.fill(item, &call, scale, causal, num_threads);
    call.y = heads(item, y);
    call.lse = static_cast<float *>(item.pointer(lse));
    return deltaops_cpu_attention_forward(&call);
  });
}

// q, k, v, [prefix_k, prefix_v], [mask], [bias], grad_y, y, lse -> the wanted ones of q, k, v,
// prefix_k, prefix_v
ffi::Error attention_backward(ffi::RemainingArgs args, ffi::RemainingRets rets, bool prefixed,
                              bool masked, int64_t bias_from, float scale, bool causal,
                              Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const Operands operands = Operands::next(&buffers, prefixed, masked, bias_from);
  const View grad_y = buffers.operand(4), y = buffers.operand(4), lse = buffers.operand(3);
  buffers.expect(wanted.size() == 5, "attention: wanted must be five numbers.");
  if (!buffers.error().success()) return buffers.error();
  View grads[5];
  for (size_t i = 0; i < 5; ++i) grads[i] = buffers.result(i < 3 ? 4 : 3, wanted[i] != 0);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_attention_backward_args call = {};
    operands.fill(item, &call, scale, causal, num_threads);
    call.grad_y = heads(item, grad_y);
    call.y = heads(item, y);
    call.lse = static_cast<const float *>(item.pointer(lse));
    call.grad_q = heads(item, grads[0]);
    call.grad_k = heads(item, grads[1]);
    call.grad_v = heads(item, grads[2]);
    call.grad_prefix_k = prefix_heads(item, grads[3]);
    call.grad_prefix_v = prefix_heads(item, grads[4]);
    return deltaops_cpu_attention_backward(&call);
  });
}

}  // namespace

void add_heads(Targets *targets) {
  add<rotary>(targets, "rotary", "backward", "num_threads");
  add<attention_forward>(targets, "attention_forward", "prefixed", "masked", "bias_from", "scale",
                         "causal", "num_threads");
  add<attention_backward>(targets, "attention_backward", "prefixed", "masked", "bias_from", "scale",
                          "causal", "wanted", "num_threads");
}

}  // namespace deltaops_bindings
