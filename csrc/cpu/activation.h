/* activation.h: the non-linearities between the two matrices of an adapter, and their slopes.
 *
 *     relu       max(h, 0)
 *     gelu       h P(h),         P the normal distribution function
 *     gelu_tanh  h sigma(2u),    u = sqrt(2/pi) (h + 0.044715 h^3);  (1 + tanh u) / 2 = sigma(2u)
 *     silu       h sigma(h)
 *
 * Everything comes down to one exp. They run on M * R numbers, beside a product of M * N * K: what
 * counts is that they stay in vectors and within a few roundings of float. NaN stays NaN.
 */
#ifndef DELTAOPS_CPU_ACTIVATION_H
#define DELTAOPS_CPU_ACTIVATION_H

#include "deltaops.h"
#include "vec.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* a where the mask's lane is all ones, b where it is zero. */
DELTAOPS_INLINE VecF select(VecI mask, VecF a, VecF b) {
  return (VecF)((mask & (VecI)a) | (~mask & (VecI)b));
}

/* v within low ... high; a NaN passes. */
DELTAOPS_INLINE VecF clamp(VecF v, float low, float high) {
  v = select((VecI)(v < splat(low)), splat(low), v);
  return select((VecI)(v > splat(high)), splat(high), v);
}

/* c[0] + c[1] x + ... */
template <int N>
DELTAOPS_INLINE VecF polynomial(VecF x, const float (&c)[N]) {
  VecF sum = splat(c[N - 1]);
  DELTAOPS_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = sum * x + splat(c[i]);
  return sum;
}

/* e^x = 2^n e^r with |r| <= ln(2) / 2, and Taylor's series of e^r to r^7, whose rest is below
 * 2^-27. Below -87 it is 0, and above 88 (nearly the largest float) it stays there. */
inline VecF exponential(VecF x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first is exact times n
  constexpr float kTaylor[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                               1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const VecI tiny = (VecI)(x < splat(-87.0f));
  x = clamp(x, -87.0f, 88.0f);
  const VecF shifted = x * splat(1.44269504f) + splat(kRound);
  const VecF n = shifted - splat(kRound);
  const VecF r = (x - n * splat(kLn2High)) - n * splat(kLn2Low);
  const VecU power = ((VecU)shifted + 127u) << 23;  // kRound's own bits fall off the top
  return select(tiny, VecF{}, polynomial(r, kTaylor) * (VecF)power);
}

/* sigma(x). `slope`: sigma (1 - sigma), without the digits that 1 - sigma would lose near 1. */
DELTAOPS_INLINE VecF sigmoid(VecF x, VecF *slope) {
  const VecF e = exponential(-x), gate = splat(1.0f) / (splat(1.0f) + e);
  *slope = e * gate * gate;
  return gate;
}

/* The normal distribution function at h, from its tail Q(z) = e^(-z^2/2) p(t) at z = |h|, with
 * t = 1 / (1 + 0.21 z). p was fitted to Mills' ratio for z up to 14; off by 2e-8 at most, relative,
 * so that small values far to the left are right too. `density`: e^(-z^2/2) / sqrt(2 pi). */
DELTAOPS_INLINE VecF normal(VecF h, VecF *density) {
  constexpr float kTail[] = {0.0f,         0.0837115763f,  0.0850688465f, 0.0691922628f,
                             0.124872310f, -0.0939240692f, 0.349399089f,  -0.330251421f,
                             0.283587453f, -0.0716560404f};
  const VecF z = select((VecI)(h < VecF{}), -h, h);
  const VecF bell = exponential(h * h * splat(-0.5f));
  const VecF tail = bell * polynomial(splat(1.0f) / (splat(1.0f) + splat(0.21f) * z), kTail);
  *density = bell * splat(0.398942280f);
  return select((VecI)(h < VecF{}), tail, splat(1.0f) - tail);
}

/* sigma(2u) of gelu_tanh and its slope in h. Past 16 sigma is 0 or 1 to the last bit, and h^3 would
 * overflow later on. */
DELTAOPS_INLINE VecF gelu_tanh_gate(VecF h, VecF *slope) {
  constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const VecF c = clamp(h, -16.0f, 16.0f), square = c * c * splat(kCubic);
  const VecF gate = sigmoid(splat(kTwice) * c * (splat(1.0f) + square), slope);
  *slope *= splat(kTwice) * (splat(1.0f) + splat(3.0f) * square);
  return gate;
}

/* act(h), element by element. kind: deltaops_activation. */
inline VecF activate(int32_t kind, VecF h) {
  VecF unused;  // the slopes cost nothing: the compiler drops them
  switch (kind) {
    case DELTAOPS_RELU:
      return (VecF)((VecI)h & ~(VecI)(h <= VecF{}));
    case DELTAOPS_GELU:
      return h * normal(h, &unused);
    case DELTAOPS_GELU_TANH:
      return h * gelu_tanh_gate(h, &unused);
    case DELTAOPS_SILU:
      return h * sigmoid(h, &unused);
    default:
      return h;
  }
}

/* act'(h). That of relu is 0 at 0 and 1 at NaN, as torch has it. */
inline VecF activate_slope(int32_t kind, VecF h) {
  const VecF one = splat(1.0f);
  VecF inner;  // slope of the factor beside h
  switch (kind) {
    case DELTAOPS_RELU:
      return (VecF)((VecI)one & ~(VecI)(h <= VecF{}));
    case DELTAOPS_GELU: {
      const VecF factor = normal(h, &inner);
      return factor + h * inner;
    }
    case DELTAOPS_GELU_TANH: {
      const VecF factor = gelu_tanh_gate(h, &inner);
      return factor + h * inner;
    }
    case DELTAOPS_SILU: {
      const VecF factor = sigmoid(h, &inner);
      return factor + h * inner;
    }
    default:
      return one;
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
