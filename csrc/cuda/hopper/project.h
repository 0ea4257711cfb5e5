/* project.h: a LoRA layer's forward in one launch on Hopper, S made by the blocks left over.
 *
 *     S = scaling * x A^T          x [M,K]  A [R,K]          R up to 64
 *     y = x W^T + S B^T + bias     W [N,K]  B [N,R]          see gemm.h
 *
 * The products of gemm.h take their tiles in rounds, and rarely need every SM for as many rounds.
 * The first `sides` blocks take none: block i makes S of the rows of tiles i, i + sides, ..., in
 * fp32, rounded once, and sets the flag of each; it reads x once, and A from L2. The others begin
 * with x W^T, and wait for the flag before the last segment, S B^T, of each of their tiles. Tiles
 * are computed in bands from the top, and S in the same order, so that it is there in time where
 * a few SMs read x no slower than all others multiply it.
 *
 * The blocks that make S wait for no other block, and in a cooperative launch all blocks run at one
 * time: so every flag that is waited for will be set.
 *
 * They read with the ring of gemm.h. A stage has room for two chunks of x, which come with the
 * same chunks of A: latency is hidden by the bytes under way. Products are of 16, 32 or 64 columns,
 * R rounded up; the rows of A beyond R arrive as zeros.
 */
#ifndef DELTAOPS_CUDA_PROJECT_H
#define DELTAOPS_CUDA_PROJECT_H

#include "hopper/gemm.h"

namespace deltaops::hopper {

constexpr int kSideChunks = 2; /* of a stage */

template <class G>
constexpr bool kHasRoom = kSideChunks * (G::kLeftBytes + 64 * kSwizzleRow) <= G::kStageBytes;

/* One thread: keeps the ring filled with x and A. */
template <class G>
__device__ __forceinline__ void produce_sides(const GemmArguments &arguments, Ring<G> ring) {
  static_assert(kHasRoom<G>, "two chunks of x and A in a stage");
  const Sides &sides = arguments.sides;
  const uint32_t of_a = sides.width * kSwizzleRow;
  tensor_map_prefetch(&arguments.left[0]);
  tensor_map_prefetch(&sides.a);
  for (int32_t row = blockIdx.x * G::kRows; row < sides.rows; row += sides.blocks * G::kRows)
    for (int32_t k = 0; k < arguments.length[0]; k += kSideChunks * G::kChunk) {
      uint64_t *full = &ring.full[ring.stage];
      mbarrier_wait(&ring.empty[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expecting(full, kSideChunks * (G::kLeftBytes + of_a));
#pragma unroll
      for (int i = 0; i < kSideChunks; ++i) {
        uint8_t *const a = ring.left() + kSideChunks * G::kLeftBytes + i * of_a;
        tensor_copy(ring.left() + i * G::kLeftBytes, &arguments.left[0], row, k + i * G::kChunk,
                    full);
        tensor_copy(a, &sides.a, 0, k + i * G::kChunk, full);
      }
      ring.advance();
    }
}

/* Two warpgroups: 64 rows of each row of tiles are this one's, `group` 0 or 1. */
template <class G, int kWidth>
__device__ __forceinline__ void project(const GemmArguments &arguments, Ring<G> ring, int group) {
  using T = typename G::Element;
  const Sides &sides = arguments.sides;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  for (int32_t tile = blockIdx.x; tile * G::kRows < sides.rows; tile += sides.blocks) {
    float acc[kWidth / 2];
    for (int32_t k = 0; k < arguments.length[0]; k += kSideChunks * G::kChunk) {
      mbarrier_wait(&ring.full[ring.stage], ring.parity);
      wgmma_touch(acc);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSideChunks; ++i) { /* beyond the end are zeros */
        const uint64_t left = wgmma_tile<Major::kInner>(
            shared_address(ring.left()) + i * G::kLeftBytes + group * G::kGroupRows * kSwizzleRow,
            0);
        const uint64_t right = wgmma_tile<Major::kInner>(
            shared_address(ring.left()) + kSideChunks * G::kLeftBytes + i * kWidth * kSwizzleRow,
            0);
#pragma unroll
        for (int step = 0; step < G::kChunk / 16; ++step)
          wgmma<T, kWidth, Major::kInner>(acc, left + step * kWgmmaStep<Major::kInner>,
                                          right + step * kWgmmaStep<Major::kInner>,
                                          k > 0 || i > 0 || step > 0);
      }
      wgmma_commit();
      wgmma_touch(acc);
      wgmma_wait<0>(); /* no batch ahead: a stage is wanted for the next copy sooner */
      wgmma_touch(acc);
      if (lane == 0) mbarrier_arrive(&ring.empty[ring.stage]);
      ring.advance();
    }
    const int32_t first = tile * G::kRows + group * G::kGroupRows + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const int32_t row = first + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (row >= sides.rows || column >= sides.ranks) continue;
      const float value = acc[i] * sides.scaling;
      if (sides.s != nullptr) sides.s[row * sides.s_stride + column] = value;
      publish(static_cast<T *>(sides.narrow) + row * sides.narrow_stride + column,
              from_float<T>(value));
    }
    publish_fence();
    warpgroups_sync();
    if (group == 0 && thread == 0) flag_set(&sides.flags[tile]);
  }
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1)
    project_gemm_kernel(const __grid_constant__ GemmArguments arguments) {
  const Ring<G> ring(dynamic_shared());
  const bool aside = blockIdx.x < static_cast<uint32_t>(arguments.sides.blocks);
  start(ring, aside ? 8 : 8 * cluster_size()); /* the warps that multiply */
  cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    registers_down<G::kProducerRegisters>();
    if (threadIdx.x == 0) {
      if (aside)
        produce_sides<G>(arguments, ring);
      else
        produce<G>(arguments, ring);
    }
  } else {
    registers_up<G::kConsumerRegisters>();
    if (!aside)
      consume<G>(arguments, ring, warpgroup - 1);
    else if (arguments.sides.width == 16)
      project<G, 16>(arguments, ring, warpgroup - 1);
    else if (arguments.sides.width == 32)
      project<G, 32>(arguments, ring, warpgroup - 1);
    else
      project<G, 64>(arguments, ring, warpgroup - 1);
  }
  cluster_sync(); /* until then the other block reaches into this one */
}

}  // namespace deltaops::hopper

#endif
