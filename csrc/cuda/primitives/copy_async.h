/* copy_async.h: cp.async of sm_80, global to shared memory past the registers.
 *   (PTX ISA, "Data Movement and Conversion Instructions: cp.async")
 *
 * Emulated: copies of a thread land when it waits for their group, from then on the other threads
 * see them after a barrier; until then the target is NaN.
 */
#ifndef DELTAOPS_CUDA_COPY_ASYNC_H
#define DELTAOPS_CUDA_COPY_ASYNC_H

#include "shared.h"

#ifdef DELTAOPS_EMULATED
#include <string.h>

#include <deque>
#include <vector>
#endif

namespace deltaops {

#ifdef DELTAOPS_EMULATED

struct AsyncCopy {
  void *to;
  const void *from;
  size_t bytes;
};
struct AsyncCopies {
  std::vector<AsyncCopy> open;               /* not committed yet */
  std::deque<std::vector<AsyncCopy>> groups; /* oldest first */
};

/* 16 bytes to `to`, of which the first `bytes` come from global memory and the others are 0. */
inline void copy_async_16(void *to, const void *from, int bytes) {
  emulation::check_shared(to, 16, 16, "cp.async");
  emulation::check_global(from, static_cast<size_t>(bytes), 16, "cp.async");
  memset(to, emulation::kPoison, 16);
  emulation::of_thread<AsyncCopies>().open.push_back({to, from, static_cast<size_t>(bytes)});
}

/* Ends this thread's group of copies. */
inline void copy_async_commit() {
  AsyncCopies &copies = emulation::of_thread<AsyncCopies>();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

/* Waits for all but this thread's kGroups newest groups. */
template <int kGroups>
inline void copy_async_wait() {
  AsyncCopies &copies = emulation::of_thread<AsyncCopies>();
  for (; copies.groups.size() > kGroups; copies.groups.pop_front())
    for (const AsyncCopy &copy : copies.groups.front()) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
}

#else

__device__ __forceinline__ void copy_async_16(void *to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#endif

}  // namespace deltaops
#endif
