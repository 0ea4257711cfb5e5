/* mask.h: dropout masks as bits, eight elements to a byte.
 *
 * One Philox call makes the eight draws of elements 8 g ... 8 g + 7 of a row, so it makes exactly
 * byte g of that row. The loop over g calls the normative function of philox.h and is vectorised
 * by the compiler: lanes are groups, and 32 x 32 -> 64 bit products are native on every ISA.
 * A bit is 1 where the element is kept. A dropped element is replaced by 0, never multiplied, so
 * that Inf and NaN do not come through.
 */
#ifndef DELTAOPS_CPU_MASK_H
#define DELTAOPS_CPU_MASK_H

#include "philox.h"
#include "vec.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* bits[g] for the groups first ... first + count - 1 of row m. */
void keep_bits(uint8_t *__restrict bits, int64_t m, int64_t first, int64_t count, uint64_t seed,
               uint32_t stream, uint32_t threshold) {
  const uint32_t row_lo = static_cast<uint32_t>(m);
  const uint32_t row_hi = static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32);
  const uint32_t group = static_cast<uint32_t>(first);
  for (int64_t g = 0; g < count; ++g) {
    uint32_t c[4] = {group + static_cast<uint32_t>(g), row_lo, row_hi, stream};
    deltaops_philox(c, seed);
    uint32_t byte = 0;
    for (int word = 0; word < 4; ++word) {
      byte |= ((c[word] & 0xFFFFu) >= threshold ? 1u : 0u) << (2 * word);
      byte |= ((c[word] >> 16) >= threshold ? 2u : 0u) << (2 * word);
    }
    bits[g] = static_cast<uint8_t>(byte);
  }
}

/* v where element k + lane of the row is kept, 0 elsewhere. k is a multiple of kLanes; bits holds
 * the row from element 0 on. */
DELTAOPS_INLINE VecF keep(VecF v, const uint8_t *bits, int64_t k) {
#if DELTAOPS_VECTOR_BYTES == 16
  const uint32_t word = static_cast<uint32_t>(bits[k / 8]) >> (k & 4);
  const VecU lane = {1, 2, 4, 8};
#elif DELTAOPS_VECTOR_BYTES == 32
  const uint32_t word = bits[k / 8];
  const VecU lane = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  const uint32_t word = bits[k / 8] | static_cast<uint32_t>(bits[k / 8 + 1]) << 8;
  const VecU lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#endif
  const VecU kept = (VecU)(((word - VecU{}) & lane) == lane);
  return (VecF)((VecU)v & kept);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
