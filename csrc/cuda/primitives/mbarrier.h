/* mbarrier.h: barriers in shared memory that count arrivals and bytes  (PTX ISA, "mbarrier")
 *
 * A phase ends when as many arrivals as were promised at init came and all bytes that were announced
 * have landed; the next one begins at once. Waits name the parity of the phase they wait for: 0 is
 * the first one's, and waiting for parity 1 of a fresh barrier returns at once.
 */
#ifndef DELTAOPS_CUDA_MBARRIER_H
#define DELTAOPS_CUDA_MBARRIER_H

#include <stdint.h>

#ifdef DELTAOPS_EMULATED
#include "emulation/mbarrier.h"
#else

namespace deltaops {

/* Of generic pointers into shared memory: the address that PTX takes. */
__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* One thread, before the others see the barrier: see mbarrier_init_done(). */
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

/* The thread that initialised: makes it visible to the copy engine. __syncthreads() follows. */
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Arrives once and announces bytes that a copy will bring. */
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t *barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/* Until the phase of this parity has ended. */
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

}  // namespace deltaops

#endif
#endif
