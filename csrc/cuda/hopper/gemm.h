/* gemm.h: the two products of delta_linear on Hopper, each output in one accumulator.
 *
 *     forward       y  = x W^T + S B^T + bias            x [M,K]  W [N,K]  S [M,R]  B [N,R]
 *     input grad    dx = mask * (dS A) + sum_i dy_i W_i  dy [M,N] W [N,K]  dS [M,R] A [R,K]
 *
 * fp16 or bf16, accumulated in fp32, rounded once. Both are sums of products left right over
 * segments of contracted elements, and one loop runs through all of them; edges that are no whole
 * tile arrive as zeros from the copy engine. Forward, the right operand has the contracted
 * dimension contiguous (Major::kInner), for the gradient the other one (kOuter). The mask, Philox
 * draws of csrc/include/philox.h times 65536 / (65536 - threshold), acts on the first segment's sum
 * in registers, before the second is added. Several outputs of the same left rows go in one launch.
 *
 * A block of three warpgroups stays on its SM and takes tiles of 128 x kColumns as schedule.h says.
 * One thread of the first asks the copy engine for chunks of 64 contracted elements, into a ring of
 * stages; the other two warpgroups multiply 64 rows each. Two blocks may be a cluster, which has
 * the same columns of two neighbouring rows of tiles: each reads half of the right tile for both.
 * Traffic of a tile: (128 + kColumns / blocks of a cluster) * 2 bytes for each contracted element,
 * read through L2, and 256 * kColumns bytes written. These go through shared memory and the copy
 * engine too, which writes them while the next tile's products run, and leaves out what lies
 * outside the matrix.
 */
#ifndef DELTAOPS_CUDA_GEMM_H
#define DELTAOPS_CUDA_GEMM_H

#include "hopper/arguments.h"
#include "philox.h"
#include "primitives/cluster.h"
#include "primitives/element.h"
#include "primitives/flag.h"
#include "primitives/mbarrier.h"
#include "primitives/quad.h"
#include "primitives/tensor_store.h"
#include "primitives/warpgroup.h"
#include "primitives/wgmma.h"

namespace deltaops::hopper {

/* kSides: some blocks make the left of the second segment meanwhile, as project.h says. */
template <typename T, int kColumns_, Major kRight_, bool kSides_ = false>
struct Gemm {
  using Element = T;                         /* __nv_bfloat16 or __half */
  static constexpr int kColumns = kColumns_; /* of a tile */
  static constexpr Major kRight = kRight_;
  static constexpr bool kSides = kSides_;
  static constexpr int kGroupRows = 64; /* of a warpgroup */
  static constexpr int kRows = 2 * kGroupRows;
  static constexpr int kChunk = 64; /* contracted elements of a stage: 128 bytes */
  static constexpr int kThreads = 3 * 128;
  static constexpr uint32_t kLeftBytes = kRows * kChunk * 2;
  static constexpr uint32_t kRightBytes = kColumns * kChunk * 2;
  static constexpr uint32_t kBoxBytes = 64 * kSwizzleRow; /* 64 x 64: of kOuter, and stored */
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStages = kColumns == 256 ? 4 : 6;
  /* A warpgroup stores kBatch boxes at a time, from kBuffers places in turn. */
  static constexpr int kBoxes = kColumns / 64;
  static constexpr int kBatch = 1, kBuffers = 2;
  static_assert(kBoxes % (kBatch * kBuffers) == 0, "a tile begins with the first place");
  static constexpr uint32_t kStagingBytes = kBatch * kBuffers * kBoxBytes;
  static constexpr uint32_t kBarrierBytes = 2 * kStages * sizeof(uint64_t);
  /* Of dynamic shared memory; the first is for the alignment of the swizzle. */
  static constexpr uint32_t kSharedBytes =
      kSwizzleAtom + kStages * kStageBytes + 2 * kStagingBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have");
  /* 65536 registers: 40 * 128 + 232 * 256 are 64512. */
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  /* The right tile comes in two halves, of kInner a box each. */
  static constexpr int kHalf = kColumns / 2;
};

/* The stages in shared memory and whose turn it is. */
template <class G>
struct Ring {
  uint8_t *tiles;
  uint64_t *full, *empty; /* barriers, a pair for each stage */
  int stage = 0;
  uint32_t parity = 0; /* of the phase of `full` that this round waits for */

  __device__ __forceinline__ explicit Ring(uint8_t *shared) {
    const uint32_t over = shared_address(shared) % kSwizzleAtom;
    tiles = shared + (over ? kSwizzleAtom - over : 0);
    full = reinterpret_cast<uint64_t *>(staging(2));
    empty = full + G::kStages;
  }
  /* Where warpgroup 0 or 1 puts what it stores. */
  __device__ __forceinline__ uint8_t *staging(int group) const {
    return tiles + G::kStages * G::kStageBytes + group * G::kStagingBytes;
  }
  __device__ __forceinline__ uint8_t *left() const { return tiles + stage * G::kStageBytes; }
  __device__ __forceinline__ uint8_t *right() const { return left() + G::kLeftBytes; }
  __device__ __forceinline__ void advance() {
    if (++stage == G::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/* Calls body(tile) for the tiles of this block, in order. The schedule is of clusters, which take
 * as many rows of tiles as they have blocks; of the last cluster's, one may lie outside. */
template <class G, typename Body>
__device__ __forceinline__ void for_each_tile(const GemmArguments &arguments, Body body) {
  const Schedule &schedule = arguments.schedule;
  const int size = cluster_size(), rank = cluster_rank();
  const uint32_t aside = G::kSides ? arguments.sides.blocks : 0;
  const int64_t tiles = schedule.tiles(), step = (gridDim.x - aside) / size;
  for (int64_t number = (blockIdx.x - aside) / size; number < tiles; number += step) {
    Tile tile = schedule.at(number);
    tile.row = tile.row * size + rank;
    body(tile);
  }
}

/* Half a right tile, of columns from `column` on, to this block and the others of its cluster. */
template <class G>
__device__ __forceinline__ void copy_half(uint8_t *to, const TensorMap *right, int32_t column,
                                          int32_t k, uint64_t *full, bool alone) {
  const auto copy = [&](uint8_t *box, int32_t box_row, int32_t box_column) {
    if (alone)
      tensor_copy(box, right, box_row, box_column, full);
    else
      tensor_copy_to_all(box, right, box_row, box_column, full);
  };
  if constexpr (G::kRight == Major::kInner) {
    copy(to, column, k);
  } else {
#pragma unroll
    for (int box = 0; box < G::kHalf / 64; ++box)
      copy(to + box * G::kBoxBytes, k, column + 64 * box);
  }
}

/* One thread: keeps the ring filled, and its half of the other block's right tiles. */
template <class G>
__device__ __forceinline__ void produce(const GemmArguments &arguments, Ring<G> ring) {
  const int size = cluster_size(), rank = cluster_rank();
  for (int32_t i = 0; i < arguments.schedule.outputs; ++i) {
    const Output &output = arguments.output[i];
    for (int32_t s = output.first_segment; s < output.first_segment + output.segments; ++s) {
      tensor_map_prefetch(&arguments.left[s]);
      tensor_map_prefetch(&arguments.right[s]);
    }
    if (output.segments > 0) tensor_map_prefetch(&arguments.out[i]);
  }
  for_each_tile<G>(arguments, [&](const Tile &tile) {
    const Output &output = arguments.output[tile.output];
    const int32_t row = tile.row * G::kRows, column = tile.column * G::kColumns;
    for (int32_t s = output.first_segment; s < output.first_segment + output.segments; ++s) {
      const TensorMap *left = &arguments.left[s], *right = &arguments.right[s];
      if constexpr (G::kSides) {
        const Sides &sides = arguments.sides;
        if (s > output.first_segment && row < sides.rows) flag_wait(&sides.flags[tile.row]);
      }
      for (int32_t k = 0; k < arguments.length[s]; k += G::kChunk) {
        uint64_t *full = &ring.full[ring.stage];
        mbarrier_wait(&ring.empty[ring.stage], ring.parity ^ 1); /* of all blocks it fills */
        mbarrier_arrive_expecting(full, G::kStageBytes);
        tensor_copy(ring.left(), left, row, k, full);
        for (int half = rank; half < 2; half += size)
          copy_half<G>(ring.right() + half * (G::kRightBytes / 2), right, column + half * G::kHalf,
                       k, full, size == 1);
        ring.advance();
      }
    }
  });
}

/* Where this thread's accumulators lie in the output; see wgmma.h. */
struct Fragment {
  int32_t row;    /* of acc[4 j] and acc[4 j + 1]; 8 more for the next two */
  int32_t column; /* of the tile's first; a block j of eight begins 8 j further on */
  int32_t quad;   /* this thread has columns 2 quad and 2 quad + 1 of each block */
};

/* Drops and scales the accumulators. The draws of eight columns are one Philox call, of which a
 * thread needs one word: four threads make four calls and exchange words. Warps that have nothing
 * else to do could make the mask ahead, but not for less: while they calculate, the tensor cores
 * are slower by as much (an H200, dx [8192,4096] of 4096 columns: 378 us so, 374 here, 353 without
 * a mask). */
template <int kCount>
__device__ __forceinline__ void apply_mask(float (&acc)[kCount], const Fragment &at,
                                           const Mask &mask, uint64_t seed) {
#pragma unroll
  for (int j = 0; j < kCount / 4; j += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t draws[4] = {static_cast<uint32_t>(at.column / 8 + j + at.quad),
                           static_cast<uint32_t>(at.row + 8 * half), 0, mask.stream};
      deltaops_philox(draws, seed);
      transpose_quad(draws, threadIdx.x % 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float *pair = &acc[4 * (j + i) + 2 * half];
        pair[0] = (draws[i] & 0xFFFFu) >= mask.threshold ? pair[0] * mask.scale : 0.0f;
        pair[1] = (draws[i] >> 16) >= mask.threshold ? pair[1] * mask.scale : 0.0f;
      }
    }
  }
}

/* Adds the bias and rounds 64 columns, from block j of eight on, into a box. */
template <typename T, int kCount>
__device__ __forceinline__ void fill_box(const float (&acc)[kCount], int j, const Fragment &at,
                                         const Output &output, uint8_t *box) {
  const auto *bias = static_cast<const T *>(output.bias);
  float add[8][2] = {}; /* loaded together: one latency */
  if (bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int32_t column = at.column + 8 * (j + i / 2) + 2 * at.quad + i % 2;
      if (column < output.columns) add[i / 2][i % 2] = to_float(bias[column]);
    }
  }
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  /* Of four matrices: 8 rows and the next 8 of a block of eight columns, then of the next block. */
  const uint32_t mine = row * kSwizzleRow + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
  for (int piece = 0; piece < 8; piece += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = piece + i / 2;
      const float *pair = &acc[4 * (j + block) + 2 * (i % 2)];
      words[i] = pack_rounded<T>(pair[0] + add[block][0], pair[1] + add[block][1]);
    }
    store_matrix(box + (mine ^ piece << 4), words);
  }
}

/* Writes this warpgroup's rows of a tile, from `row` on, by the copy engine: the next tile's
 * products run while it stores. `staging` is this warpgroup's. */
template <class G>
__device__ __forceinline__ void store(const float (&acc)[G::kColumns / 2], const Fragment &at,
                                      const Output &output, const TensorMap *map, int32_t row,
                                      uint8_t *staging, int group) {
  const bool issues = threadIdx.x % 128 == 0;
#pragma unroll
  for (int first = 0; first < G::kBoxes; first += G::kBatch) {
    uint8_t *const buffer = staging + first % (G::kBatch * G::kBuffers) * G::kBoxBytes;
    if (issues) tensor_store_wait<G::kBuffers - 1>(); /* for what was in this buffer */
    warpgroup_sync(group);
#pragma unroll
    for (int i = 0; i < G::kBatch; ++i)
      fill_box<typename G::Element>(acc, 8 * (first + i), at, output, buffer + i * G::kBoxBytes);
    tensor_store_fence();
    warpgroup_sync(group);
    if (issues) {
#pragma unroll
      for (int i = 0; i < G::kBatch; ++i)
        tensor_store(map, row, at.column + 64 * (first + i), buffer + i * G::kBoxBytes);
      tensor_store_commit();
    }
  }
}

/* Two warpgroups: 64 rows of each tile are this one's, `group` 0 or 1. */
template <class G>
__device__ __forceinline__ void consume(const GemmArguments &arguments, Ring<G> ring, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32, blocks = cluster_size();
  /* In each block that fills it: one lane arrives there. */
  const auto release = [&](int stage) {
    if (lane < blocks) mbarrier_arrive_at(&ring.empty[stage], lane);
  };
  for_each_tile<G>(arguments, [&](const Tile &tile) {
    const Output &output = arguments.output[tile.output];
    const int32_t row = tile.row * G::kRows + group * G::kGroupRows;
    const Fragment at = {row + thread / 32 * 16 + lane / 4, tile.column * G::kColumns, lane % 4};
    float acc[G::kColumns / 2];
    bool more = false; /* acc holds something */
    int running = -1;  /* the stage that the batch before this one reads */
    for (int32_t s = 0; s < output.segments; ++s) {
      const int32_t length = arguments.length[output.first_segment + s];
      for (int32_t k = 0; k < length; k += G::kChunk) {
        mbarrier_wait(&ring.full[ring.stage], ring.parity);
        const uint64_t left = wgmma_tile<Major::kInner>(
            shared_address(ring.left()) + group * G::kGroupRows * kSwizzleRow, 0);
        const uint64_t right = wgmma_tile<G::kRight>(shared_address(ring.right()), G::kBoxBytes);
        const auto multiply = [&](int step) {
          wgmma<typename G::Element, G::kColumns, G::kRight>(
              acc, left + step * kWgmmaStep<Major::kInner>, right + step * kWgmmaStep<G::kRight>,
              more);
          more = true;
        };
        wgmma_touch(acc);
        if (length - k >= G::kChunk) {
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < G::kChunk / 16; ++step) multiply(step);
          wgmma_commit();
        } else { /* beyond the end are zeros only */
#pragma unroll 1
          for (int step = 0; k + 16 * step < length; ++step) {
            wgmma_fence();
            multiply(step);
            wgmma_commit();
          }
        }
        wgmma_touch(acc);
        wgmma_wait<1>();
        if (running >= 0) release(running);
        running = ring.stage;
        ring.advance();
      }
      if constexpr (G::kRight == Major::kOuter) {
        if (s == 0 && output.mask.threshold) {
          wgmma_wait<0>();
          wgmma_touch(acc);
          apply_mask(acc, at, output.mask, *output.mask.seed);
        }
      }
    }
    wgmma_wait<0>();
    wgmma_touch(acc);
    release(running);
    store<G>(acc, at, output, &arguments.out[tile.output], row, ring.staging(group), group);
  });
  if (thread == 0) tensor_store_wait<0>(); /* the engine reads shared memory until then */
}

/* Initialises the barriers of the ring, whose stages `readers` warps give back. */
template <class G>
__device__ __forceinline__ void start(const Ring<G> &ring, int readers) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < G::kStages; ++stage) {
      mbarrier_init(&ring.full[stage], 1); /* the producer, with its bytes */
      mbarrier_init(&ring.empty[stage], readers);
    }
    mbarrier_init_done();
  }
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmArguments arguments) {
  const Ring<G> ring(dynamic_shared());
  start(ring, 8 * cluster_size()); /* the warps that multiply */
  cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    registers_down<G::kProducerRegisters>();
    if (threadIdx.x == 0) produce<G>(arguments, ring);
  } else {
    registers_up<G::kConsumerRegisters>();
    consume<G>(arguments, ring, warpgroup - 1);
  }
  cluster_sync(); /* until then the other block reaches into this one */
}

}  // namespace deltaops::hopper

#endif
