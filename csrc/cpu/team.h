/* team.h: an OpenMP team of exactly the size that the work was cut for.
 *
 * OpenMP and not a pool of our own: libgomp is one per process and shared with torch, whose worker
 * threads spin for a while after each op and would stall a second pool.
 */
#ifndef DELTAOPS_CPU_TEAM_H
#define DELTAOPS_CPU_TEAM_H

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vec.h"

namespace deltaops {

#if defined(DELTAOPS_TEST_TEAM)
/* A test build brings threads that ThreadSanitizer can follow: tests/csrc/native/team.cpp. */
void test_team(int threads, void (*body)(const void *, int), const void *context);
void test_barrier();
#endif

namespace DELTAOPS_ISA {
namespace {

#if defined(_OPENMP) && !defined(DELTAOPS_TEST_TEAM)
/* Whether this thread is a team of its own: it starts no region and waits at no barrier. Each is a
 * futex call in libgomp even then, together longer than a small layer; and the barrier of a
 * caller's region would be another team's. */
thread_local bool alone = false;
#endif

/* Runs body(thread) on `threads` threads and returns `threads`; or, where OpenMP would give fewer
 * (a thread limit, a region inside a region), runs nothing and returns how many it would give. */
template <class Body>
int team(int threads, const Body &body) {
#if defined(DELTAOPS_TEST_TEAM)
  test_team(
      threads, [](const void *context, int self) { (*static_cast<const Body *>(context))(self); },
      &body);
  return threads;
#elif defined(_OPENMP)
  if (threads == 1) {
    alone = true;
    body(0);
    alone = false;
    return 1;
  }
  int given = threads;
#pragma omp parallel num_threads(threads)
  {
    const int size = omp_get_num_threads(), self = omp_get_thread_num();
    if (size == threads)
      body(self);
    else if (self == 0)
      given = size;
  }
  return given;
#else
  if (threads == 1) body(0);
  return 1;
#endif
}

DELTAOPS_INLINE void barrier() {
#if defined(DELTAOPS_TEST_TEAM)
  test_barrier();
#elif defined(_OPENMP)
  if (alone) return;
#pragma omp barrier
#endif
}

/* Thread `self`'s part of `count` items: the same for the same team, whatever the machine does. */
struct Range {
  int64_t begin, end;
};
DELTAOPS_INLINE Range share(int64_t count, int64_t self, int64_t of) {
  return {count * self / of, count * (self + 1) / of};
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
