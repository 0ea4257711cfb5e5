// cudaxla_dropout.cpp: csrc/cuda/dropout.cu for XLA's CUDA client, from
// deltaops/bindings/jax/draws.py. XLA aligns buffers to more than the 8 bytes that a seed, read
// as one number when the kernel runs, needs.

#include "cudaxla_module.h"

namespace deltaops_bindings {

namespace {

// seed [2] -> keep [M, K], a byte each
ffi::Error mask(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t branch,
                int32_t threshold) {
  Buffers buffers(args, rets);
  const View seed = buffers.operand(1), keep = buffers.result(2);
  expect_seed(&buffers, seed);
  buffers.expect(keep.width == 1, "dropout_mask: keep must be bytes.");
  return for_each_item(
      buffers,
      [&](const Item &item) {
        return deltaops_cuda_dropout_mask(gpu.device, static_cast<uint8_t *>(item.pointer(keep)),
                                          keep.size(1), keep.size(0), keep.size(1),
                                          seed_on_gpu(item, seed), static_cast<uint32_t>(branch),
                                          static_cast<uint32_t>(threshold), gpu.stream);
      },
      deltaops_cuda_last_error);
}

// x [M, K], seed [2] -> y [M, K]
ffi::Error apply(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t branch,
                 int32_t threshold) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(2), seed = buffers.operand(1), y = buffers.result(2);
  expect_seed(&buffers, seed);
  return for_each_item(
      buffers,
      [&](const Item &item) {
        const deltaops_matrix from = item.matrix(x), to = item.matrix(y);
        return deltaops_cuda_dropout_apply(gpu.device, &from, &to, seed_on_gpu(item, seed),
                                           static_cast<uint32_t>(branch),
                                           static_cast<uint32_t>(threshold), gpu.stream);
      },
      deltaops_cuda_last_error);
}

}  // namespace

void add_dropout(Targets *targets) {
  add_on_gpu<mask>(targets, "dropout_mask", "branch", "threshold");
  add_on_gpu<apply>(targets, "dropout", "branch", "threshold");
}

}  // namespace deltaops_bindings
