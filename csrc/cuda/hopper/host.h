/* host.h: what the launchers of Hopper products share. */
#ifndef DELTAOPS_CUDA_HOPPER_HOST_H
#define DELTAOPS_CUDA_HOPPER_HOST_H

#include "core.h"
#include "hopper/arguments.h"
#include "hopper/tensor_map.h"

namespace deltaops::hopper {

using Matrix = deltaops_matrix;

constexpr int64_t kRow = 8;        /* elements of 16 bytes */
constexpr int32_t kTileRows = 128; /* of a tile */

/* The function that was called, as sentences name it: each sets it first. */
extern thread_local const char *who;

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/* How the right matrices lie, of all that see() was told; one way must hold for all of them. */
struct Layout {
  bool inner = true; /* contracted elements side by side */
  bool outer = true; /* columns of out side by side */

  void see(const Matrix &right) {
    inner = inner && (right.col_stride == 1 || right.cols <= 1);
    outer = outer && (right.row_stride == 1 || right.rows <= 1);
  }
};

/* A single row may have any stride: then one that the copy engine takes. */
inline Matrix with_stride(Matrix matrix) {
  if (matrix.rows <= 1) matrix.row_stride = blocks(matrix.cols, kRow) * kRow;
  return matrix;
}

deltaops_status check_shape(const char *name, const Matrix &matrix, int64_t rows, int64_t cols,
                            int32_t dtype);
/* Whether the copy engine can read it. */
deltaops_status check_rows(const char *name, const Matrix &matrix);
/* Checks all outputs, and finds how their right matrices lie: layout->inner where that holds. */
deltaops_status check(const deltaops_cuda_gemm_args *outputs, int32_t count, Layout *layout);

/* Launches checked outputs on their GPU. `project`: the S that the launch makes too, of the only
 * output; or NULL. */
deltaops_status run_on(const deltaops_cuda_gemm_args *outputs, int32_t count, bool outer,
                       const deltaops_cuda_hopper_project_gemm_args *project);
/* Adds to the launch the part that makes S. */
deltaops_status describe_sides(const deltaops_cuda_hopper_project_gemm_args &args,
                               const MapMaker &maps, int32_t cluster, int32_t multiprocessors,
                               GemmArguments *arguments);

}  // namespace deltaops::hopper

#endif
