/* tensor_map.h: describes a matrix to the copy engine; host code. */
#ifndef DELTAOPS_CUDA_HOPPER_TENSOR_MAP_H
#define DELTAOPS_CUDA_HOPPER_TENSOR_MAP_H

#include "core.h"
#include "primitives/tensor_copy.h"

namespace deltaops::hopper {

constexpr int32_t kBoxColumns = 64; /* 128 bytes */

/* Makes maps of matrices of 16-bit elements, rows on 16 bytes, at least one row and column. */
class MapMaker {
 public:
  /* Asks the driver for its encoder: this library is linked without it. */
  MapMaker();
  deltaops_status status() const { return status_; }
  deltaops_status make(TensorMap *map, const deltaops_matrix &matrix, int32_t box_rows) const;

 private:
  void *encode_ = nullptr;
  deltaops_status status_ = DELTAOPS_OK;
};

#ifdef DELTAOPS_EMULATED

inline MapMaker::MapMaker() = default;

/* Refuses what cuTensorMapEncodeTiled refuses. */
inline deltaops_status MapMaker::make(TensorMap *map, const deltaops_matrix &matrix,
                                      int32_t box_rows) const {
  constexpr int64_t kMost = int64_t{1} << 32, kStrideEnd = int64_t{1} << 39;
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0 || matrix.row_stride % 8 != 0 ||
      matrix.row_stride >= kStrideEnd || matrix.rows > kMost || matrix.cols > kMost ||
      matrix.rows < 1 || matrix.cols < 1 || box_rows < 1 || box_rows > 256)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "describing a matrix: the emulated driver refuses it");
  *map = {static_cast<const uint16_t *>(matrix.data), matrix.rows, matrix.cols, matrix.row_stride,
          box_rows};
  return DELTAOPS_OK;
}

#else

inline MapMaker::MapMaker() {
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  status_ = cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode_, 12000,
                                                        cudaEnableDefault, &found),
                       "asking the driver for cuTensorMapEncodeTiled");
  if (status_ == DELTAOPS_OK && (found != cudaDriverEntryPointSuccess || encode_ == nullptr))
    status_ = cuda_fail(DELTAOPS_UNSUPPORTED,
                        "the driver has no cuTensorMapEncodeTiled; it must serve CUDA 12.0 or "
                        "later: update it");
}

inline deltaops_status MapMaker::make(TensorMap *map, const deltaops_matrix &matrix,
                                      int32_t box_rows) const {
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(matrix.cols),
                                 static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(matrix.row_stride) * 2};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = matrix.dtype == DELTAOPS_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode_)(
      map, type, 2, matrix.data, extents, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_UNSUPPORTED,
                   "describing a matrix [%lld, %lld] of row stride %lld to the copy engine: the "
                   "driver reports CUresult %d",
                   static_cast<long long>(matrix.rows), static_cast<long long>(matrix.cols),
                   static_cast<long long>(matrix.row_stride), static_cast<int>(result));
}

#endif

}  // namespace deltaops::hopper

#endif
