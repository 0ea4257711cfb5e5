/* vec.h: one vector type for every instruction set.
 *
 * GCC and clang vector extensions instead of intrinsics: the body is written once, the width is a
 * constant of the ISA file, and the 64-byte body also compiles (slowly, as pairs of 32 bytes)
 * for a CPU without AVX-512, which is how its logic is tested there. a * b + c becomes one FMA by
 * -ffp-contract=fast. Loads and stores go through memcpy: no alignment is asked of the caller.
 */
#ifndef DELTAOPS_CPU_VEC_H
#define DELTAOPS_CPU_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DELTAOPS_INLINE inline __attribute__((always_inline))
/* Loops over accumulators must vanish, or the accumulators live in memory. */
#if defined(__clang__)
#define DELTAOPS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DELTAOPS_UNROLL _Pragma("GCC unroll 64")
#endif

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int kLanes = DELTAOPS_VECTOR_BYTES / 4;

typedef float VecF __attribute__((vector_size(DELTAOPS_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(DELTAOPS_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(DELTAOPS_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(DELTAOPS_VECTOR_BYTES / 2)));

/* A number as a type, so that a lambda can take a tile size as a constant. */
template <int N>
struct Constant {
  static constexpr int value = N;
};

DELTAOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DELTAOPS_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
DELTAOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DELTAOPS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

DELTAOPS_INLINE VecF load(const float *p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}

DELTAOPS_INLINE void store(float *p, VecF v) { memcpy(p, &v, sizeof v); }

DELTAOPS_INLINE VecF splat(float value) { return value - VecF{}; }  // x - 0 keeps the sign of -0

typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes4 __attribute__((vector_size(16)));

/* Sum of the lanes, by halves: the same tree on every width. Said in shuffles, since of a loop over
 * the lanes GCC makes one scalar after the other. */
DELTAOPS_INLINE float sum(VecF v) {
#if DELTAOPS_VECTOR_BYTES == 64
  const Lanes8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif DELTAOPS_VECTOR_BYTES == 32
  const Lanes8 eight = v;
#endif
#if DELTAOPS_VECTOR_BYTES > 16
  const Lanes4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const Lanes4 four = v;
#endif
  const Lanes4 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

#if DELTAOPS_VECTOR_BYTES == 16
DELTAOPS_INLINE VecF zip_lo(VecF a, VecF b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
DELTAOPS_INLINE VecF zip_hi(VecF a, VecF b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
DELTAOPS_INLINE VecF pair_lo(VecF a, VecF b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
DELTAOPS_INLINE VecF pair_hi(VecF a, VecF b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
#elif DELTAOPS_VECTOR_BYTES == 32
DELTAOPS_INLINE VecF zip_lo(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
}
DELTAOPS_INLINE VecF zip_hi(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
DELTAOPS_INLINE VecF pair_lo(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
}
DELTAOPS_INLINE VecF pair_hi(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
#elif DELTAOPS_VECTOR_BYTES == 64
DELTAOPS_INLINE VecF zip_lo(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
DELTAOPS_INLINE VecF zip_hi(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
DELTAOPS_INLINE VecF pair_lo(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
DELTAOPS_INLINE VecF pair_hi(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#endif

/* Transposes kLanes x kLanes values of 32 bits. First 4 x 4 inside each 128-bit lane (zip and pair
 * are one instruction each), then the lanes themselves as a 1 x 1, 2 x 2 or 4 x 4 matrix. */
DELTAOPS_INLINE void transpose(VecF (&r)[kLanes]) {
  DELTAOPS_UNROLL
  for (int g = 0; g < kLanes; g += 4) {
    const VecF ab_lo = zip_lo(r[g], r[g + 1]), ab_hi = zip_hi(r[g], r[g + 1]);
    const VecF cd_lo = zip_lo(r[g + 2], r[g + 3]), cd_hi = zip_hi(r[g + 2], r[g + 3]);
    r[g] = pair_lo(ab_lo, cd_lo);
    r[g + 1] = pair_hi(ab_lo, cd_lo);
    r[g + 2] = pair_lo(ab_hi, cd_hi);
    r[g + 3] = pair_hi(ab_hi, cd_hi);
  }
#if DELTAOPS_VECTOR_BYTES == 32
  DELTAOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const VecF a = r[i], b = r[i + 4];
    r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#elif DELTAOPS_VECTOR_BYTES == 64
  DELTAOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const VecF a = r[i], b = r[i + 4], c = r[i + 8], d = r[i + 12];
    // Lanes (0, 2) and (1, 3) of a pair, then the same once more: two steps of one instruction.
    const VecF ab_even =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const VecF ab_odd =
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const VecF cd_even =
        __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const VecF cd_odd =
        __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r[i] = __builtin_shufflevector(ab_even, cd_even, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                   25, 26, 27);
    r[i + 4] = __builtin_shufflevector(ab_odd, cd_odd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                       25, 26, 27);
    r[i + 8] = __builtin_shufflevector(ab_even, cd_even, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
                                       28, 29, 30, 31);
    r[i + 12] = __builtin_shufflevector(ab_odd, cd_odd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
                                        28, 29, 30, 31);
  }
#endif
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
