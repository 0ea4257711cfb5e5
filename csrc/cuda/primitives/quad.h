/* quad.h: four neighbouring lanes, which share rows of the accumulators of matrix products. */
#ifndef DELTAOPS_CUDA_QUAD_H
#define DELTAOPS_CUDA_QUAD_H

#include <cuda_runtime.h>
#include <stdint.h>

namespace deltaops {

/* Word i of lane j of each four lanes becomes word j of lane i. All lanes of the warp. */
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i]; /* no index that is known only at run time: registers */
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

}  // namespace deltaops
#endif
