/* peak.h: what the multiply-add units of this machine do when nothing else is in the way.
 *
 * Benchmarks divide by it, measured in the same run. As many accumulators as the tile has, each a
 * chain of its own, operands in registers.
 */
#ifndef DELTAOPS_CPU_PEAK_H
#define DELTAOPS_CPU_PEAK_H

#include "team.h"
#include "tile.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* `steps` steps of one tile's multiply-adds; the result keeps them alive. */
template <class Unit>
__attribute__((noinline)) float peak_chain(const Unit *a, int64_t steps) {
  constexpr int kChains = kTileRows * kTileVectors;
  VecF acc[kChains];
  const VecF b = splat(1e-3f);
  DELTAOPS_UNROLL  // different starts: equal chains would be computed once
      for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) DELTAOPS_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = multiply_add(acc[i], *a, b);
  VecF total = {};
  DELTAOPS_UNROLL
  for (int i = 0; i < kChains; ++i) total += acc[i];
  return sum(total);
}

/* Multiply-adds of one call of fma_peak. */
template <class Unit>
int64_t peak_work(int64_t steps, int threads) {
  return steps * kTileRows * kTileVectors * kLanes * UnitOf<Unit>::k * threads;
}

template <class Unit>
int64_t fma_peak(int64_t steps, int threads) {
  const Unit a = {};
  const auto run = [&](int) {
    volatile float kept = peak_chain(&a, steps);
    (void)kept;
  };
  const int given = team(threads, run);
  if (given == threads) return peak_work<Unit>(steps, threads);
  run(0);
  return peak_work<Unit>(steps, 1);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
