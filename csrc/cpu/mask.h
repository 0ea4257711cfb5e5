/* mask.h: dropout masks as bits, eight elements to a byte.
 *
 * One Philox call makes the eight draws of elements 8 g ... 8 g + 7 of a row, so it makes exactly
 * byte g of that row. Lanes are groups: each word of the state sits in the low half of a 64-bit
 * lane, where the 32 x 32 -> 64 bit product wants it, and what gathers in the high halves is never
 * read. A round is two products, two shifts and four xors for kLanes / 2 groups.
 * A bit is 1 where the element is kept. A dropped element is replaced by 0, never multiplied, so
 * that Inf and NaN do not come through. philox.h is the norm; tests hold the two equal.
 */
#ifndef DELTAOPS_CPU_MASK_H
#define DELTAOPS_CPU_MASK_H

#include "philox.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int kGroups = kLanes / 2;  // Philox calls in one vector

typedef uint64_t VecL __attribute__((vector_size(DELTAOPS_VECTOR_BYTES)));
typedef uint16_t VecS __attribute__((vector_size(DELTAOPS_VECTOR_BYTES)));

/* The product of the low halves. Written out as a product, compilers make three of it. */
DELTAOPS_INLINE VecL multiply_low(VecL a, VecL b) {
#if DELTAOPS_VECTOR_BYTES == 16 && defined(__SSE2__)
  return (VecL)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif DELTAOPS_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecL)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif DELTAOPS_VECTOR_BYTES == 64 && defined(__AVX512F__)
  // The masked form with a full mask: GCC 12 warns of its own header in the plain one.
  return (VecL)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

/* bits[g] for the groups first ... first + count - 1 of row m. */
void keep_bits(uint8_t *bits, int64_t m, int64_t first, int64_t count, uint64_t seed,
               uint32_t stream, uint32_t threshold) {
  if (threshold > 0xFFFFu) {  // no draw reaches it, and it does not fit into 16 bits
    memset(bits, 0, static_cast<size_t>(count));
    return;
  }
  VecL lane;
  DELTAOPS_UNROLL
  for (int i = 0; i < kGroups; ++i) lane[i] = static_cast<uint64_t>(i);
  VecL weight_lo = 0x0008000400020001u - VecL{}, weight_hi = 0x0080004000200010u - VecL{};
  const VecS limit = static_cast<uint16_t>(threshold) - VecS{};
  const VecL m0 = DELTAOPS_PHILOX_M0 - VecL{}, m1 = DELTAOPS_PHILOX_M1 - VecL{};
  const uint64_t row = static_cast<uint64_t>(m);
  for (int64_t g = 0; g < count; g += kGroups) {
    VecL c0 = static_cast<uint64_t>(first + g) + lane, c1 = (row & 0xFFFFFFFFu) - VecL{};
    VecL c2 = (row >> 32) - VecL{}, c3 = uint64_t{stream} - VecL{};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    DELTAOPS_UNROLL
    for (int round = 0; round < DELTAOPS_PHILOX_ROUNDS; ++round) {
      const VecL p0 = multiply_low(c0, m0), p1 = multiply_low(c2, m1);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
      c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
      c1 = p1;
      c3 = p0;
      k0 += DELTAOPS_PHILOX_W0;
      k1 += DELTAOPS_PHILOX_W1;
    }
    // Draws 0 ... 3 and 4 ... 7 as the four 16-bit parts of a lane; then their bits gathered.
    const VecS lo = (VecS)((c0 & 0xFFFFFFFFu) | c1 << 32);
    const VecS hi = (VecS)((c2 & 0xFFFFFFFFu) | c3 << 32);
    VecL byte = ((VecL)(lo >= limit) & weight_lo) | ((VecL)(hi >= limit) & weight_hi);
    byte |= byte >> 32;
    byte |= byte >> 16;
#if DELTAOPS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    if (g + kGroups <= count) {  // eight bytes at once
      _mm_storel_epi64(reinterpret_cast<__m128i *>(bits + g),
                       _mm512_maskz_cvtepi64_epi8(0xFF, (__m512i)byte));
      continue;
    }
#endif
    for (int i = 0; i < kGroups && g + i < count; ++i) bits[g + i] = static_cast<uint8_t>(byte[i]);
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
#elif defined(__AVX512F__)
  uint16_t word;  // a mask register as it lies
  memcpy(&word, bits + k / 8, sizeof word);
  return (VecF)_mm512_maskz_mov_ps(word, (__m512)v);
#else
  const uint32_t word = bits[k / 8] | static_cast<uint32_t>(bits[k / 8 + 1]) << 8;
  const VecU lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#endif
#if DELTAOPS_VECTOR_BYTES < 64 || !defined(__AVX512F__)
  const VecU kept = (VecU)(((word - VecU{}) & lane) == lane);
  return (VecF)((VecU)v & kept);
#endif
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
