/* exp.h: e^x in vectors, for x <= 0: what a softmax asks for once its maximum is taken off.
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

/* 2^n e^r with |r| <= ln(2) / 2, where (e^r - 1 - r) / r^2 is a minimax polynomial, off by 3e-9. */
DELTAOPS_INLINE VecF exp_down(VecF x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first is exact times n
  const VecF shifted = x * splat(1.44269504f) + splat(kRound);
  const VecF n = shifted - splat(kRound);
  const VecF r = (x - n * splat(kLn2High)) - n * splat(kLn2Low);
  VecF series = splat(0.00138145988f);
  series = series * r + splat(0.00836871658f);
  series = series * r + splat(0.0416683890f);
  series = series * r + splat(0.166665211f);
  series = series * r + splat(0.499999940f);
  series = series * (r * r) + r;
  const VecF power = (VecF)(((VecU)shifted + 127u) << 23);  // kRound's own bits fall off the top
  // A product with the power, not a sum of exponents: so a NaN cannot turn into a number.
  return x < splat(-87.0f) ? VecF{} : series * power + power;
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
