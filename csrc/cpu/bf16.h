/* bf16.h: bfloat16 is the upper half of a float.
 *
 * Widening is a shift and exact. Narrowing rounds to nearest even, keeps infinities, and keeps a
 * NaN a NaN: its quiet bit is set so that cutting the payload off cannot leave an infinity behind.
 */
#ifndef DELTAOPS_CPU_BF16_H
#define DELTAOPS_CPU_BF16_H

#include "vec.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};

DELTAOPS_INLINE float widen(float value) { return value; }

DELTAOPS_INLINE float widen(Bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

DELTAOPS_INLINE void narrow(float value, float *to) { *to = value; }

DELTAOPS_INLINE void narrow(float value, Bf16 *to) {
  uint32_t u;
  memcpy(&u, &value, sizeof u);
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  to->bits = static_cast<uint16_t>((nan ? u | 0x400000u : u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

DELTAOPS_INLINE VecF load(const Bf16 *p) {
  VecH h;
  memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}

DELTAOPS_INLINE void store(Bf16 *p, VecF v) {
  const VecU u = (VecU)v;
  const VecU rounded = u + 0x7FFFu + ((u >> 16) & 1u);
  const VecU kept = v == v ? rounded : u | 0x400000u;
  const VecH h = __builtin_convertvector(kept >> 16, VecH);
  memcpy(p, &h, sizeof h);
}

/* The first `count` < kLanes values; the other lanes are zero. */
template <class T>
DELTAOPS_INLINE VecF load_partial(const T *p, int64_t count) {
  T part[kLanes] = {};
  memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
