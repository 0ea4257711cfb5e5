// xla_attention.cpp: attention with a prefix for XLA's CPU client. Operands come in the order of
// the functions' comments, from deltaops/bindings/jax/attention.py.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

using Numbers = ffi::Span<const int32_t>;

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
  View q, k, v, prefix_k, prefix_v, mask;

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
    call->prefix_k = prefix_heads(item, prefix_k);
    call->prefix_v = prefix_heads(item, prefix_v);
    call->prefix_length = prefix_k.size(1);
    call->prefix_dtype = prefix_k.dtype;
    call->dtype = q.dtype;
    call->scale = scale;
    call->causal = causal;
    call->mask = static_cast<const uint8_t *>(item.pointer(mask));
    if (!mask) return;
    int64_t step = 1;
    for (size_t axis = 4; axis-- > 0;) {  // an axis of 1 is broadcast
      call->mask_strides[axis] = mask.size(axis) == 1 ? 0 : step;
      step *= mask.size(axis);
    }
  }
};

// q, k, v, prefix_k, prefix_v, [mask] -> y, lse
ffi::Error forward(ffi::RemainingArgs args, ffi::RemainingRets rets, bool masked, float scale,
                   bool causal, int32_t num_threads) {
  Buffers buffers(args, rets);
  const Operands operands = {buffers.operand(4), buffers.operand(4), buffers.operand(4),
                             buffers.operand(3), buffers.operand(3), buffers.operand(4, masked)};
  const View y = buffers.result(4), lse = buffers.result(3);
  return for_each_item(buffers, [&](const Item &item) {
    deltaops_attention_forward_args call = {};
    operands.fill(item, &call, scale, causal, num_threads);
    call.y = heads(item, y);
    call.lse = static_cast<float *>(item.pointer(lse));
    return deltaops_cpu_attention_forward(&call);
  });
}

// q, k, v, prefix_k, prefix_v, [mask], grad_y, y, lse -> the wanted ones of q, k, v, prefix_k,
// prefix_v
ffi::Error backward(ffi::RemainingArgs args, ffi::RemainingRets rets, bool masked, float scale,
                    bool causal, Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const Operands operands = {buffers.operand(4), buffers.operand(4), buffers.operand(4),
                             buffers.operand(3), buffers.operand(3), buffers.operand(4, masked)};
  const View grad_y = buffers.operand(4), y = buffers.operand(4), lse = buffers.operand(3);
  buffers.expect(wanted.size() == 5, "prefix_attention: wanted must be five numbers.");
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

XLA_FFI_DEFINE_HANDLER(forward_handler, Guarded<forward>::run,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<bool>("masked")
                           .Attr<float>("scale")
                           .Attr<bool>("causal")
                           .Attr<int32_t>("num_threads"));
XLA_FFI_DEFINE_HANDLER(backward_handler, Guarded<backward>::run,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<bool>("masked")
                           .Attr<float>("scale")
                           .Attr<bool>("causal")
                           .Attr<Numbers>("wanted")
                           .Attr<int32_t>("num_threads"));

}  // namespace

void add_attention(Targets *targets) {
  targets->push_back({"prefix_attention_forward", reinterpret_cast<void *>(forward_handler)});
  targets->push_back({"prefix_attention_backward", reinterpret_cast<void *>(backward_handler)});
}

}  // namespace deltaops_bindings
