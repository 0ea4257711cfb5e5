// cudaxla_products.cpp: the parts of delta_linear on a GPU (deltaops_cuda.h) for XLA's CUDA client,
// from deltaops/bindings/jax/on_cuda.py, which puts layers and gradients together from them.
//
// Workspaces are results that nobody reads, of the sizes that on_cuda.py asked this module for.

#include "cudaxla_module.h"

namespace deltaops_bindings {

namespace {

// The arguments of a launch where the handler runs, all else of them zero.
template <class Args>
Args arguments_on(const Gpu &gpu) {
  Args call = {};
  call.struct_size = sizeof call;
  call.device = gpu.device;
  call.stream = gpu.stream;
  return call;
}

// The same of one that needs a workspace.
template <class Args>
Args arguments_on(const Gpu &gpu, const Item &item, const View &workspace) {
  Args call = arguments_on<Args>(gpu);
  call.workspace = item.pointer(workspace);
  call.workspace_bytes = static_cast<uint64_t>(workspace.elements * workspace.width);
  return call;
}

// left [M, L_i]..., right [N, L_i]... or where they lie across [L_i, N]..., [bias [N]], [seed [2]]
// -> out [M, N]. Products are masked where their threshold is not 0, by the stream of their branch.
ffi::Error gemm(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, Numbers threshold,
                Numbers branch, int32_t across, int32_t biased, int32_t seeded) {
  Buffers buffers(args, rets);
  buffers.expect(threshold.size() == branch.size(),
                 "delta_linear: settings must be one a product.");
  const std::vector<View> left = buffers.operands(threshold.size(), 2);
  const std::vector<View> right = buffers.operands(threshold.size(), 2);
  const View bias = buffers.operand(1, biased != 0), seed = buffers.operand(1, seeded != 0);
  const View out = buffers.result(2);
  expect_seed(&buffers, seed);
  return for_each_item(
      buffers,
      [&](const Item &item) {
        std::vector<deltaops_cuda_product> products(left.size());
        for (size_t i = 0; i < products.size(); ++i)
          products[i] = {item.matrix(left[i]),
                         across ? item.transposed(right[i]) : item.matrix(right[i]),
                         static_cast<uint32_t>(threshold[i]), static_cast<uint32_t>(branch[i])};
        auto call = arguments_on<deltaops_cuda_gemm_args>(gpu);
        call.products = products.data();
        call.num_products = static_cast<int32_t>(products.size());
        call.bias = item.row(bias);
        call.out = item.matrix(out);
        call.seed = seed_on_gpu(item, seed);
        return deltaops_cuda_ampere_gemm(&call);
      },
      deltaops_cuda_last_error);
}

// x [M, K], a [R, K], [seed [2]] -> s [M, R] f32, the same in the dtype of x, workspace
ffi::Error project(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, float scaling,
                   int32_t threshold, int32_t branch) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(2), a = buffers.operand(2);
  const View seed = buffers.operand(1, threshold != 0);
  const View s = buffers.result(2), narrow = buffers.result(2), workspace = buffers.result(1);
  expect_seed(&buffers, seed);
  return for_each_item(
      buffers,
      [&](const Item &item) {
        auto call = arguments_on<deltaops_cuda_project_args>(gpu, item, workspace);
        call.x = item.matrix(x);
        call.a = item.matrix(a);
        call.s = item.matrix(s);
        call.s_narrow = item.matrix(narrow);
        call.scaling = scaling;
        call.drop_threshold = static_cast<uint32_t>(threshold);
        call.branch_stream = static_cast<uint32_t>(branch);
        call.seed = seed_on_gpu(item, seed);
        return deltaops_cuda_project(&call);
      },
      deltaops_cuda_last_error);
}

// grad_y [M, N], [b [N, R]], [s [M, R]] -> [grad_s [M, R]], [grad_b [N, R]], [grad_bias [N]],
// workspace. b is there where grad_s is wanted, s where grad_b is.
ffi::Error grad_up(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, Numbers wanted,
                   float scaling) {
  Buffers buffers(args, rets);
  buffers.expect(wanted.size() == 3, "delta_linear: wanted must be of grad_s, grad_b, grad_bias.");
  if (!buffers.error().success()) return buffers.error();
  const View grad_y = buffers.operand(2);
  const View b = buffers.operand(2, wanted[0] != 0), s = buffers.operand(2, wanted[1] != 0);
  const View grad_s = buffers.result(2, wanted[0] != 0), grad_b = buffers.result(2, wanted[1] != 0);
  const View grad_bias = buffers.result(1, wanted[2] != 0), workspace = buffers.result(1);
  return for_each_item(
      buffers,
      [&](const Item &item) {
        auto call = arguments_on<deltaops_cuda_grad_up_args>(gpu, item, workspace);
        call.grad_y = item.matrix(grad_y);
        call.b = item.matrix(b);
        call.s_narrow = item.matrix(s);
        call.grad_s_narrow = item.matrix(grad_s);
        call.grad_b = item.matrix(grad_b);
        call.grad_bias = item.row(grad_bias);
        call.scaling = scaling;
        return deltaops_cuda_grad_up(&call);
      },
      deltaops_cuda_last_error);
}

// grad_s [M, R], x [M, K], [seed [2]] -> grad_a [R, K], workspace
ffi::Error grad_down(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t threshold,
                     int32_t branch) {
  Buffers buffers(args, rets);
  const View grad_s = buffers.operand(2), x = buffers.operand(2);
  const View seed = buffers.operand(1, threshold != 0);
  const View grad_a = buffers.result(2), workspace = buffers.result(1);
  expect_seed(&buffers, seed);
  return for_each_item(
      buffers,
      [&](const Item &item) {
        auto call = arguments_on<deltaops_cuda_grad_down_args>(gpu, item, workspace);
        call.grad_s_narrow = item.matrix(grad_s);
        call.x = item.matrix(x);
        call.grad_a = item.matrix(grad_a);
        call.drop_threshold = static_cast<uint32_t>(threshold);
        call.branch_stream = static_cast<uint32_t>(branch);
        call.seed = seed_on_gpu(item, seed);
        return deltaops_cuda_grad_down(&call);
      },
      deltaops_cuda_last_error);
}

}  // namespace

void add_products(Targets *targets) {
  add_on_gpu<gemm>(targets, "gemm", "threshold", "branch", "across", "biased", "seeded");
  add_on_gpu<project>(targets, "project", "scaling", "threshold", "branch");
  add_on_gpu<grad_up>(targets, "grad_up", "wanted", "scaling");
  add_on_gpu<grad_down>(targets, "grad_down", "threshold", "branch");
}

}  // namespace deltaops_bindings
