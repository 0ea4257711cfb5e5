/* norm_bias.h: a norm with its bias as one op, or the gain and bias alone; norm.h has the
 * mathematics.
 *
 * Bound by memory: forward reads x and writes y once, backward reads dy and x and writes dx once. A
 * row is looked at two or three times while it is in L1. dgamma and dbias ride along.
 */
#ifndef DELTAOPS_CPU_NORM_BIAS_H
#define DELTAOPS_CPU_NORM_BIAS_H

#include "delta_linear.h"
#include "norm.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* y = x gamma + bias, a row. */
template <class T>
DELTAOPS_INLINE void scale_row(const T *x, int64_t K, const float *gamma, const float *bias, T *y) {
  each_vector(K, [&](int64_t k, int64_t count) {
    store_lanes(y + k, load_lanes(x + k, count) * load(gamma + k) + load(bias + k), count);
  });
}

/* Its dx = dy gamma, and its part of dgamma and dbias, added to [K] floats; each unless NULL. x is
 * read for dgamma alone. */
template <class T>
DELTAOPS_INLINE void scale_row_backward(const T *dy, const T *x, int64_t K, const float *gamma,
                                        T *dx, float *grad_gamma, float *grad_bias) {
  each_vector(K, [&](int64_t k, int64_t count) {
    const VecF d = load_lanes(dy + k, count);
    if (grad_gamma) store(grad_gamma + k, load(grad_gamma + k) + d * load_lanes(x + k, count));
    if (grad_bias) store(grad_bias + k, load(grad_bias + k) + d);
    if (dx) store_lanes(dx + k, d * load(gamma + k), count);
  });
}

template <class T>
deltaops_status norm_bias_forward_as(const NormBiasForwardArgs &args) {
  const int64_t M = args.x.rows, K = args.x.cols, padded = round_up(K, kLanes);
  float *memory = static_cast<float *>(workspace(static_cast<size_t>(2 * padded) * sizeof(float)));
  if (memory == nullptr)
    return no_memory("norm_bias_forward", static_cast<size_t>(2 * padded) * sizeof(float));
  float *gamma = memory, *bias = memory + padded;
  widen_row(args.gamma, K, padded, 1.0f, gamma);
  widen_row(args.bias, K, padded, 0.0f, bias);
  const bool centred = args.norm == DELTAOPS_LAYER_NORM;
  int threads = useful_threads(args.num_threads, 4 * M * K);
  for (;;) {
    const int given = team(threads, [&](int self) {
      const Range rows = share(M, self, threads);
      for (int64_t m = rows.begin; m < rows.end; ++m) {
        const T *x = static_cast<const T *>(args.x.data) + m * args.x.row_stride;
        T *y = static_cast<T *>(args.y.data) + m * args.y.row_stride;
        if (args.norm == DELTAOPS_NO_NORM) {
          scale_row(x, K, gamma, bias, y);
          continue;
        }
        const Stats s = row_stats(x, K, args.eps, centred);
        normalize_row(x, K, s, gamma, bias, y);
        if (args.stats.data)
          memcpy(static_cast<float *>(args.stats.data) + m * args.stats.row_stride, &s, sizeof s);
      }
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

template <class T>
deltaops_status norm_bias_backward_as(const NormBiasBackwardArgs &args) {
  const int64_t M = args.grad_y.rows, K = args.grad_y.cols, padded = round_up(K, kLanes);
  const bool want_gamma = args.grad_gamma.data, want_bias = args.grad_bias.data;
  const bool centred = args.norm == DELTAOPS_LAYER_NORM;
  const Chunks chunks = chunks_of(M, 16);
  const int64_t sums = want_gamma || want_bias ? chunks.count * padded : 0;
  Arena size(nullptr), *arena = &size;
  float *gamma = nullptr, *partial_gamma = nullptr, *partial_bias = nullptr;
  const auto lay_out = [&] {
    gamma = arena->take<float>(padded);
    partial_gamma = arena->take<float>(want_gamma ? sums : 0);
    partial_bias = arena->take<float>(want_bias ? sums : 0);
  };
  lay_out();
  void *memory = workspace(size.used());
  if (memory == nullptr) return no_memory("norm_bias_backward", size.used());
  Arena real(memory);
  arena = &real;
  lay_out();
  widen_row(args.gamma, K, padded, 1.0f, gamma);

  int threads = useful_threads(args.num_threads, 8 * M * K);
  for (;;) {
    const int given = team(threads, [&](int self) {
      const Range mine = share(chunks.count, self, threads);
      for (int64_t c = mine.begin; c < mine.end; ++c) {
        float *to_gamma = want_gamma ? partial_gamma + c * padded : nullptr;
        float *to_bias = want_bias ? partial_bias + c * padded : nullptr;
        if (to_gamma) memset(to_gamma, 0, static_cast<size_t>(padded) * sizeof(float));
        if (to_bias) memset(to_bias, 0, static_cast<size_t>(padded) * sizeof(float));
        for (int64_t m = c * chunks.rows; m < least(M, (c + 1) * chunks.rows); ++m) {
          const T *dy = static_cast<const T *>(args.grad_y.data) + m * args.grad_y.row_stride;
          const T *x =
              args.x.data ? static_cast<const T *>(args.x.data) + m * args.x.row_stride : nullptr;
          T *dx = args.grad_x.data ? static_cast<T *>(args.grad_x.data) + m * args.grad_x.row_stride
                                   : nullptr;
          if (args.norm == DELTAOPS_NO_NORM || (dx == nullptr && !want_gamma)) {
            scale_row_backward<T>(dy, x, K, gamma, dx, to_gamma, to_bias);
            continue;
          }
          Stats s;
          memcpy(&s, static_cast<const float *>(args.stats.data) + m * args.stats.row_stride,
                 sizeof s);
          normalize_row_backward<T, T>(dy, x, K, s, centred, gamma, nullptr, dx, to_gamma, to_bias);
        }
      }
      if (!want_gamma && !want_bias) return;
      barrier();
      const Range columns = share(padded / kLanes, self, threads);
      for (int64_t v = columns.begin; v < columns.end; ++v) {
        const int64_t k = v * kLanes, count = least(kLanes, K - k);
        if (want_gamma)
          reduce_chunks(partial_gamma, padded, chunks.count, k, count, args.grad_gamma);
        if (want_bias) reduce_chunks(partial_bias, padded, chunks.count, k, count, args.grad_bias);
      }
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status norm_bias_forward(const NormBiasForwardArgs &args) {
  return args.x.dtype == DELTAOPS_BF16 ? norm_bias_forward_as<Bf16>(args)
                                       : norm_bias_forward_as<float>(args);
}

deltaops_status norm_bias_backward(const NormBiasBackwardArgs &args) {
  if (!args.grad_x.data && !args.grad_gamma.data && !args.grad_bias.data) return DELTAOPS_OK;
  return args.grad_y.dtype == DELTAOPS_BF16 ? norm_bias_backward_as<Bf16>(args)
                                            : norm_bias_backward_as<float>(args);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
