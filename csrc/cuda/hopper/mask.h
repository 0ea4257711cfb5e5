/* mask.h: the dropout mask of each tile of dx, made while the tile before it is multiplied.
 *
 *     mask(m, k) = draw(k, m, stream) >= threshold             draws of csrc/include/philox.h
 *
 * Of the warpgroup whose first thread feeds the ring of gemm.h, the other three warps have nothing
 * to do, and the integer units are free while the tensor cores work. So they make a tile's mask,
 * one bit an element, ahead: it waits in registers for its turn, and goes to those who multiply
 * through a stage of the ring, after the chunks of the first segment, on whose sum it acts. One
 * tile needs kColumns * 16 calls of Philox, and has the time of K / 64 chunks for them.
 */
#ifndef DELTAOPS_CUDA_HOPPER_MASK_H
#define DELTAOPS_CUDA_HOPPER_MASK_H

#include "hopper/arguments.h"
#include "philox.h"
#include "primitives/tensor_store.h"
#include "primitives/warpgroup.h"

namespace deltaops::hopper {

/* Of a tile of kRows x kColumns, as it lies in a stage. A word has what one thread needs of a span
 * of 128 columns in one row (wgmma.h): columns 2 quad and 2 quad + 1 of each eight, two bits each,
 * the first eight's lowest. Words of the quads of a row lie side by side, then rows, then spans. */
template <int kRows, int kColumns>
struct TileMask {
  static constexpr int kSpans = kColumns / 128;
  static constexpr int kMakers = 3 * 32; /* threads */
  static constexpr int kPieces = kSpans * kRows;
  static constexpr int kRounds = (kPieces + kMakers - 1) / kMakers;
  static constexpr int kWords = 2 * kSpans; /* of a thread that multiplies: it has two rows */

  /* What of it `maker` makes: in round i, the four words of piece maker + i kMakers. */
  struct Made {
    uint4 words[kRounds];
  };

  __device__ static __forceinline__ Made make(const Mask &mask, int32_t row, int32_t column,
                                              int maker) {
    const uint64_t seed = *mask.seed;
    Made made;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int piece = maker + i * kMakers;
      uint32_t words[4] = {};
      if (piece < kPieces) {
        const uint32_t first = static_cast<uint32_t>(column) / 8 + piece / kRows * 16;
#pragma unroll 4
        for (int eight = 0; eight < 16; ++eight) {
          uint32_t draws[4] = {first + eight, static_cast<uint32_t>(row + piece % kRows), 0,
                               mask.stream};
          deltaops_philox(draws, seed);
#pragma unroll
          for (int quad = 0; quad < 4; ++quad)
            words[quad] |= kept(draws[quad], mask.threshold) << 2 * eight;
        }
      }
      made.words[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return made;
  }

  /* All makers, once the stage is theirs; then one of them may say that it is full. */
  __device__ static __forceinline__ void put(const Made &made, uint8_t *stage, int maker) {
    auto *const pieces = reinterpret_cast<uint4 *>(stage);
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
      if (maker + i * kMakers < kPieces) pieces[maker + i * kMakers] = made.words[i];
    tensor_store_fence(); /* the copy engine fills the stage next */
    makers_sync();
  }

  /* The words of `row` and `row` + 8, of each of them for all spans. */
  __device__ static __forceinline__ void take(uint32_t (&words)[kWords], const uint8_t *stage,
                                              int row, int quad) {
    const auto *const from = reinterpret_cast<const uint32_t *>(stage);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = from[(i % kSpans * kRows + row + i / kSpans * 8) * 4 + quad];
  }

  /* Drops and scales the accumulators of these rows. */
  __device__ static __forceinline__ void apply(float (&acc)[kColumns / 2],
                                               const uint32_t (&words)[kWords], float scale) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const int block = i / 4, bit = block % 16 * 2 + i % 2;
      const uint32_t keep = words[i % 4 / 2 * kSpans + block / 16] >> bit & 1;
      acc[i] = keep ? acc[i] * scale : 0.0f;
    }
  }

 private:
  /* Bits 0 and 1: which of a word's two draws are kept. */
  __device__ static __forceinline__ uint32_t kept(uint32_t draws, uint32_t threshold) {
    return static_cast<uint32_t>((draws & 0xFFFFu) >= threshold) |
           static_cast<uint32_t>((draws >> 16) >= threshold) << 1;
  }
};

}  // namespace deltaops::hopper

#endif
