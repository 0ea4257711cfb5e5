/* gemv.h: the products of delta_linear for at most 16 rows, as in decoding
 *
 *     y = x W^T + S B^T + bias        x [M,K]  W [N,K]  S [M,R]  B [N,R]  y [M,N];  M <= 16
 *
 * Bound by reading W once: 2 N K bytes. A warp multiplies the 16 rows by 8 columns with
 * mma.m16n8k16, straight from global memory. The order of contracted elements within a product is
 * free, so lane (g, q) loads 16 bytes of row g of either matrix, elements 8 q ... 8 q + 7 of a step
 * of 32, and takes their pairs as they come for the fragments of two products: whole sectors, no
 * shared memory. x comes from L1. The eight warps of a block take every eighth step of all segments
 * each, and their sums are added in the order of the warps.
 */
#ifndef DELTAOPS_CUDA_AMPERE_GEMV_H
#define DELTAOPS_CUDA_AMPERE_GEMV_H

#include "ampere/gemm.h"

namespace deltaops::ampere {

constexpr int kGemvRows = 16, kGemvColumns = 16, kGemvStep = 32, kGemvWarps = 8;
constexpr int kGemvThreads = 32 * kGemvWarps;
constexpr int kGemvShared = kGemvWarps * kGemvRows * kGemvColumns * 4;

/* Elements col ... col + 7 of a row, zeros where the matrix has none. */
__device__ __forceinline__ uint4 chunk_at_edge(const Matrix &from, int64_t row, int col) {
  const uint16_t *source;
  const int count = inside(from, row, col, &source);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? source[2 * i] : 0;
    const uint32_t high = 2 * i + 1 < count ? source[2 * i + 1] : 0;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/* What a warp sums: 16 rows, 16 columns. */
template <typename T>
struct FewRows {
  static constexpr int kSideways = kGemvColumns / 8;

  float sums[kSideways][4] = {};

  /* Adds a step of 32: this lane's chunks of rows g and g + 8 of left, and of a column of each
   * fragment of right. */
  __device__ __forceinline__ void add(const uint4 (&left)[2], const uint4 (&right)[kSideways]) {
    const uint32_t low[4] = {left[0].x, left[1].x, left[0].y, left[1].y};
    const uint32_t high[4] = {left[0].z, left[1].z, left[0].w, left[1].w};
#pragma unroll
    for (int j = 0; j < kSideways; ++j) {
      const uint32_t first[2] = {right[j].x, right[j].y}, second[2] = {right[j].z, right[j].w};
      multiply<T>(sums[j], low, first);
      multiply<T>(sums[j], high, second);
    }
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
};

/* One block for 16 columns. */
template <typename T>
__global__ void __launch_bounds__(kGemvThreads)
    gemv_kernel(const __grid_constant__ GemmArguments g) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = static_cast<int>(blockIdx.x) * kGemvColumns;
  FewRows<T> tile;
  for (int s = 0; s < g.count; ++s) tile.add(g.segments[s], first_col, warp, lane);

  auto *shared = reinterpret_cast<float *>(dynamic_shared());
#pragma unroll
  for (int j = 0; j < kGemvColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, col = 8 * j + 2 * (lane % 4) + e % 2;
      shared[(warp * kGemvRows + row) * kGemvColumns + col] = tile.sums[j][e];
    }
  __syncthreads();
  static_assert(kGemvThreads == kGemvRows * kGemvColumns, "a thread for each element of out");
  const int row = static_cast<int>(threadIdx.x) / kGemvColumns;
  const int col = first_col + static_cast<int>(threadIdx.x) % kGemvColumns;
  if (row >= g.rows || col >= g.columns) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGemvWarps; ++i) sum += shared[i * kGemvThreads + threadIdx.x];
  if (g.bias != nullptr) sum += to_float(static_cast<const T *>(g.bias)[col]);
  static_cast<T *>(g.out)[row * g.out_stride + col] = from_float<T>(sum);
}

}  // namespace deltaops::ampere
#endif
