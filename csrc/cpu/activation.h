/* activation.h: the non-linearities between the two matrices of an adapter, and their slopes.
 *
 *     relu       max(h, 0)
 *     gelu       h P(h),        P the normal distribution function
 *     gelu_tanh  h sigma(2u),   u = sqrt(2/pi) (h + 0.044715 h^3);  (1 + tanh u) / 2 = sigma(2u)
 *     silu       h sigma(h)
 *
 * Everything comes down to one exp and one division, no branch and no libm. Values and slopes are
 * within a few units in the last place of float, in relative terms: far on the left too, where
 * formulas that take 1 - (nearly 1) have no digit left. There gelu_tanh is off by about |2u| units,
 * since rounding its exponent 2u is a relative error of e^2u. What torch would get from inf * 0 is
 * the limit here: an infinity gives 0 on the left and infinity on the right, slopes 0 and 1. A NaN
 * stays a NaN.
 */
#ifndef DELTAOPS_CPU_ACTIVATION_H
#define DELTAOPS_CPU_ACTIVATION_H

#include "deltaops.h"
#include "exp.h"
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

DELTAOPS_INLINE VecF magnitude(VecF v) { return (VecF)((VecI)v & 0x7FFFFFFF); }

/* c[0] + c[1] x + ... */
template <int N>
DELTAOPS_INLINE VecF polynomial(VecF x, const float (&c)[N]) {
  VecF sum = splat(c[N - 1]);
  DELTAOPS_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = sum * x + splat(c[i]);
  return sum;
}

/* sigma(x), and its slope sigma(x) sigma(-x) with all digits on both sides. */
DELTAOPS_INLINE VecF sigmoid(VecF x, VecF *slope) {
  const VecF e = exp_down(-magnitude(x));
  const VecF large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
  *slope = large * small;
  return select((VecI)(x < VecF{}), small, large);
}

/* The normal distribution function at h, from its tail Q(z) = e^(-z^2/2) m(z) at z = |h|. m is half
 * of erfcx(z / sqrt 2), smooth and nearly 1 / z: (z + 2.5) m(z) is a minimax polynomial in
 * (z - 2.5) / (z + 2.5), off by 2e-8, relative, up to z = 14, where Q leaves the floats.
 * `density`: e^(-z^2/2) / sqrt(2 pi). */
DELTAOPS_INLINE VecF normal(VecF h, VecF *density) {
  constexpr float kMills[] = {
      0.7066566601f,    -0.4336920157f,  0.1319869604f,    0.009235938745f,   -0.01638594948f,
      -0.001601054903f, 0.002522982081f, 0.0006843554392f, -0.0003104554528f, -0.0001570448896f};
  const VecF z = magnitude(h);
  // z^2 in two parts, since e^ makes its rounding error a relative one: 12 bits square exactly.
  const VecF head = (VecF)((VecI)z & -4096), rest = (z - head) * (z + head) * splat(-0.5f);
  const VecF bell = exponential(head * head * splat(-0.5f), rest);
  const VecF inverse = splat(1.0f) / (z + splat(2.5f));
  const VecF tail = bell * inverse * polynomial(splat(1.0f) - splat(5.0f) * inverse, kMills);
  *density = bell * splat(0.398942280f);
  return select((VecI)(h < VecF{}), tail, splat(1.0f) - tail);
}

/* The factor beside h, for every kind but the identity and relu; `slope`: its slope in h. */
template <int kind>
DELTAOPS_INLINE VecF gate(VecF h, VecF *slope) {
  if constexpr (kind == DELTAOPS_GELU) return normal(h, slope);
  if constexpr (kind == DELTAOPS_SILU) return sigmoid(h, slope);
  constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const VecF square = h * h * splat(kCubic);
  const VecF factor = sigmoid(splat(kTwice) * h * (splat(1.0f) + square), slope);
  *slope *= splat(kTwice) * (splat(1.0f) + splat(3.0f) * square);
  return factor;
}

/* Past it the gates are 0 or 1 to the last bit: products with them need no larger |h|. */
constexpr float kFar = 128.0f;

/* act(h), element by element. kind: deltaops_activation. */
template <int kind>
DELTAOPS_INLINE VecF activate(VecF h) {
  if constexpr (kind == DELTAOPS_IDENTITY) {
    return h;
  } else if constexpr (kind == DELTAOPS_RELU) {
    return select((VecI)(h <= VecF{}), VecF{}, h);
  } else {
    VecF unused;  // costs nothing: the compiler drops it
    const VecF factor = gate<kind>(clamp(h, -kFar, kFar), &unused);
    return select((VecI)(h < splat(-kFar)), splat(-kFar), h) * factor;
  }
}

/* act'(h). That of relu is 0 at 0 and 1 at NaN, as torch has it. */
template <int kind>
DELTAOPS_INLINE VecF activate_slope(VecF h) {
  if constexpr (kind == DELTAOPS_IDENTITY) {
    return splat(1.0f);
  } else if constexpr (kind == DELTAOPS_RELU) {
    return select((VecI)(h <= VecF{}), VecF{}, splat(1.0f));
  } else {
    VecF slope;
    const VecF near = clamp(h, -kFar, kFar), factor = gate<kind>(near, &slope);
    return factor + near * slope;
  }
}

/* f(Constant<kind>{}): the choice of the kind, outside of the loops. */
template <class F>
DELTAOPS_INLINE void with_activation(int32_t kind, const F &f) {
  switch (kind) {
    case DELTAOPS_RELU:
      return f(Constant<DELTAOPS_RELU>{});
    case DELTAOPS_GELU:
      return f(Constant<DELTAOPS_GELU>{});
    case DELTAOPS_GELU_TANH:
      return f(Constant<DELTAOPS_GELU_TANH>{});
    case DELTAOPS_SILU:
      return f(Constant<DELTAOPS_SILU>{});
    default:
      return f(Constant<DELTAOPS_IDENTITY>{});
  }
}

/* The same with a kind that is only known at run time: for a vector here and there. */
DELTAOPS_INLINE VecF activate(int32_t kind, VecF h) {
  VecF out = h;
  with_activation(kind, [&](auto k) { out = activate<decltype(k)::value>(h); });
  return out;
}

DELTAOPS_INLINE VecF activate_slope(int32_t kind, VecF h) {
  VecF out = h;
  with_activation(kind, [&](auto k) { out = activate_slope<decltype(k)::value>(h); });
  return out;
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
