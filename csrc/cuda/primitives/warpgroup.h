/* warpgroup.h: four warps meet, and move registers between groups  (PTX ISA, "bar", "setmaxnreg")
 *
 * setmaxnreg takes effect only where the kernel's registers are capped (__launch_bounds__ with a
 * block count), and all four warps of the group run it.
 */
#ifndef DELTAOPS_CUDA_WARPGROUP_H
#define DELTAOPS_CUDA_WARPGROUP_H

#include "shared.h"

namespace deltaops {

#ifdef DELTAOPS_EMULATED

inline void warpgroup_sync(int group) {
  emulation::barrier_sync(static_cast<unsigned>(group) + 1, 128);
}

inline void warpgroups_sync() { emulation::barrier_sync(3, 256); }

/* All lanes meet; whether the registers suffice is for ptxas to say. */
template <int kRegisters>
inline void registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::collective("setmaxnreg.dec", nullptr, nullptr,
                        [](const void *const *, void *const *) {});
}
template <int kRegisters>
inline void registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::collective("setmaxnreg.inc", nullptr, nullptr,
                        [](const void *const *, void *const *) {});
}

#else

/* The 128 threads of warpgroup `group` of those that meet: each has a barrier of its own. */
__device__ __forceinline__ void warpgroup_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

/* The 256 threads of warpgroups 0 and 1 of those that meet. */
__device__ __forceinline__ void warpgroups_sync() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

/* Gives up registers; at most kRegisters remain to each thread. A multiple of 8 from 24 to 256. */
template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/* Waits until there are kRegisters for each thread. */
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace deltaops

#endif
