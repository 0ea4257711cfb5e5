/* tensor_copy.h: the copy engine brings boxes of a matrix  (PTX ISA, "cp.async.bulk.tensor")
 *
 * A TensorMap describes a matrix in global memory and the box that one copy brings. What of a box
 * lies outside the matrix arrives as zeros and counts as bytes all the same. Rows of a box are 128
 * bytes; their 16-byte pieces are permuted within 8 rows (128-byte swizzle), so that the tensor
 * cores read them without bank conflicts: piece p of row r lies where p xor (r mod 8) says.
 */
#ifndef DELTAOPS_CUDA_TENSOR_COPY_H
#define DELTAOPS_CUDA_TENSOR_COPY_H

#include <stdint.h>

#ifdef DELTAOPS_EMULATED
#include "emulation/tensor_copy.h"
#else

#include <cuda.h>

#include "mbarrier.h"

namespace deltaops {

using TensorMap = CUtensorMap; /* 128 bytes, aligned to 64; kernels take it as __grid_constant__ */

/* Queues the copy of the box whose first element is (row, column) to `to`, aligned to 1024 bytes;
 * its bytes arrive at `barrier`. One thread. */
__device__ __forceinline__ void tensor_copy(void *to, const TensorMap *map, int32_t row,
                                            int32_t column, uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace deltaops

#endif
#endif
