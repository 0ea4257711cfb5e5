/* columns.h: sums over the rows of a tall matrix, in one pass over it, with mma.sync
 *
 *     grad_up      dS = s dy B,   dB = dy^T S,   db = sum_m dy      dy [M,N]  B [N,R]  S [M,R]
 *     grad_down    dA = dS^T drop(x)                                x [M,K]  dS [M,R]
 *
 * A block owns 128 columns of dy or x and a piece of the rows, and walks down it by 64: it keeps
 * its part of dB (dA) and db in registers until the end, and writes for each step the part of dS
 * that its columns give. All of it is partial sums, which reduce.h adds up in a fixed order: the
 * same bits every time. Traffic: dy (x) once for each 64 ranks; written, and read again by
 * reduce.h, 4 M R ceil(N / 128) bytes for dS and 4 N R pieces for dB. Memory-bound while R is
 * small.
 */
#ifndef DELTAOPS_CUDA_AMPERE_COLUMNS_H
#define DELTAOPS_CUDA_AMPERE_COLUMNS_H

#include "ampere/mask.h"
#include "ampere/project.h"
#include "ampere/tile.h"

namespace deltaops::ampere {

constexpr int kStripColumns = 128, kStripRows = 64, kStripThreads = 128, kStripStages = 3;

struct ColumnsArguments {
  Matrix tall;    /* dy or x, [M, columns] */
  Matrix side;    /* S or dS, [M, R]; read where product is wanted */
  Matrix up;      /* B, [columns, R]; read where through is wanted */
  Mask mask;      /* of tall */
  float *product; /* tall^T side, [pieces, columns, R] or [pieces, R, columns]; or NULL */
  int64_t col_step, rank_step; /* of product */
  float *totals;               /* of the columns of tall, [pieces, columns]; or NULL */
  float *through;              /* tall up, [strips, M, R]; or NULL */
  int64_t piece;               /* rows of a piece, a multiple of kStripRows */
  int32_t ranks;
};

using TallTile = Tile<kStripRows, kStripColumns / kChunk>;
using SideTile = Tile<kStripRows, kLanes / kChunk>;
using UpTile = Tile<kStripColumns, kLanes / kChunk>;
constexpr int kStripStageBytes = TallTile::kBytes + SideTile::kBytes;
constexpr int kStripShared = UpTile::kBytes + kStripStages * kStripStageBytes;
static_assert(kStripShared <= kLeastShared);

/* Writes sums[j][e], of rows `row`, `row` + 8 and ranks from first_rank on, where they exist. */
__device__ __forceinline__ void store_lanes(float *to, int64_t row_step, int64_t rank_step,
                                            const float (&sums)[kLanes / 8][4], int64_t row,
                                            int64_t rows, int first_rank, int ranks, int lane) {
#pragma unroll
  for (int j = 0; j < kLanes / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t at = row + e / 2 * 8;
      const int r = first_rank + 8 * j + 2 * (lane % 4) + e % 2;
      if (at < rows && r < ranks) to[at * row_step + r * rank_step] = sums[j][e];
    }
}

/* Blocks: (columns / 128, ranks / 64, pieces). */
template <typename T>
__global__ void __launch_bounds__(kStripThreads)
    columns_kernel(const __grid_constant__ ColumnsArguments g) {
  unsigned char *shared = dynamic_shared();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = static_cast<int>(blockIdx.x) * kStripColumns;
  const int first_rank = static_cast<int>(blockIdx.y) * kLanes;
  const int64_t first = blockIdx.z * g.piece;
  const int64_t end = g.tall.rows - first < g.piece ? g.tall.rows : first + g.piece;
  const int ranks = g.ranks - first_rank < kLanes ? g.ranks - first_rank : kLanes;
  const bool masked = g.mask.threshold > 0;
  const uint64_t seed = masked ? *g.mask.seed : 0;
  const UpTile up(shared);
  unsigned char *stages = shared + UpTile::kBytes;

  int64_t fetched = first;
  int filled = 0;
  const auto fetch_next = [&] {
    if (fetched < end) {
      unsigned char *stage = stages + filled * kStripStageBytes;
      fetch<kStripRows, kStripColumns / kChunk, kStripThreads>(TallTile(stage), g.tall, fetched,
                                                               first_col);
      if (g.product != nullptr)
        fetch<kStripRows, kLanes / kChunk, kStripThreads>(SideTile(stage + TallTile::kBytes),
                                                          g.side, fetched, first_rank);
      fetched += kStripRows;
    }
    copy_async_commit();
    filled = filled + 1 == kStripStages ? 0 : filled + 1;
  };
  if (g.through != nullptr) /* in the first group */
    fetch<kStripColumns, kLanes / kChunk, kStripThreads>(up, g.up, first_col, first_rank);
  for (int i = 0; i < kStripStages - 1; ++i) fetch_next();

  constexpr int kDown = 2; /* fragments of 16 columns that a warp sums */
  const int column = 16 * kDown * warp;
  float product[kDown][kLanes / 8][4] = {}, totals[kDown][4] = {};
  const uint32_t one = pack_rounded<T>(1.0f, 1.0f), ones[2] = {one, one};
  int stage = 0;
  for (int64_t row = first; row < end; row += kStripRows) {
    const TallTile tall(stages + stage * kStripStageBytes);
    const SideTile side(stages + stage * kStripStageBytes + TallTile::kBytes);
    copy_async_wait<kStripStages - 2>();
    if (masked)
      drop_own_chunks<kStripRows, kStripColumns / kChunk, kStripThreads>(tall, row, first_col,
                                                                         g.mask, seed);
    __syncthreads();
    fetch_next();
    if (g.through != nullptr) {
      float through[kLanes / 8][4] = {};
#pragma unroll 2
      for (int slice = 0; slice < kStripColumns / 16; ++slice) {
        uint32_t left[4];
        left_fragment(left, tall, 16 * warp, 2 * slice, lane);
#pragma unroll
        for (int j = 0; j < kLanes / 8; j += 2) {
          if (8 * j >= ranks) continue;
          uint32_t right[2][2];
          right_fragments_across(right, up, 16 * slice, j, lane);
          multiply<T>(through[j], left, right[0]);
          multiply<T>(through[j + 1], left, right[1]);
        }
      }
      store_lanes(g.through + blockIdx.x * g.tall.rows * g.ranks, g.ranks, 1, through,
                  row + 16 * warp + lane / 4, g.tall.rows, first_rank, g.ranks, lane);
    }
#pragma unroll
    for (int slice = 0; slice < kStripRows / 16; ++slice) {
      uint32_t left[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        left_fragment_across(left[i], tall, 16 * slice, column / kChunk + 2 * i, lane);
      if (g.totals != nullptr)
#pragma unroll
        for (int i = 0; i < kDown; ++i) multiply<T>(totals[i], left[i], ones);
      if (g.product == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kLanes / 8; j += 2) {
        if (8 * j >= ranks) continue;
        uint32_t right[2][2];
        right_fragments_across(right, side, 16 * slice, j, lane);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply<T>(product[i][j], left[i], right[0]);
          multiply<T>(product[i][j + 1], left[i], right[1]);
        }
      }
    }
    stage = stage + 1 == kStripStages ? 0 : stage + 1;
  }

  const int64_t columns = g.tall.cols;
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    const int64_t c = first_col + column + 16 * i + lane / 4;
    if (g.product != nullptr)
      store_lanes(g.product + blockIdx.z * columns * g.ranks, g.col_step, g.rank_step, product[i],
                  c, columns, first_rank, g.ranks, lane);
    if (g.totals != nullptr && first_rank == 0 && lane % 4 == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (c + 8 * half < columns)
          g.totals[blockIdx.z * columns + c + 8 * half] = totals[i][2 * half];
  }
}

}  // namespace deltaops::ampere
#endif
