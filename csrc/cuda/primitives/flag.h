/* flag.h: one block tells others that the copy engine may read what it wrote to global memory
 *   (PTX ISA, "Async proxy", "membar / fence", "ld.acquire", "st.release")
 *
 * The threads write by publish(), call publish_fence() and meet at a barrier; then one of them sets
 * the flag. The thread that has seen it in flag_wait() may ask the copy engine for what was
 * written. All blocks must run at one time: those of a cooperative launch do.
 *
 * Emulated: what a thread published lands at its fence, and never without one.
 */
#ifndef DELTAOPS_CUDA_FLAG_H
#define DELTAOPS_CUDA_FLAG_H

#include "shared.h"

#ifdef DELTAOPS_EMULATED
#include <functional>
#include <vector>
#endif

namespace deltaops {

#ifdef DELTAOPS_EMULATED

struct Published {
  std::vector<std::function<void()>> open;
};

template <typename T>
inline void publish(T *to, T value) {
  emulation::check_global(to, sizeof value, alignof(T), "publish");
  emulation::of_thread<Published>().open.push_back([=] { *to = value; });
}

inline void publish_fence() {
  Published &mine = emulation::of_thread<Published>();
  for (const auto &land : mine.open) land();
  mine.open.clear();
}

inline void flag_set(uint32_t *flag) {
  emulation::check_global(flag, sizeof *flag, alignof(uint32_t), "flag_set");
  *flag = 1;
}
inline void flag_wait(const uint32_t *flag) {
  emulation::check_global(flag, sizeof *flag, alignof(uint32_t), "flag_wait");
  emulation::wait_until("a flag", [=] { return *flag != 0; });
}

#else

template <typename T>
__device__ __forceinline__ void publish(T *to, T value) {
  *to = value;
}

/* Each thread that has written: for the copy engines, and for other multiprocessors. */
__device__ __forceinline__ void publish_fence() {
  asm volatile("fence.proxy.async;" ::: "memory");
  __threadfence();
}

/* One thread, after the barrier. */
__device__ __forceinline__ void flag_set(uint32_t *flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

/* The thread that asks the copy engine afterwards. */
__device__ __forceinline__ void flag_wait(const uint32_t *flag) {
  uint32_t set;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  } while (!set);
  asm volatile("fence.proxy.async;" ::: "memory");
}

#endif

}  // namespace deltaops

#endif
