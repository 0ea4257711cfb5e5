/* few_rows.h: products of 16 rows whose operands come past shared memory, with mma.m16n8k16.
 *
 * The order of contracted elements within a product is free, so lane (g, q) holds 16 bytes of row g
 * of either operand, elements 8 q ... 8 q + 7 of a step of 32, and their pairs are taken as they
 * come for the fragments of two products. The eight warps of a block take every eighth step each,
 * and their sums are added in the order of the warps.
 */
#ifndef DELTAOPS_CUDA_AMPERE_FEW_ROWS_H
#define DELTAOPS_CUDA_AMPERE_FEW_ROWS_H

#include "ampere/tile.h"

namespace deltaops::ampere {

constexpr int kGemvRows = 16, kGemvColumns = 16, kGemvStep = 32, kGemvWarps = 8;
constexpr int kGemvThreads = 32 * kGemvWarps;
constexpr int kGemvShared = kGemvWarps * kGemvRows * kGemvColumns * 4; /* of add_up_warps */

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

/* Adds 32 contracted elements: this lane's chunks of rows g and g + 8 of left and of column g of
 * right. All lanes of the warp. */
template <typename T>
__device__ __forceinline__ void multiply_chunks(float (&sums)[4], const uint4 (&left)[2],
                                                const uint4 &right) {
  const uint32_t low[4] = {left[0].x, left[1].x, left[0].y, left[1].y};
  const uint32_t high[4] = {left[0].z, left[1].z, left[0].w, left[1].w};
  const uint32_t first[2] = {right.x, right.y}, second[2] = {right.z, right.w};
  multiply<T>(sums, low, first);
  multiply<T>(sums, high, second);
}

/* body(row, col, sum) for the element of 16 x 16 that is this thread's: the sums of all warps,
 * each of two fragments of eight columns. All threads; shared memory begins with kGemvShared bytes
 * that nobody reads any more. */
template <typename Body>
__device__ __forceinline__ void add_up_warps(const float (&left)[4], const float (&right)[4],
                                             int warp, int lane, Body body) {
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, col = 2 * (lane % 4) + e % 2;
    float *to = shared + (warp * kGemvRows + row) * kGemvColumns + col;
    to[0] = left[e];
    to[8] = right[e];
  }
  __syncthreads();
  static_assert(kGemvThreads == kGemvRows * kGemvColumns, "a thread for each element");
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGemvWarps; ++i) sum += shared[i * kGemvThreads + threadIdx.x];
  const int index = static_cast<int>(threadIdx.x);
  body(index / kGemvColumns, index % kGemvColumns, sum);
}

}  // namespace deltaops::ampere
#endif
