/* schedule.h: in which order the tiles of a launch are computed, and by which block.
 *
 * A launch writes up to kMaxOutputs matrices of the same rows. Their columns of tiles are numbered
 * on, one matrix after the other, and blocks take tile numbers b, b + grid, b + 2 grid ... A band
 * of some rows of tiles is finished before the next begins, column by column: the blocks that run
 * at one time then share rows of the left and columns of the right operands, which stay in L2.
 * Of a launch in clusters this is the order of clusters: a "tile" here is as many tiles, one above
 * the other, as a cluster has blocks.
 */
#ifndef DELTAOPS_CUDA_SCHEDULE_H
#define DELTAOPS_CUDA_SCHEDULE_H

#include <stdint.h>

#if defined(__CUDACC__)
#define DELTAOPS_ANYWHERE __host__ __device__ __forceinline__
#else
#define DELTAOPS_ANYWHERE inline
#endif

namespace deltaops::hopper {

constexpr int kMaxOutputs = 4; /* q, k and v; gate and up */

struct Tile {
  int32_t output; /* which matrix */
  int32_t row;    /* in tiles */
  int32_t column; /* in tiles, of that matrix */
};

struct Schedule {
  static constexpr int32_t kBand = 8;

  int32_t rows;                 /* of tiles */
  int32_t band = kBand;         /* rows of tiles that are finished before the next */
  int32_t outputs;              /* 1 to kMaxOutputs */
  int32_t columns[kMaxOutputs]; /* of tiles, of each matrix */

  DELTAOPS_ANYWHERE int64_t tiles() const {
    int64_t all = 0;
    for (int i = 0; i < outputs; ++i) all += columns[i];
    return all * rows;
  }

  DELTAOPS_ANYWHERE Tile at(int64_t number) const {
    const int64_t across = tiles() / rows;
    const int32_t first = static_cast<int32_t>(number / (across * band)) * band;
    const int32_t height = rows - first < band ? rows - first : band;
    const int64_t inside = number - across * first;
    Tile tile = {0, static_cast<int32_t>(first + inside % height),
                 static_cast<int32_t>(inside / height)};
    while (tile.column >= columns[tile.output]) tile.column -= columns[tile.output++];
    return tile;
  }
};

}  // namespace deltaops::hopper

#endif
