/* tensor_copy.h: the copy engine brings boxes of a matrix  (PTX ISA, "cp.async.bulk.tensor")
 *
 * A TensorMap describes a matrix in global memory and the box that one copy brings. What of a box
 * lies outside the matrix arrives as zeros and counts as bytes all the same. Rows of a box are 128
 * bytes; their 16-byte pieces are permuted within 8 rows (128-byte swizzle), so that the tensor
 * cores read them without bank conflicts: piece p of row r lies where p xor (r mod 8) says.
 */
#ifndef DELTAOPS_CUDA_TENSOR_COPY_H
#define DELTAOPS_CUDA_TENSOR_COPY_H

#include "mbarrier.h"

#ifdef DELTAOPS_EMULATED
#include <string.h>
#else
#include <cuda.h>
#endif

namespace deltaops {

constexpr uint32_t kSwizzleRow = 128;              /* bytes of a row of a box */
constexpr uint32_t kSwizzleAtom = 8 * kSwizzleRow; /* bytes after which the permutation repeats */

#ifdef DELTAOPS_EMULATED

/* What a CUtensorMap says: 16-bit elements, rows on 16 bytes, a box 128 bytes wide. */
struct alignas(64) TensorMap {
  const uint16_t *data;
  int64_t rows, columns, row_stride; /* in elements */
  int32_t box_rows;
};

/* Where a 16-byte piece at this shared address really lies. */
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void queue_copy(void *to, const TensorMap *map, int32_t row, int32_t column,
                       uint64_t *barrier, bool of_another_block) {
  const uint32_t bytes = static_cast<uint32_t>(map->box_rows) * kSwizzleRow;
  emulation::check_shared(to, bytes, kSwizzleAtom, "cp.async.bulk.tensor");
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
    emulation::fail("cp.async.bulk.tensor: the tensor map is not on 64 bytes");
  if (!emulation::of_block<Engine>().sees_barriers)
    emulation::fail("cp.async.bulk.tensor: its barrier was not followed by mbarrier_init_done");
  memset(to, emulation::kPoison, bytes);
  const auto land = [=, map = *map] {
    const uint32_t first = shared_address(to);
    for (int32_t r = 0; r < map.box_rows; ++r)
      for (int32_t c = 0; c < 64; c += 8) {
        uint16_t piece[8] = {};
        for (int32_t i = 0; i < 8; ++i) {
          const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c + i;
          if (from_row < 0 || from_row >= map.rows || from_column < 0 || from_column >= map.columns)
            continue;
          const uint16_t *from = map.data + from_row * map.row_stride + from_column;
          emulation::check_global(from, 2, 2, "cp.async.bulk.tensor");
          piece[i] = *from;
        }
        const uint32_t at =
            swizzled(first + static_cast<uint32_t>(r) * kSwizzleRow + static_cast<uint32_t>(c) * 2);
        memcpy(static_cast<unsigned char *>(to) + (at - first), piece, sizeof piece);
      }
    Mbarrier(barrier).land(bytes);
  };
  emulation::of_block<Engine>().queued.push_back({barrier, of_another_block ? bytes : 0, land});
}

inline void tensor_copy(void *to, const TensorMap *map, int32_t row, int32_t column,
                        uint64_t *barrier) {
  queue_copy(to, map, row, column, barrier, false);
}

inline void tensor_map_prefetch(const TensorMap *map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
    emulation::fail("prefetch.tensormap: the tensor map is not on 64 bytes");
}

#else

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

/* Brings the map itself near the copy engine. */
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#endif

}  // namespace deltaops

#endif
