/* TEMPORARY stand-in. */
#ifndef DELTAOPS_CPU_ACTIVATION_H
#define DELTAOPS_CPU_ACTIVATION_H
#include <math.h>
#include "vec.h"
namespace deltaops {
namespace DELTAOPS_ISA {
namespace {
inline VecF activate(int32_t kind, VecF h) {
  VecF out;
  for (int i = 0; i < kLanes; ++i) {
    const float x = h[i];
    double d = x;
    switch (kind) {
      case 1: out[i] = x <= 0 ? 0 : x; break;
      case 2: out[i] = (float)(d * 0.5 * (1 + erf(d / sqrt(2.0)))); break;
      case 3: out[i] = (float)(d * 0.5 * (1 + tanh(sqrt(2 / M_PI) * (d + 0.044715 * d * d * d)))); break;
      case 4: out[i] = (float)(d / (1 + exp(-d))); break;
      default: out[i] = x;
    }
  }
  return out;
}
inline VecF activate_slope(int32_t kind, VecF h) {
  VecF out;
  for (int i = 0; i < kLanes; ++i) {
    const float x = h[i];
    double d = x;
    switch (kind) {
      case 1: out[i] = x <= 0 ? 0 : 1; break;
      case 2: out[i] = (float)(0.5 * (1 + erf(d / sqrt(2.0))) + d * exp(-d * d / 2) / sqrt(2 * M_PI)); break;
      case 3: { double c = sqrt(2 / M_PI), t = tanh(c * (d + 0.044715 * d * d * d));
        out[i] = (float)((1 + t) / 2 + d * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * d * d)); break; }
      case 4: { double s = 1 / (1 + exp(-d)); out[i] = (float)(s * (1 + d * (1 - s))); break; }
      default: out[i] = 1;
    }
  }
  return out;
}
}
}
}
#endif
