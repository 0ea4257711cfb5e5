/* ampere_gemm.cu: launches the products of ampere/gemm.h, and of at most 16 rows those of
 * ampere/gemv.h. */
#include "ampere/gemm.h"

#include "ampere/gemv.h"
#include "ampere/products.h"

namespace deltaops::ampere {
namespace {

constexpr const char *kWho = "ampere_gemm";

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
  deltaops_status status = check_args(kWho, args);
  if (status != DELTAOPS_OK) return status;
  Layout layout;
  status = check_products(kWho, *args, &layout);
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
  const GemmArguments g = arguments_of(*args, plan.across);
  if (plan.masked > kMaxMasked)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: takes at most %d masked products, got %d", kWho,
                     kMaxMasked, plan.masked);
  if (plan.masked > 0 && !plan.across)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: with a mask the right matrices must have row_stride 1 (the gradient of x "
                     "has that of W as it lies); pass transposed views of contiguous tensors",
                     kWho);
  const OnDevice here(args->device);
  if (here.status() != DELTAOPS_OK) return here.status();
  auto *run_dtype = out.dtype == DELTAOPS_BF16 ? run<__nv_bfloat16> : run<__half>;
  return run_dtype(g, plan, down * sideways, args->stream);
}
