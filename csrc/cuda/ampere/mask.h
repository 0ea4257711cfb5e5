/* mask.h: the dropout mask where it is needed: on chunks of x in shared memory, and on the
 * accumulators of a tile of dx.   (csrc/include/philox.h)
 */
#ifndef DELTAOPS_CUDA_AMPERE_MASK_H
#define DELTAOPS_CUDA_AMPERE_MASK_H

#include "ampere/tile.h"
#include "philox.h"
#include "primitives/quad.h"

namespace deltaops::ampere {

/* Elements whose draw is below the threshold are dropped; 0: none is, and seed is not read. */
struct Mask {
  const uint64_t *seed; /* on the GPU */
  uint32_t stream, threshold;
};

/* The draws of columns 8 group ... 8 group + 7 of a row, two in a word. */
__device__ __forceinline__ void draw_group(uint32_t (&words)[4], int64_t row, int64_t group,
                                           uint32_t stream, uint64_t seed) {
  words[0] = static_cast<uint32_t>(group);
  words[1] = static_cast<uint32_t>(row);
  words[2] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  words[3] = stream;
  deltaops_philox(words, seed);
}

/* Bits 0 and 1: which of a word's two draws are kept. */
__device__ __forceinline__ uint32_t kept(uint32_t word, uint32_t threshold) {
  return static_cast<uint32_t>((word & 0xFFFFu) >= threshold) |
         static_cast<uint32_t>((word >> 16) >= threshold) << 1;
}

/* Eight elements of a row, those that are dropped as 0: columns 8 group ... 8 group + 7. */
__device__ __forceinline__ uint4 dropped(const uint4 &values, int64_t row, int64_t group,
                                         const Mask &mask, uint64_t seed) {
  uint32_t words[4];
  draw_group(words, row, group, mask.stream, seed);
  const auto dropped_to_0 = [&](uint32_t pair, uint32_t word) {
    const uint32_t keep = kept(word, mask.threshold);
    return pair & ((keep & 1 ? 0xFFFFu : 0u) | (keep & 2 ? 0xFFFF0000u : 0u));
  };
  return make_uint4(dropped_to_0(values.x, words[0]), dropped_to_0(values.y, words[1]),
                    dropped_to_0(values.z, words[2]), dropped_to_0(values.w, words[3]));
}

/* Zeros what is dropped among the chunks of a tile of x that this thread brought, before the
 * barrier that shows them to the others. */
template <int kRows, int kChunks, int kThreads>
__device__ __forceinline__ void drop_own_chunks(const Tile<kRows, kChunks> &tile, int64_t first_row,
                                                int64_t first_col, const Mask &mask,
                                                uint64_t seed) {
  for_own_chunks<kRows, kChunks, kThreads>([&](int row, int chunk) {
    uint4 *values = tile.at(row, chunk);
    *values = dropped(*values, first_row + row, first_col / kChunk + chunk, mask, seed);
  });
}

/* Which of this lane's accumulators are kept in one row of four fragments [16, 8] side by side,
 * from column group `group` on: bits 2 j and 2 j + 1 for fragment j. The four lanes that share the
 * row make the draws of one fragment each; lane q of them then needs word q of each. */
__device__ __forceinline__ uint32_t kept_in_row(int64_t row, int64_t group, const Mask &mask,
                                                uint64_t seed, int lane) {
  uint32_t words[4];
  draw_group(words, row, group + lane % 4, mask.stream, seed);
  transpose_quad(words, lane);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) bits |= kept(words[j], mask.threshold) << (2 * j);
  return bits;
}

__device__ __forceinline__ float keep_scale(uint32_t threshold) {
  return threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
}

}  // namespace deltaops::ampere
#endif
