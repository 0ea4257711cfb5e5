/* cross_entropy.h: the op, forward and backward (deltaops.h has its mathematics).
 *
 *     forward    each row of x [M, V] is read from memory once: its maximum and its sum of
 *                exponentials chunk by chunk, each chunk a second time from the first-level cache
 *     backward   grad_x = (exp(x - maximum) / sum - [v = target]) g    one read, one write
 *
 * With a vocabulary of tens of thousands the logits are the largest matrix of a training step, and
 * eager torch walks over matrices of that size seven times. A row belongs to one thread and its
 * chunks do not depend on the team; losses are added in the order of the rows, in double. So the
 * bits are the same for any number of threads.
 */
#ifndef DELTAOPS_CPU_CROSS_ENTROPY_H
#define DELTAOPS_CPU_CROSS_ENTROPY_H

#include "bf16.h"
#include "core.h"
#include "exp.h"
#include "team.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // of floats 16 KiB: half of the smallest first-level cache
constexpr int kStreams = 4;       // independent accumulators: more than the latency of an addition
constexpr float kInfinity = __builtin_inff();

/* The last `count` < kLanes logits of a row; -infinity in the other lanes is no maximum and adds
 * nothing to a sum. */
template <class T>
DELTAOPS_INLINE VecF load_logits(const T *x, int64_t count) {
  T part[kLanes];
  for (T &value : part) narrow(-kInfinity, &value);
  memcpy(part, x, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

/* The larger of the lanes; b where a is NaN, which the sum of exponentials will show. */
DELTAOPS_INLINE VecF larger(VecF a, VecF b) { return a > b ? a : b; }

DELTAOPS_INLINE float exp_down(float x) { return exp_down(splat(x))[0]; }

template <class T>
inline float chunk_maximum(const T *x, int64_t count) {
  VecF top[kStreams];
  for (VecF &v : top) v = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kStreams * kLanes <= count; i += kStreams * kLanes) DELTAOPS_UNROLL
  for (int j = 0; j < kStreams; ++j) top[j] = larger(load(x + i + j * kLanes), top[j]);
  for (; i + kLanes <= count; i += kLanes) top[0] = larger(load(x + i), top[0]);
  if (i < count) top[0] = larger(load_logits(x + i, count - i), top[0]);
  float lane[kLanes], maximum = -kInfinity;
  const VecF all = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  memcpy(lane, &all, sizeof lane);
  for (float value : lane) maximum = value > maximum ? value : maximum;
  return maximum;
}

/* sum exp(x - shift). The chunk lies in the first-level cache: time to fetch the next one. Floats
 * are added a few at a time and their sums in double: a row may have a hundred thousand terms. */
template <class T>
inline double chunk_sum(const T *x, int64_t count, float shift) {
  constexpr int64_t kStep = kStreams * kLanes, kBlock = 8 * kStep;
  const VecF down = splat(shift);
  double all = 0.0;
  int64_t i = 0;
  while (i < count) {
    VecF total[kStreams] = {};
    const int64_t end = least(count, i + kBlock);
    for (; i + kStep <= end; i += kStep) DELTAOPS_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      __builtin_prefetch(x + i + j * kLanes + kChunk);
      total[j] += exp_down(load(x + i + j * kLanes) - down);
    }
    for (; i + kLanes <= end; i += kLanes) total[0] += exp_down(load(x + i) - down);
    if (i < end) total[0] += exp_down(load_logits(x + i, end - i) - down);
    i = end;
    all += static_cast<double>(sum((total[0] + total[1]) + (total[2] + total[3])));
  }
  return all;
}

/* What a row comes down to: its maximum and sum exp(x - maximum). A NaN is in the sum, and so is
 * what infinity - infinity gives: with +infinity in a row, or nothing but -infinity, torch has NaN
 * too. */
struct Softmax {
  float maximum;
  double sum;
};

template <class T>
inline Softmax softmax_of(const T *x, int64_t V) {
  Softmax row = {-kInfinity, 0.0};
  for (int64_t v = 0; v < V; v += kChunk) {
    const int64_t count = least(kChunk, V - v);
    const float top = chunk_maximum(x + v, count);
    if (top > row.maximum) {
      row.sum *= static_cast<double>(exp_down(row.maximum - top));
      row.maximum = top;
    }
    // Chunks of -infinity alone add nothing, whatever is taken off, as long as it is finite.
    row.sum += chunk_sum(x + v, count, row.maximum == -kInfinity ? 0.0f : row.maximum);
  }
  return row;
}

/* grad = (exp(x - maximum) inverse - [v = target]) g. */
template <class T>
inline void gradient_of(const T *x, int64_t V, int64_t target, float maximum, float inverse,
                        float g, T *grad) {
  const VecF down = splat(maximum), factor = splat(inverse * g);
  int64_t v = 0;
  for (; v + kLanes <= V; v += kLanes) store(grad + v, exp_down(load(x + v) - down) * factor);
  if (v < V) {
    T part[kLanes];
    store(part, exp_down(load_logits(x + v, V - v) - down) * factor);
    memcpy(grad + v, part, static_cast<size_t>(V - v) * sizeof(T));
  }
  narrow((exp_down(widen(x[target]) - maximum) * inverse - 1.0f) * g, grad + target);
}

/* body(m) for each row. The bits do not depend on the team, so any that OpenMP gives will do. */
template <class Body>
inline void each_row(int64_t M, int64_t V, int wanted, const Body &body) {
  constexpr int64_t kLeast = 1 << 13;  // logits that are worth waking a thread for
  int threads = static_cast<int>(least(least(wanted, M > 0 ? M : 1), 1 + M * V / kLeast));
  for (;;) {
    const int given = team(threads, [&](int self) {
      const Range rows = share(M, self, threads);
      for (int64_t m = rows.begin; m < rows.end; ++m) body(m);
    });
    if (given == threads) return;
    threads = given;
  }
}

inline int64_t counted_rows(const int64_t *target, int64_t M, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t m = 0; m < M; ++m) count += target[m] != ignore_index;
  return count;
}

template <class T>
deltaops_status cross_entropy_forward_as(const CrossEntropyForwardArgs &args) {
  const int64_t M = args.logits.rows, V = args.logits.cols;
  const size_t bytes = static_cast<size_t>(M) * sizeof(double);
  double *losses = static_cast<double *>(workspace(bytes));
  if (losses == nullptr && M > 0)
    return fail(DELTAOPS_OUT_OF_MEMORY,
                "cross_entropy_forward: the losses of the rows need %zu bytes, which were refused. "
                "Free some memory, or use smaller batches.",
                bytes);
  const T *logits = static_cast<const T *>(args.logits.data);
  float *state = static_cast<float *>(args.state.data);
  each_row(M, V, args.num_threads, [&](int64_t m) {
    const int64_t target = args.target[m];
    float *kept = state + 2 * m;
    if (target == args.ignore_index) {
      kept[0] = kept[1] = 0.0f;
      return;
    }
    const T *x = logits + m * args.logits.row_stride;
    const Softmax row = softmax_of(x, V);
    kept[0] = row.maximum;
    kept[1] = static_cast<float>(1.0 / row.sum);
    losses[m] = __builtin_log(row.sum) -
                (static_cast<double>(widen(x[target])) - static_cast<double>(row.maximum));
  });
  double loss = 0.0;
  for (int64_t m = 0; m < M; ++m)
    if (args.target[m] != args.ignore_index) loss += losses[m];
  if (args.reduction == DELTAOPS_MEAN)  // 0 / 0 where every row is ignored: NaN, as torch has it
    loss /= static_cast<double>(counted_rows(args.target, M, args.ignore_index));
  *args.loss = static_cast<float>(loss);
  return DELTAOPS_OK;
}

template <class T>
deltaops_status cross_entropy_backward_as(const CrossEntropyBackwardArgs &args) {
  const int64_t M = args.logits.rows, V = args.logits.cols;
  if (V == 0) return DELTAOPS_OK;  // the gradient may be NULL, which memset may not take
  const T *logits = static_cast<const T *>(args.logits.data);
  const float *state = static_cast<const float *>(args.state.data);
  T *grads = static_cast<T *>(args.grad_logits.data);
  double scale = 1.0;
  if (args.reduction == DELTAOPS_MEAN)
    scale = static_cast<double>(counted_rows(args.target, M, args.ignore_index));
  const float g = static_cast<float>(static_cast<double>(*args.grad_loss) / scale);
  each_row(M, V, args.num_threads, [&](int64_t m) {
    const int64_t target = args.target[m];
    T *grad = grads + m * args.grad_logits.row_stride;
    if (target == args.ignore_index)
      memset(grad, 0, static_cast<size_t>(V) * sizeof(T));
    else
      gradient_of(logits + m * args.logits.row_stride, V, target, state[2 * m], state[2 * m + 1], g,
                  grad);
  });
  return DELTAOPS_OK;
}

deltaops_status cross_entropy_forward(const CrossEntropyForwardArgs &args) {
  return args.logits.dtype == DELTAOPS_BF16 ? cross_entropy_forward_as<Bf16>(args)
                                            : cross_entropy_forward_as<float>(args);
}

deltaops_status cross_entropy_backward(const CrossEntropyBackwardArgs &args) {
  return args.logits.dtype == DELTAOPS_BF16 ? cross_entropy_backward_as<Bf16>(args)
                                            : cross_entropy_backward_as<float>(args);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
