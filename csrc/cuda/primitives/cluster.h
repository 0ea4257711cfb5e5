/* cluster.h: blocks that run at the same time, and reach into each other's shared memory
 *   (PTX ISA, "Cluster of Cooperative Thread Arrays", "mapa", "multicast::cluster")
 *
 * A launch says how many blocks, neighbours in x, make a cluster; where it does not, one does. All
 * meet before the first reaches into another, so that barriers are initialised there, and again
 * after the last has done so: until then none may end.
 */
#ifndef DELTAOPS_CUDA_CLUSTER_H
#define DELTAOPS_CUDA_CLUSTER_H

#include "tensor_copy.h"

namespace deltaops {

#ifdef DELTAOPS_EMULATED

inline int cluster_size() { return static_cast<int>(emulation::cluster_size()); }
inline int cluster_rank() { return static_cast<int>(emulation::cluster_rank()); }
inline void cluster_sync() { emulation::cluster_sync(); }

inline void mbarrier_arrive_at(uint64_t *barrier, int rank) {
  void *const there = emulation::in_block(barrier, static_cast<unsigned>(rank));
  emulation::as_block(static_cast<unsigned>(rank),
                      [=] { Mbarrier(static_cast<uint64_t *>(there)).arrive(); });
}

/* A copy may reach another block before that one has announced its bytes: then it lands later. */
inline void tensor_copy_to_all(void *to, const TensorMap *map, int32_t row, int32_t column,
                               uint64_t *barrier) {
  const unsigned own = emulation::cluster_rank();
  for (unsigned rank = 0; rank < emulation::cluster_size(); ++rank) {
    void *const there = emulation::in_block(to, rank);
    auto *const its = static_cast<uint64_t *>(emulation::in_block(barrier, rank));
    emulation::as_block(rank, [=] { queue_copy(there, map, row, column, its, rank != own); });
  }
}

#else

__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
}

/* All threads of all blocks of the cluster meet. */
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

/* Arrives at the barrier that lies in block `rank` where `barrier` lies in this one. Publishes
 * nothing that the thread has written for that block: .release.cluster would be a fence of the
 * whole GPU each time, and who has only read needs none. */
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t *barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

/* tensor_copy to the same place of each block of the cluster, and its bytes to each barrier. */
__device__ __forceinline__ void tensor_copy_to_all(void *to, const TensorMap *map, int32_t row,
                                                   int32_t column, uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>((1 << cluster_size()) - 1))
      : "memory");
}

#endif

}  // namespace deltaops

#endif
