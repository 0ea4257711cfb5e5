/* dpbf16.h: acc + a_1 b_1 + a_0 b_0 on pairs of bf16, the one primitive that needs an intrinsic.
 *
 * A Pair holds elements k (low half) and k + 1 (high half) of the contraction. VDPBF16PS adds the
 * odd product first and flushes subnormals to zero; the emulation, which no shipped file uses, has
 * the same pairing and order and keeps subnormals.
 */
#ifndef DELTAOPS_CPU_DPBF16_H
#define DELTAOPS_CPU_DPBF16_H

#include "bf16.h"

#if DELTAOPS_DPBF16 && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

struct Pair {
  uint32_t bits;
};

DELTAOPS_INLINE VecF dpbf16(VecF acc, VecF a, VecF b) {
#if DELTAOPS_DPBF16 && defined(__AVX512BF16__)
  return (VecF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const VecU ua = (VecU)a, ub = (VecU)b;
  acc += (VecF)(ua & 0xFFFF0000u) * (VecF)(ub & 0xFFFF0000u);
  return acc + (VecF)(ua << 16) * (VecF)(ub << 16);
#endif
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
