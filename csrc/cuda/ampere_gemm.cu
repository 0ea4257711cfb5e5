/* ampere_gemm.cu: launches the products of ampere/gemm.h, and of at most 16 rows those of
 * ampere/gemv.h. */
#include "ampere/gemm.h"

#include <stdio.h>

#include "ampere/gemv.h"
#include "ampere/host.h"

namespace deltaops::ampere {
namespace {

constexpr const char *kWho = "ampere_gemm";
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

deltaops_status check_product(const deltaops_cuda_product &product, int32_t number,
                              const deltaops_cuda_gemm_args &args) {
  char name[32];
  const auto named = [&](const char *side) {
    snprintf(name, sizeof name, "%s of product %d", side, number);
    return name;
  };
  const deltaops_matrix &left = product.left, &right = product.right, &out = args.out;
  deltaops_status status = check_rows(kWho, named("left"), left, out.rows, left.cols, out.dtype);
  if (status == DELTAOPS_OK)
    status = check_shape(kWho, named("right"), right, out.cols, left.cols, out.dtype);
  if (status == DELTAOPS_OK) status = check_draws(kWho, product.drop_threshold, args.seed);
  return status;
}

deltaops_status check(const deltaops_cuda_gemm_args &args, Layout *layout) {
  if (!is_half(args.out.dtype))
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: dtype must be bf16 (1) or f16 (2), got %d", kWho,
                     args.out.dtype);
  if (args.num_products < 0 || args.num_products > kMaxSegments ||
      (args.num_products > 0 && args.products == nullptr))
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: takes 0 to %d products, got %d at %p", kWho,
                     kMaxSegments, args.num_products, static_cast<const void *>(args.products));
  deltaops_status status =
      check_rows(kWho, "out", args.out, args.out.rows, args.out.cols, args.out.dtype);
  if (status != DELTAOPS_OK) return status;
  if (args.bias.data != nullptr) {
    status = check_rows(kWho, "bias", args.bias, 1, args.out.cols, args.out.dtype);
    if (status != DELTAOPS_OK) return status;
  }
  for (int32_t i = 0; i < args.num_products; ++i) {
    status = check_product(args.products[i], i, args);
    if (status != DELTAOPS_OK) return status;
    layout->see(args.products[i].right);
  }
  if (!layout->inner && !layout->across)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: the right matrices must all have col_stride 1, or all row_stride 1; pass "
                     "contiguous tensors or use triton",
                     kWho);
  return DELTAOPS_OK;
}

/* Which kernel a call takes. */
struct Plan {
  bool few;    /* rows: gemv.h */
  bool across; /* how right matrices lie */
  int masked;  /* products */
};

template <typename T>
deltaops_status run(const GemmArguments &g, const Plan &plan, int64_t blocks, void *stream) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if (plan.few)
    return launch("launching ampere_gemm for few rows", gemv_kernel<T>, g, grid, kGemvThreads,
                  kGemvShared, stream);
  auto *kernel = plan.masked   ? gemm_kernel<T, true, true>
                 : plan.across ? gemm_kernel<T, true, false>
                               : gemm_kernel<T, false, false>;
  return launch("launching ampere_gemm", kernel, g, grid,
                plan.masked ? kGemmThreads<true> : kGemmThreads<false>, gemm_shared(plan.masked),
                stream);
}

}  // namespace
}  // namespace deltaops::ampere

using namespace deltaops;
using namespace deltaops::ampere;

extern "C" deltaops_status deltaops_cuda_ampere_gemm(const deltaops_cuda_gemm_args *args) {
  if (args == nullptr || args->struct_size != sizeof *args)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: args must be a deltaops_cuda_gemm_args with struct_size = %zu; were "
                     "caller and library compiled from the same deltaops_cuda.h?",
                     kWho, sizeof *args);
  Layout layout;
  const deltaops_status status = check(*args, &layout);
  if (status != DELTAOPS_OK) return status;
  const deltaops_matrix &out = args->out;
  if (out.rows == 0 || out.cols == 0) return DELTAOPS_OK;
  Plan plan = {out.rows <= kGemvRows && layout.inner, layout.across, 0};
  for (int32_t i = 0; i < args->num_products; ++i)
    plan.masked += args->products[i].left.cols > 0 && args->products[i].drop_threshold > 0;
  plan.few = plan.few && plan.masked == 0;
  plan.across = plan.across && !plan.few;
  const int64_t down = plan.few ? 1 : (out.rows + kTileRows - 1) / kTileRows;
  const int64_t width = plan.few ? kGemvColumns : kTileColumns;
  const int64_t sideways = (out.cols + width - 1) / width;
  if (down > INT32_MAX / sideways)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: out must have fewer than 2^31 tiles of %d x %d, got [%lld, %lld]", kWho,
                     kTileRows, kTileColumns, static_cast<long long>(out.rows),
                     static_cast<long long>(out.cols));
  GemmArguments g = {};
  for (int32_t i = 0; i < args->num_products; ++i) {
    const deltaops_cuda_product &product = args->products[i];
    if (product.left.cols == 0) continue;
    Segment &segment = g.segments[g.count++];
    segment.left = rows_of(product.left);
    segment.right = plan.across ? columns_of(product.right) : rows_of(product.right);
    segment.mask = {args->seed, product.branch_stream, product.drop_threshold};
  }
  if (plan.masked > kMaxMasked)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: takes at most %d masked products, got %d", kWho,
                     kMaxMasked, plan.masked);
  if (plan.masked > 0 && !plan.across)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: with a mask the right matrices must have row_stride 1 (the gradient of x "
                     "has that of W as it lies); pass transposed views of contiguous tensors",
                     kWho);
  g.bias = args->bias.data;
  g.out = out.data;
  g.rows = out.rows;
  g.columns = static_cast<int32_t>(out.cols);
  g.out_stride = out.row_stride;
  g.out_aligned = starts_on_16_bytes(out.data, out.row_stride);
  const OnDevice here(args->device);
  if (here.status() != DELTAOPS_OK) return here.status();
  auto *run_dtype = out.dtype == DELTAOPS_BF16 ? run<__nv_bfloat16> : run<__half>;
  return run_dtype(g, plan, down * sideways, args->stream);
}
