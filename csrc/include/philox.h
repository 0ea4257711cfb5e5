/* Philox4x32-7: the counter-based generator behind dropout (Salmon et al. 2011, "Parallel random
 * numbers: as easy as 1, 2, 3"; seven rounds are the fewest that pass BigCrush).
 *
 * One call yields eight 16-bit draws, for the elements k = 8 g ... 8 g + 7 of row m of stream i:
 *     counter = (g, m mod 2^32, m div 2^32, i)      key = (seed mod 2^32, seed div 2^32)
 *     draw(k) = (out[(k mod 8) / 2] >> 16 ((k mod 8) mod 2)) mod 2^16
 * An element is dropped when draw < drop_threshold. The reference (deltaops/reference/philox.py),
 * the CPU core, CUDA and Triton all make this stream; tests hold them equal.
 */
#ifndef DELTAOPS_PHILOX_H
#define DELTAOPS_PHILOX_H

#include <stdint.h>

#if defined(__CUDACC__)
#define DELTAOPS_HD __host__ __device__ __forceinline__
#else
#define DELTAOPS_HD static inline
#endif

enum { DELTAOPS_PHILOX_ROUNDS = 7 };
#define DELTAOPS_PHILOX_M0 0xD2511F53u
#define DELTAOPS_PHILOX_M1 0xCD9E8D57u
#define DELTAOPS_PHILOX_W0 0x9E3779B9u
#define DELTAOPS_PHILOX_W1 0xBB67AE85u

/* Of a product of 64 bits. By its own name on a GPU: of a shift nvcc makes one more addition. */
DELTAOPS_HD uint32_t deltaops_high_word(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return (uint32_t)((uint64_t)a * b >> 32);
#endif
}

DELTAOPS_HD void deltaops_philox(uint32_t c[4], uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < DELTAOPS_PHILOX_ROUNDS; ++round) {
    const uint32_t low0 = DELTAOPS_PHILOX_M0 * c[0], low1 = DELTAOPS_PHILOX_M1 * c[2];
    const uint32_t high0 = deltaops_high_word(DELTAOPS_PHILOX_M0, c[0]);
    const uint32_t high1 = deltaops_high_word(DELTAOPS_PHILOX_M1, c[2]);
    c[0] = high1 ^ c[1] ^ k0;
    c[2] = high0 ^ c[3] ^ k1;
    c[1] = low1;
    c[3] = low0;
    k0 += DELTAOPS_PHILOX_W0;
    k1 += DELTAOPS_PHILOX_W1;
  }
}

/* The 16-bit draw for element k of row m. */
DELTAOPS_HD uint32_t deltaops_draw(int64_t k, int64_t m, uint32_t stream, uint64_t seed) {
  uint32_t c[4] = {(uint32_t)(k >> 3), (uint32_t)m, (uint32_t)((uint64_t)m >> 32), stream};
  deltaops_philox(c, seed);
  return (c[(k & 7) >> 1] >> (16 * (k & 1))) & 0xFFFFu;
}

#endif
