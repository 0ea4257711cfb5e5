/* host.h: what the launchers ask of their matrices, in words. */
#ifndef DELTAOPS_CUDA_AMPERE_HOST_H
#define DELTAOPS_CUDA_AMPERE_HOST_H

#include "ampere/tile.h"
#include "core.h"

namespace deltaops::ampere {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float scale_of_kept(uint32_t threshold) {
  return threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
}

inline bool is_half(int32_t dtype) { return dtype == DELTAOPS_BF16 || dtype == DELTAOPS_F16; }

/* DELTAOPS_OK where `m` is [rows, cols] of `dtype`, with data unless it is empty. */
inline deltaops_status check_shape(const char *who, const char *name, const deltaops_matrix &m,
                                   int64_t rows, int64_t cols, int32_t dtype) {
  if (m.rows != rows || m.cols != cols || m.dtype != dtype)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: %s must be [%lld, %lld] of dtype %d, got [%lld, %lld] of dtype %d", who,
                     name, static_cast<long long>(rows), static_cast<long long>(cols), dtype,
                     static_cast<long long>(m.rows), static_cast<long long>(m.cols), m.dtype);
  if (rows < 0 || cols < 0 || cols > kMostColumns)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: %s must have 0 to %lld columns, got [%lld, %lld]",
                     who, name, static_cast<long long>(kMostColumns), static_cast<long long>(rows),
                     static_cast<long long>(cols));
  if (m.data == nullptr && rows > 0 && cols > 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s must have data, got NULL", who, name);
  return DELTAOPS_OK;
}

/* As check_shape, and neighbouring columns lie side by side. */
inline deltaops_status check_rows(const char *who, const char *name, const deltaops_matrix &m,
                                  int64_t rows, int64_t cols, int32_t dtype) {
  const deltaops_status status = check_shape(who, name, m, rows, cols, dtype);
  if (status != DELTAOPS_OK) return status;
  if ((m.col_stride != 1 && cols > 1) || (m.row_stride < cols && rows > 1))
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %s must have col_stride 1 and rows that do not overlap, got strides "
                     "(%lld, %lld); pass a contiguous tensor",
                     who, name, static_cast<long long>(m.row_stride),
                     static_cast<long long>(m.col_stride));
  return DELTAOPS_OK;
}

inline deltaops_status check_draws(const char *who, uint32_t threshold, const uint64_t *seed) {
  if (threshold > 65536)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: drop_threshold must be p * 65536, so 0 to 65536, got %u", who, threshold);
  if (threshold > 0 && seed == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: seed must point to one 64-bit value on the GPU where something is "
                     "dropped, got NULL",
                     who);
  return DELTAOPS_OK;
}

template <class Args>
deltaops_status check_args(const char *who, const Args *args) {
  if (args != nullptr && args->struct_size == sizeof *args) return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                   "%s: args must be given, with struct_size = %zu; were caller and library "
                   "compiled from the same deltaops_cuda.h?",
                   who, sizeof *args);
}

inline deltaops_status check_half(const char *who, const char *name, const deltaops_matrix &m) {
  if (is_half(m.dtype)) return check_rows(who, name, m, m.rows, m.cols, m.dtype);
  return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: %s must be bf16 (1) or f16 (2), got %d", who, name,
                   m.dtype);
}

inline deltaops_status check_if_there(const char *who, const char *name, const deltaops_matrix &m,
                                      int64_t rows, int64_t cols, int32_t dtype) {
  return m.data == nullptr ? DELTAOPS_OK : check_rows(who, name, m, rows, cols, dtype);
}

inline bool starts_on_16_bytes(const void *data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk == 0;
}

inline Matrix rows_of(const deltaops_matrix &m) {
  return {m.data, m.rows, m.row_stride, static_cast<int32_t>(m.cols),
          starts_on_16_bytes(m.data, m.row_stride)};
}

/* The transposed view of a matrix whose row_stride is 1. */
inline Matrix columns_of(const deltaops_matrix &m) {
  return {m.data, m.cols, m.col_stride, static_cast<int32_t>(m.rows),
          starts_on_16_bytes(m.data, m.col_stride)};
}

/* Launches `kernel`, which may need more shared memory than the 48 KB that come unasked. `most` is
 * for kernels that need more in some calls than in others: the limit is the kernel's, so a call
 * that set it to its own would take it from one that another thread is about to launch. */
template <class Argument>
deltaops_status launch(const char *doing, void (*kernel)(Argument), const Argument &argument,
                       dim3 grid, int threads, int shared, void *stream, int most = 0) {
  if (most < shared) most = shared;
  if (most > 48 * 1024) {
    const deltaops_status status = cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), doing);
    if (status != DELTAOPS_OK) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  return cuda_check(cudaLaunchKernelEx(&config, kernel, argument), doing);
}

}  // namespace deltaops::ampere
#endif
