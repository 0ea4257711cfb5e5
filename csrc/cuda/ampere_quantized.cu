/* ampere_quantized.cu: launches the products of ampere/quantized.h. */
#include "ampere/quantized.h"

#include "ampere/products.h"

namespace deltaops::ampere {
namespace {

constexpr const char *kWho = "ampere_quantized_gemv";
static_assert(kGemvRows == DELTAOPS_CUDA_MAX_DECODED, "the C ABI says the same");

deltaops_status check_weight(const deltaops_cuda_quantized &weight, int64_t N, int64_t K) {
  if (weight.kind != DELTAOPS_CUDA_INT8 && weight.kind != DELTAOPS_CUDA_NF4)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: kind must be int8 (1) or NF4 (2), got %d",
                     kWho, weight.kind);
  if (weight.rows != N || weight.cols != K)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: weight must be [%lld, %lld], got [%lld, %lld]",
                     kWho, static_cast<long long>(N), static_cast<long long>(K),
                     static_cast<long long>(weight.rows), static_cast<long long>(weight.cols));
  if (N > 0 && K > 0 && (weight.codes == nullptr || weight.scales == nullptr))
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: weight must have codes and scales, got NULL",
                     kWho);
  if (weight.kind == DELTAOPS_CUDA_NF4 && weight.block < 1)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: block must be at least 1, got %lld", kWho,
                     static_cast<long long>(weight.block));
  return DELTAOPS_OK;
}

deltaops_status check(const deltaops_cuda_quantized_gemv_args &args) {
  const deltaops_cuda_gemm_args &rest = args.rest;
  Layout layout;
  deltaops_status status = check_args(kWho, &rest);
  if (status == DELTAOPS_OK) status = check_products(kWho, rest, &layout);
  if (status != DELTAOPS_OK) return status;
  const deltaops_matrix &out = rest.out;
  status = check_rows(kWho, "x", args.x, out.rows, args.x.cols, out.dtype);
  if (status == DELTAOPS_OK) status = check_weight(args.weight, out.cols, args.x.cols);
  if (status != DELTAOPS_OK) return status;
  if (out.rows > kGemvRows)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: out must have at most %d rows, got %lld; dequantize the weight once and "
                     "use ampere_gemm",
                     kWho, kGemvRows, static_cast<long long>(out.rows));
  if (!layout.inner)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: the right matrices must have col_stride 1; pass contiguous tensors",
                     kWho);
  for (int32_t i = 0; i < rest.num_products; ++i)
    if (rest.products[i].drop_threshold > 0)
      return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: takes no masks, and product %d has one; pass 0",
                       kWho, i);
  return DELTAOPS_OK;
}

template <typename T>
deltaops_status run(const QuantizedArguments &g, int32_t kind, void *stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(g.rest.columns, kGemvColumns)));
  auto *kernel = kind == DELTAOPS_CUDA_INT8 ? quantized_kernel<T, Int8> : quantized_kernel<T, Nf4>;
  return launch("launching ampere_quantized_gemv", kernel, g, grid, kGemvThreads, kQuantizedShared,
                stream);
}

}  // namespace
}  // namespace deltaops::ampere

using namespace deltaops;
using namespace deltaops::ampere;

extern "C" deltaops_status deltaops_cuda_ampere_quantized_gemv(
    const deltaops_cuda_quantized_gemv_args *args) {
  deltaops_status status = check_args(kWho, args);
  if (status == DELTAOPS_OK) status = check(*args);
  if (status != DELTAOPS_OK) return status;
  const deltaops_matrix &out = args->rest.out;
  if (out.rows == 0 || out.cols == 0) return DELTAOPS_OK;
  const deltaops_cuda_quantized &weight = args->weight;
  QuantizedArguments g = {};
  g.rest = arguments_of(args->rest, false);
  g.x = rows_of(args->x);
  g.codes = weight.codes;
  g.scales = weight.scales;
  g.block = weight.block;
  const bool int8 = weight.kind == DELTAOPS_CUDA_INT8;
  const int64_t codes = int8 ? Int8::kCodes : Nf4::kCodes;
  g.aligned = g.x.aligned && reinterpret_cast<uintptr_t>(weight.codes) % 16 == 0 &&
              g.x.cols % codes == 0 && (int8 || weight.block % codes == 0);
  const OnDevice here(args->rest.device);
  if (here.status() != DELTAOPS_OK) return here.status();
  auto *run_dtype = out.dtype == DELTAOPS_BF16 ? run<__nv_bfloat16> : run<__half>;
  return run_dtype(g, weight.kind, args->rest.stream);
}
