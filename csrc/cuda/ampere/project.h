/* project.h: the down-projection     S = s * drop(x) A^T     with mma.sync
 *
 *     x [M,K]  A [R,K]  S [M,R]; fp32 sums, s and the keep scale once, then S in fp32 and, for the
 *     product that reads it, in the dtype of x.
 *
 * A block makes 64 rows of up to 64 ranks, of all contracted elements or, where M alone gives too
 * few blocks, of a piece of them: a partial sum, which reduce.h adds up in the order of the pieces.
 * x is masked in shared memory by the threads that copied it. Traffic: x once for each 64 ranks,
 * 6 M R bytes written; A from L2. Memory-bound.
 */
#ifndef DELTAOPS_CUDA_AMPERE_PROJECT_H
#define DELTAOPS_CUDA_AMPERE_PROJECT_H

#include "ampere/mask.h"
#include "ampere/tile.h"

namespace deltaops::ampere {

constexpr int kLanes = 64; /* ranks of a block, here and in columns.h */
constexpr int kProjectRows = 64, kProjectStep = 64, kProjectThreads = 128, kProjectStages = 4;

struct ProjectArguments {
  Matrix x, a;
  Mask mask;
  float scale;    /* with the keep scale; of what is final, so 1 where partial is written */
  float *partial; /* [pieces, M, R], or NULL: then s and narrow are */
  float *s;       /* may be NULL */
  void *narrow;   /* of the dtype of x; may be NULL */
  int64_t s_stride, narrow_stride;
  int32_t ranks, piece; /* contracted elements of a piece, a multiple of kProjectStep */
};

using ProjectTile = Tile<kProjectRows, kProjectStep / kChunk>;
constexpr int kProjectShared = kProjectStages * 2 * ProjectTile::kBytes;
static_assert(kProjectShared <= kLeastShared);

/* Blocks: (rows / 64, ranks / 64, pieces). */
template <typename T>
__global__ void __launch_bounds__(kProjectThreads)
    project_kernel(const __grid_constant__ ProjectArguments g) {
  unsigned char *shared = dynamic_shared();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kProjectRows;
  const int first_rank = static_cast<int>(blockIdx.y) * kLanes;
  const int first = static_cast<int>(blockIdx.z) * g.piece;
  const int end = g.x.cols - first < g.piece ? g.x.cols : first + g.piece;
  const int ranks = g.ranks - first_rank < kLanes ? g.ranks - first_rank : kLanes;
  const bool masked = g.mask.threshold > 0;
  const uint64_t seed = masked ? *g.mask.seed : 0;

  int fetched = first, filled = 0;
  const auto fetch_next = [&] {
    if (fetched < end) {
      unsigned char *stage = shared + filled * 2 * ProjectTile::kBytes;
      fetch<kProjectRows, kProjectStep / kChunk, kProjectThreads>(ProjectTile(stage), g.x,
                                                                  first_row, fetched);
      fetch<kLanes, kProjectStep / kChunk, kProjectThreads>(
          ProjectTile(stage + ProjectTile::kBytes), g.a, first_rank, fetched);
      fetched += kProjectStep;
    }
    copy_async_commit();
    filled = filled + 1 == kProjectStages ? 0 : filled + 1;
  };
  for (int i = 0; i < kProjectStages - 1; ++i) fetch_next();

  float sums[kLanes / 8][4] = {};
  int stage = 0;
  for (int k = first; k < end; k += kProjectStep) {
    const ProjectTile x(shared + stage * 2 * ProjectTile::kBytes);
    const ProjectTile a(shared + (stage * 2 + 1) * ProjectTile::kBytes);
    copy_async_wait<kProjectStages - 2>();
    if (masked)
      drop_own_chunks<kProjectRows, kProjectStep / kChunk, kProjectThreads>(x, first_row, k, g.mask,
                                                                            seed);
    __syncthreads();
    fetch_next();
#pragma unroll
    for (int slice = 0; slice < kProjectStep / 16; ++slice) {
      uint32_t left[4];
      left_fragment(left, x, 16 * warp, 2 * slice, lane);
#pragma unroll
      for (int j = 0; j < kLanes / 8; j += 2) {
        if (8 * j >= ranks) continue;
        uint32_t right[2][2];
        right_fragments(right, a, 8 * j, 2 * slice, lane);
        multiply<T>(sums[j], left, right[0]);
        multiply<T>(sums[j + 1], left, right[1]);
      }
    }
    stage = stage + 1 == kProjectStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int j = 0; j < kLanes / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t m = first_row + 16 * warp + lane / 4 + e / 2 * 8;
      const int r = first_rank + 8 * j + 2 * (lane % 4) + e % 2;
      if (m >= g.x.rows || r >= g.ranks) continue;
      const float value = g.scale * sums[j][e];
      if (g.partial != nullptr) g.partial[(blockIdx.z * g.x.rows + m) * g.ranks + r] = value;
      if (g.s != nullptr) g.s[m * g.s_stride + r] = value;
      if (g.narrow != nullptr)
        static_cast<T *>(g.narrow)[m * g.narrow_stride + r] = from_float<T>(value);
    }
}

}  // namespace deltaops::ampere
#endif
