/* attention_prefix.h: the gradients of a prefix, which the whole batch shares.
 *
 * The batch is cut into runs of sequences: about kRuns with all heads, so that threads have enough
 * to share out and sums are few. A run of a head belongs to one thread, which adds its sequences up
 * in PrefixSums; then the runs are added. Without a prefix every sequence is a run.
 */
#ifndef DELTAOPS_CPU_ATTENTION_PREFIX_H
#define DELTAOPS_CPU_ATTENTION_PREFIX_H

#include "attention_operands.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kRuns = 64;

struct PrefixSums {
  int64_t runs;
  float *dk, *dv;  // [runs][Hkv][P][row], or NULL: not wanted

  float *at(const Shape &s, float *sums, int64_t run, int64_t kv) const {
    return sums ? sums + (run * s.Hkv + kv) * s.P * s.row : nullptr;
  }
};

inline PrefixSums prefix_sums(const AttentionBackwardArgs &args, const Shape &s, Arena *arena) {
  PrefixSums sums = {s.B, nullptr, nullptr};
  if (s.P == 0) return sums;
  sums.runs = least(s.B, ceil_div(kRuns, s.Hkv));
  const int64_t count = most(sums.runs, 1) * s.Hkv * s.P * s.row;
  if (args.grad_prefix_k.data) sums.dk = arena->take<float>(count);
  if (args.grad_prefix_v.data) sums.dv = arena->take<float>(count);
  return sums;
}

/* to = from, or to += from. */
inline void gather(const float *from, int64_t count, bool add, float *to) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < count; i += kLanes)
    store(to + i, add ? load(to + i) + load(from + i) : load(from + i));
}

/* Thread `self`'s part of the rows of a gradient, once all runs are there. */
template <class T>
void store_prefix(const Shape &s, const PrefixSums &sums, float *first, const deltaops_heads &grad,
                  Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    float *sum = first + i * s.row;
    if (sums.runs == 0) memset(sum, 0, static_cast<size_t>(s.row) * sizeof(float));
    for (int64_t run = 1; run < sums.runs; ++run)
      gather(sum + run * s.Hkv * s.P * s.row, s.columns, true, sum);
    store_token(sum, s.D, 1.0f, tokens<T>(grad, 0, i / s.P).at(i % s.P));
  }
}

inline void store_prefix(const AttentionBackwardArgs &args, const Shape &s, const PrefixSums &sums,
                         Range rows) {
  const bool bf16 = args.prefix_dtype == DELTAOPS_BF16;
  if (sums.dk && bf16) store_prefix<Bf16>(s, sums, sums.dk, args.grad_prefix_k, rows);
  if (sums.dk && !bf16) store_prefix<float>(s, sums, sums.dk, args.grad_prefix_k, rows);
  if (sums.dv && bf16) store_prefix<Bf16>(s, sums, sums.dv, args.grad_prefix_v, rows);
  if (sums.dv && !bf16) store_prefix<float>(s, sums, sums.dv, args.grad_prefix_v, rows);
}

/* A thread goes through its heads of keys sequence by sequence within a run: neighbouring heads of
 * one sequence lie on the same pages. */
struct HeadWalk {
  Range mine;  // of runs * Hkv
  int64_t B, Hkv, runs;
  int64_t run, b, kv;  // where it stands

  HeadWalk(const Shape &s, int64_t num_runs, Range range)
      : mine(range), B(s.B), Hkv(s.Hkv), runs(num_runs), run(range.begin / s.Hkv) {
    b = sequences().begin;
    kv = heads().begin;
  }

  Range sequences() const { return share(B, run, most(runs, 1)); }
  Range heads() const {
    return {most(mine.begin - run * Hkv, 0), least(mine.end - run * Hkv, Hkv)};
  }
  bool done() const { return run * Hkv >= mine.end; }
  bool first_of_run() const { return b == sequences().begin; }
  void next() {
    if (++kv < heads().end) return;
    kv = heads().begin;
    if (++b < sequences().end) return;
    ++run, kv = 0;  // where b stands: runs are neighbours
  }
};

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
