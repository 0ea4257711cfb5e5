/* element.h: the 16-bit element types, and two of them in a register. */
#ifndef DELTAOPS_CUDA_ELEMENT_H
#define DELTAOPS_CUDA_ELEMENT_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace deltaops {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

/* Two elements as one register; `low` has the lower address. */
template <typename T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  uint16_t parts[2];
  memcpy(&parts[0], &low, 2);
  memcpy(&parts[1], &high, 2);
  return parts[0] | static_cast<uint32_t>(parts[1]) << 16;
}
template <typename T>
__device__ __forceinline__ uint32_t pack_rounded(float low, float high) {
  return pack(from_float<T>(low), from_float<T>(high));
}

/* Element 0 or 1 of a register. */
template <typename T>
__device__ __forceinline__ float unpacked(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? word >> 16 : word);
  T value;
  memcpy(&value, &bits, 2);
  return to_float(value);
}

}  // namespace deltaops
#endif
