/* exp.h: e^x in vectors, for softmax (x <= 0 once its maximum is off) and the activations.
 *
 * Of a few instructions, since whole vocabularies go through it: no clamp at the top, one range of
 * the polynomial, a flush to 0 below -87 (e^-87 is nearly the smallest normal float). Off by about
 * one unit in the last place. -infinity gives 0, NaN stays NaN.
 */
#ifndef DELTAOPS_CPU_EXP_H
#define DELTAOPS_CPU_EXP_H

#include "vec.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* e^(x + rest) for x <= 88 and a rest far below 1: 2^n e^r with |r| <= ln(2) / 2, where
 * (e^r - 1 - r) / r^2 is a minimax polynomial (off by 2e-9 in e^r). Below -87 it is 0. */
DELTAOPS_INLINE VecF exponential(VecF x, VecF rest) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first is exact times n
  const VecF shifted = x * splat(1.44269504f) + splat(kRound);
  const VecF n = shifted - splat(kRound);
  const VecF r = ((x - n * splat(kLn2High)) - n * splat(kLn2Low)) + rest;
  VecF series = splat(0.001381454952f);
  series = series * r + splat(0.008368721934f);
  series = series * r + splat(0.04166838908f);
  series = series * r + splat(0.1666652058f);
  series = series * r + splat(0.4999999344f);
  series = series * (r * r) + r;
  const VecF power = (VecF)(((VecU)shifted + 127u) << 23);  // kRound's own bits fall off the top
  // A product with the power, not a sum of exponents: so a NaN cannot turn into a number.
  return x < splat(-87.0f) ? VecF{} : series * power + power;
}

/* Adding -0 changes nothing, its own sign and that of a zero included: compilers drop it. */
DELTAOPS_INLINE VecF exp_down(VecF x) { return exponential(x, splat(-0.0f)); }

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
