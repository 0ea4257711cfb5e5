/* gemv.h: the products of delta_linear for at most 16 rows, as in decoding
 *
 *     y = x W^T + S B^T + bias        x [M,K]  W [N,K]  S [M,R]  B [N,R]  y [M,N];  M <= 16
 *
 * Bound by reading W once: 2 N K bytes, straight from global memory as few_rows.h has it: whole
 * sectors, no shared memory. x comes from L1. A block makes 16 columns; its warps share the steps
 * of all segments.
 */
#ifndef DELTAOPS_CUDA_AMPERE_GEMV_H
#define DELTAOPS_CUDA_AMPERE_GEMV_H

#include "ampere/few_rows.h"
#include "ampere/gemm.h"

namespace deltaops::ampere {

/* What a warp sums: 16 rows, 16 columns. */
template <typename T>
struct FewRows {
  static constexpr int kSideways = kGemvColumns / 8;

  float sums[kSideways][4] = {};

  /* Adds a step of 32: this lane's chunks of rows g and g + 8 of left, and of a column of each
   * fragment of right. */
  __device__ __forceinline__ void add(const uint4 (&left)[2], const uint4 (&right)[kSideways]) {
#pragma unroll
    for (int j = 0; j < kSideways; ++j) multiply_chunks<T>(sums[j], left, right[j]);
  }

  /* Adds the steps of a segment that are this warp's. */
  __device__ __forceinline__ void add(const Segment &segment, int first_col, int warp, int lane) {
    const Matrix &left = segment.left, &right = segment.right;
    const int row = lane / 4, chunk = lane % 4 * kChunk;
    const int whole = left.aligned && right.aligned ? left.cols / kGemvStep * kGemvStep : 0;
    /* Rows that do not exist are read from the last one: their sums go nowhere. */
    const auto source = [&](const Matrix &matrix, int64_t at) {
      const int64_t there = at < matrix.rows ? at : matrix.rows - 1;
      return static_cast<const uint16_t *>(matrix.data) + there * matrix.stride + chunk;
    };
    const uint16_t *lefts[2] = {source(left, row), source(left, row + 8)}, *rights[kSideways];
#pragma unroll
    for (int j = 0; j < kSideways; ++j) rights[j] = source(right, first_col + 8 * j + row);
    int k = warp * kGemvStep;
#pragma unroll 4 /* loads of several steps are under way together */
    for (; k < whole; k += kGemvWarps * kGemvStep) {
      uint4 l[2], r[kSideways];
#pragma unroll
      for (int i = 0; i < 2; ++i) l[i] = __ldg(reinterpret_cast<const uint4 *>(lefts[i] + k));
#pragma unroll
      for (int j = 0; j < kSideways; ++j)
        r[j] = __ldg(reinterpret_cast<const uint4 *>(rights[j] + k));
      add(l, r);
    }
    for (; k < left.cols; k += kGemvWarps * kGemvStep) {
      uint4 l[2], r[kSideways];
#pragma unroll
      for (int i = 0; i < 2; ++i) l[i] = chunk_at_edge(left, row + 8 * i, k + chunk);
#pragma unroll
      for (int j = 0; j < kSideways; ++j)
        r[j] = chunk_at_edge(right, first_col + 8 * j + row, k + chunk);
      add(l, r);
    }
  }

  /* Adds up the warps, and writes columns first_col ... first_col + 15 of out. */
  __device__ __forceinline__ void finish(const GemmArguments &g, int first_col, int warp,
                                         int lane) const {
    add_up_warps(sums[0], sums[1], warp, lane, [&](int row, int col, float sum) {
      col += first_col;
      if (row >= g.rows || col >= g.columns) return;
      if (g.bias != nullptr) sum += to_float(static_cast<const T *>(g.bias)[col]);
      static_cast<T *>(g.out)[row * g.out_stride + col] = from_float<T>(sum);
    });
  }
};

/* One block for 16 columns. */
template <typename T>
__global__ void __launch_bounds__(kGemvThreads)
    gemv_kernel(const __grid_constant__ GemmArguments g) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = static_cast<int>(blockIdx.x) * kGemvColumns;
  FewRows<T> tile;
  for (int s = 0; s < g.count; ++s) tile.add(g.segments[s], first_col, warp, lane);
  tile.finish(g, first_col, warp, lane);
}

}  // namespace deltaops::ampere
#endif
