/* dropout.cu: the Philox dropout stream on a GPU, as a mask and applied.   (csrc/include/philox.h)
 *
 *   keep[m, k] = draw(k, m, stream, seed) >= threshold
 *   y[m, k]    = keep ? x[m, k] * 65536 / (65536 - threshold) : 0
 *
 * One thread makes the eight draws of one Philox call, for elements 8 g ... 8 g + 7 of a row: 8
 * bytes of mask, or 16 (bf16) or 32 (f32) bytes in and out. Memory-bound: M K bytes written for the
 * mask, 2 M K elements moved to apply it. Rows that start on 16 bytes move whole groups; others go
 * one by one.
 */
#include <cuda_bf16.h>

#include "core.h"
#include "philox.h"

namespace deltaops {
namespace {

constexpr int kGroup = 8;        /* draws of one Philox call */
constexpr int kThreads = 256;    /* a block; no shared memory, so occupancy is not its limit */
constexpr int kMaxBlocks = 8192; /* beyond, a thread takes several groups */

struct Draws {
  const uint64_t *seed;
  uint32_t stream;
  uint32_t threshold;
};

/* Where thread work goes: group g of row m. */
template <typename Body>
__device__ __forceinline__ void for_each_group(int64_t M, int64_t K, Body body) {
  const int64_t groups = (K + kGroup - 1) / kGroup;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < M * groups;
       i += step)
    body(i / groups, i % groups);
}

/* Bit j of the result: element 8 g + j of row m is kept. */
__device__ __forceinline__ uint32_t keep_bits(int64_t g, int64_t m, const Draws &draws,
                                              uint64_t seed) {
  uint32_t c[4] = {static_cast<uint32_t>(g), static_cast<uint32_t>(m),
                   static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32), draws.stream};
  deltaops_philox(c, seed);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    bits |= static_cast<uint32_t>(((c[j / 2] >> (16 * (j & 1))) & 0xFFFFu) >= draws.threshold) << j;
  return bits;
}

__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(uint8_t *keep, int64_t stride, int64_t M, int64_t K, Draws draws) {
  const uint64_t seed = *draws.seed;
  for_each_group(M, K, [&](int64_t m, int64_t g) {
    const uint32_t bits = keep_bits(g, m, draws, seed);
    uint8_t *out = keep + m * stride + g * kGroup;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (g * kGroup + j < K) out[j] = (bits >> j) & 1;
  });
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void store(float *to, float v) { *to = v; }
__device__ __forceinline__ void store(__nv_bfloat16 *to, float v) { *to = __float2bfloat16_rn(v); }

template <typename T>
struct alignas(16) Group {
  T v[kGroup];
};

/* kWhole: every row of x and y starts on 16 bytes, so whole groups move as 16-byte words. */
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    dropout_apply_kernel(const T *x, int64_t x_stride, T *y, int64_t y_stride, int64_t M, int64_t K,
                         float scale, Draws draws) {
  const uint64_t seed = *draws.seed;
  for_each_group(M, K, [&](int64_t m, int64_t g) {
    const uint32_t bits = keep_bits(g, m, draws, seed);
    const T *from = x + m * x_stride + g * kGroup;
    T *to = y + m * y_stride + g * kGroup;
    if (kWhole && (g + 1) * kGroup <= K) {
      Group<T> values = *reinterpret_cast<const Group<T> *>(from);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        store(&values.v[j], (bits >> j) & 1 ? to_float(values.v[j]) * scale : 0.0f);
      *reinterpret_cast<Group<T> *>(to) = values;
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (g * kGroup + j < K) store(&to[j], (bits >> j) & 1 ? to_float(from[j]) * scale : 0.0f);
    }
  });
}

/* What mask and apply both ask of their arguments. */
deltaops_status check_draws(const char *who, int64_t M, int64_t K, const Draws &draws) {
  if (M < 0 || K < 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: M and K must be >= 0, got [%lld, %lld]", who,
                     static_cast<long long>(M), static_cast<long long>(K));
  if (K > (int64_t{1} << 35))
    return cuda_fail(
        DELTAOPS_UNSUPPORTED,
        "%s: K must be at most 2^35 (the counter's first word counts groups of 8), got %lld", who,
        static_cast<long long>(K));
  if (K > 0 && M > INT64_MAX / K)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: M * K must fit 64 bits, got [%lld, %lld]", who,
                     static_cast<long long>(M), static_cast<long long>(K));
  if (draws.threshold > 65536)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: drop_threshold must be p * 65536, so 0 to 65536, got %u", who,
                     draws.threshold);
  if (draws.seed == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: seed must point to one 64-bit value on the GPU, got NULL", who);
  return DELTAOPS_OK;
}

/* One thread per group of eight, in blocks that a grid holds. */
cudaLaunchConfig_t one_thread_per_group(int64_t M, int64_t K, void *stream) {
  const int64_t blocks = (M * ((K + kGroup - 1) / kGroup) + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

bool rows_on_16_bytes(const deltaops_matrix &matrix, size_t element) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.row_stride * element % 16 == 0;
}

template <typename T>
deltaops_status apply(const deltaops_matrix &x, const deltaops_matrix &y, const Draws &draws,
                      void *stream) {
  const bool whole = rows_on_16_bytes(x, sizeof(T)) && rows_on_16_bytes(y, sizeof(T));
  const float scale =
      draws.threshold < 65536 ? 65536.0f / static_cast<float>(65536 - draws.threshold) : 0.0f;
  const cudaLaunchConfig_t config = one_thread_per_group(x.rows, x.cols, stream);
  auto *kernel = whole ? dropout_apply_kernel<T, true> : dropout_apply_kernel<T, false>;
  return cuda_check(
      cudaLaunchKernelEx(&config, kernel, static_cast<const T *>(x.data), x.row_stride,
                         static_cast<T *>(y.data), y.row_stride, x.rows, x.cols, scale, draws),
      "launching dropout_apply");
}

}  // namespace
}  // namespace deltaops

using namespace deltaops;

extern "C" {

deltaops_status deltaops_cuda_dropout_mask(int32_t device, uint8_t *keep, int64_t keep_stride,
                                           int64_t M, int64_t K, const uint64_t *seed,
                                           uint32_t branch_stream, uint32_t drop_threshold,
                                           void *stream) {
  const Draws draws = {seed, branch_stream, drop_threshold};
  const deltaops_status status = check_draws("dropout_mask", M, K, draws);
  if (status != DELTAOPS_OK) return status;
  if (M == 0 || K == 0) return DELTAOPS_OK;
  if (keep == nullptr || keep_stride < K)
    return cuda_fail(
        DELTAOPS_INVALID_ARGUMENT,
        "dropout_mask: keep must be [%lld, %lld] bytes with a row stride of at least K, got "
        "pointer %p and stride %lld",
        static_cast<long long>(M), static_cast<long long>(K), static_cast<void *>(keep),
        static_cast<long long>(keep_stride));
  const OnDevice here(device);
  if (here.status() != DELTAOPS_OK) return here.status();
  const cudaLaunchConfig_t config = one_thread_per_group(M, K, stream);
  return cuda_check(
      cudaLaunchKernelEx(&config, dropout_mask_kernel, keep, keep_stride, M, K, draws),
      "launching dropout_mask");
}

deltaops_status deltaops_cuda_dropout_apply(int32_t device, const deltaops_matrix *x,
                                            const deltaops_matrix *y, const uint64_t *seed,
                                            uint32_t branch_stream, uint32_t drop_threshold,
                                            void *stream) {
  if (x == nullptr || y == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "dropout_apply: x and y must be given, got NULL");
  const Draws draws = {seed, branch_stream, drop_threshold};
  const deltaops_status status = check_draws("dropout_apply", x->rows, x->cols, draws);
  if (status != DELTAOPS_OK) return status;
  if (y->rows != x->rows || y->cols != x->cols || y->dtype != x->dtype)
    return cuda_fail(
        DELTAOPS_INVALID_ARGUMENT,
        "dropout_apply: y must have the shape and dtype of x, [%lld, %lld] of dtype %d, got "
        "[%lld, %lld] of dtype %d",
        static_cast<long long>(x->rows), static_cast<long long>(x->cols), x->dtype,
        static_cast<long long>(y->rows), static_cast<long long>(y->cols), y->dtype);
  if (x->rows == 0 || x->cols == 0) return DELTAOPS_OK;
  if (x->data == nullptr || y->data == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "dropout_apply: x and y must have data, got NULL");
  if (x->col_stride != 1 || y->col_stride != 1 || y->row_stride < y->cols)
    return cuda_fail(
        DELTAOPS_INVALID_ARGUMENT,
        "dropout_apply: x and y must have col_stride 1, and the rows of y must not overlap; "
        "pass contiguous tensors");
  const OnDevice here(device);
  if (here.status() != DELTAOPS_OK) return here.status();
  switch (x->dtype) {
    case DELTAOPS_F32:
      return apply<float>(*x, *y, draws, stream);
    case DELTAOPS_BF16:
      return apply<__nv_bfloat16>(*x, *y, draws, stream);
    default:
      return cuda_fail(DELTAOPS_UNSUPPORTED,
                       "dropout_apply: dtype must be f32 (0) or bf16 (1), got %d", x->dtype);
  }
}
}
