/* cuda_fp16.h of the emulator: the type and its conversions. */
#ifndef DELTAOPS_EMULATED_CUDA_FP16_H
#define DELTAOPS_EMULATED_CUDA_FP16_H

#include <stdint.h>

struct __half {
  _Float16 value;
};

inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

#endif
