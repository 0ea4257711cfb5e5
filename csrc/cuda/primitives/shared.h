/* shared.h: the block's dynamic shared memory. */
#ifndef DELTAOPS_CUDA_SHARED_H
#define DELTAOPS_CUDA_SHARED_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef DELTAOPS_EMULATED
#include "emulation.h"
#endif

namespace deltaops {

#ifdef DELTAOPS_EMULATED
inline unsigned char *dynamic_shared() {
  return static_cast<unsigned char *>(emulation::shared_memory());
}

/* Where dynamic shared memory begins, as on Hopper: some comes before it. */
constexpr uint32_t kSharedStart = 1024;

inline uint32_t shared_address(const void *at) {
  return kSharedStart +
         static_cast<uint32_t>(static_cast<const unsigned char *>(at) - dynamic_shared());
}
inline unsigned char *shared_pointer(uint32_t address) {
  return dynamic_shared() + (address - kSharedStart);
}
#else
__device__ __forceinline__ unsigned char *dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char deltaops_shared[];
  return deltaops_shared;
}

/* The address that PTX means by [shared]. */
__device__ __forceinline__ uint32_t shared_address(const void *at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif

}  // namespace deltaops
#endif
