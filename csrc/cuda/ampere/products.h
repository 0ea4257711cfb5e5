/* products.h: what the launchers ask of products, and how the kernels are told of them. */
#ifndef DELTAOPS_CUDA_AMPERE_PRODUCTS_H
#define DELTAOPS_CUDA_AMPERE_PRODUCTS_H

#include <stdio.h>

#include "ampere/gemm.h"
#include "ampere/host.h"

namespace deltaops::ampere {

static_assert(kMaxSegments == DELTAOPS_CUDA_MAX_PRODUCTS, "the C ABI says the same");

/* How the right matrices lie; one way must hold for all of them. */
struct Layout {
  bool inner = true;  /* contracted elements side by side */
  bool across = true; /* columns of out side by side */

  void see(const deltaops_matrix &right) {
    inner = inner && (right.col_stride == 1 || right.cols <= 1);
    across = across && (right.row_stride == 1 || right.rows <= 1);
  }
};

inline deltaops_status check_product(const char *who, const deltaops_cuda_product &product,
                                     int32_t number, const deltaops_cuda_gemm_args &args) {
  char name[32];
  const auto named = [&](const char *side) {
    snprintf(name, sizeof name, "%s of product %d", side, number);
    return name;
  };
  const deltaops_matrix &left = product.left, &right = product.right, &out = args.out;
  deltaops_status status = check_rows(who, named("left"), left, out.rows, left.cols, out.dtype);
  if (status == DELTAOPS_OK)
    status = check_shape(who, named("right"), right, out.cols, left.cols, out.dtype);
  if (status == DELTAOPS_OK) status = check_draws(who, product.drop_threshold, args.seed);
  return status;
}

/* DELTAOPS_OK where they are as the C ABI has them; looks at how the right matrices lie. */
inline deltaops_status check_products(const char *who, const deltaops_cuda_gemm_args &args,
                                      Layout *layout) {
  if (args.multiprocessors != 0)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: runs on all multiprocessors, which 0 says, got %d; use hopper_gemm", who,
                     args.multiprocessors);
  if (!is_half(args.out.dtype))
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: dtype must be bf16 (1) or f16 (2), got %d", who,
                     args.out.dtype);
  if (args.num_products < 0 || args.num_products > kMaxSegments ||
      (args.num_products > 0 && args.products == nullptr))
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: takes 0 to %d products, got %d at %p", who,
                     kMaxSegments, args.num_products, static_cast<const void *>(args.products));
  deltaops_status status =
      check_rows(who, "out", args.out, args.out.rows, args.out.cols, args.out.dtype);
  if (status != DELTAOPS_OK) return status;
  if (args.bias.data != nullptr) {
    status = check_rows(who, "bias", args.bias, 1, args.out.cols, args.out.dtype);
    if (status != DELTAOPS_OK) return status;
  }
  for (int32_t i = 0; i < args.num_products; ++i) {
    status = check_product(who, args.products[i], i, args);
    if (status != DELTAOPS_OK) return status;
    layout->see(args.products[i].right);
  }
  if (!layout->inner && !layout->across)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: the right matrices must all have col_stride 1, or all row_stride 1; pass "
                     "contiguous tensors or use triton",
                     who);
  return DELTAOPS_OK;
}

/* `across`: the right matrices are read as transposed views. Empty products are left out. */
inline GemmArguments arguments_of(const deltaops_cuda_gemm_args &args, bool across) {
  GemmArguments g = {};
  for (int32_t i = 0; i < args.num_products; ++i) {
    const deltaops_cuda_product &product = args.products[i];
    if (product.left.cols == 0) continue;
    Segment &segment = g.segments[g.count++];
    segment.left = rows_of(product.left);
    segment.right = across ? columns_of(product.right) : rows_of(product.right);
    segment.mask = {args.seed, product.branch_stream, product.drop_threshold};
  }
  g.bias = args.bias.data;
  g.out = args.out.data;
  g.rows = args.out.rows;
  g.columns = static_cast<int32_t>(args.out.cols);
  g.out_stride = args.out.row_stride;
  g.out_aligned = starts_on_16_bytes(args.out.data, args.out.row_stride);
  return g;
}

}  // namespace deltaops::ampere
#endif
