/* norm.h: LayerNorm and RMSNorm of one row, forward and backward, while it lies in L1.
 *
 *     n_k  = (x_k - mean) rstd         mean = 0 in RMSNorm
 *     y_k  = n_k gamma_k + bias_k
 *     dx_k = rstd (g_k - mean(g) - n_k mean(g n)),   g = dy gamma;   no mean(g) in RMSNorm
 *     dgamma_k = sum over rows of dy_k n_k,          dbias_k = sum over rows of dy_k
 *
 * The variance is the mean of (x - mean)^2, from a second look at the row, never E x^2 - mean^2.
 */
#ifndef DELTAOPS_CPU_NORM_H
#define DELTAOPS_CPU_NORM_H

#include "bf16.h"
#include "core.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

struct Stats {
  float mean, rstd;
};

/* The first `count` lanes: all of them without a branch where count is kLanes. */
template <class T>
DELTAOPS_INLINE VecF load_lanes(const T *p, int64_t count) {
  return count == kLanes ? load(p) : load_partial(p, count);
}

template <class T>
DELTAOPS_INLINE void store_lanes(T *p, VecF v, int64_t count) {
  if (count == kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
}

/* f(k, count) for every vector of a row; count is the constant kLanes for all but the last. */
template <class F>
DELTAOPS_INLINE void each_vector(int64_t K, const F &f) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) f(k, int64_t{kLanes});
  if (k < K) f(k, K - k);
}

/* Sum of f(x_k): four chains, so that the additions do not wait for each other. */
template <class T, class F>
DELTAOPS_INLINE float row_sum(const T *x, int64_t K, const F &f) {
  VecF chain[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= K; k += 4 * kLanes) DELTAOPS_UNROLL
  for (int j = 0; j < 4; ++j) chain[j] += f(load(x + k + j * kLanes));
  for (; k + kLanes <= K; k += kLanes) chain[0] += f(load(x + k));
  float total = sum((chain[0] + chain[1]) + (chain[2] + chain[3]));
  for (; k < K; ++k) total += f(splat(widen(x[k])))[0];
  return total;
}

/* [1, K] of either dtype as floats, zeros up to `padded`; `absent` everywhere where there is none.
 */
inline void widen_row(const deltaops_matrix &row, int64_t K, int64_t padded, float absent,
                      float *to) {
  for (int64_t k = 0; k < padded; ++k) {
    if (row.data == nullptr || k >= K)
      to[k] = k < K ? absent : 0.0f;
    else if (row.dtype == DELTAOPS_BF16)
      to[k] = widen(static_cast<const Bf16 *>(row.data)[k]);
    else
      to[k] = static_cast<const float *>(row.data)[k];
  }
}

/* Elements k ... k + count - 1 of a [1, K] gradient of either dtype. */
DELTAOPS_INLINE void store_gradient(const deltaops_matrix &row, int64_t k, VecF v, int64_t count) {
  if (row.dtype == DELTAOPS_BF16)
    store_lanes(static_cast<Bf16 *>(row.data) + k, v, count);
  else
    store_lanes(static_cast<float *>(row.data) + k, v, count);
}

/* Sums over the rows that do not depend on the team: rows are cut into chunks by M alone, each
 * chunk has its own partial sum [padded], and these are added in order. */
struct Chunks {
  int64_t rows, count;
};
inline Chunks chunks_of(int64_t M, int64_t least_rows) {
  constexpr int64_t kMost = 64;
  const int64_t even = ceil_div(M, kMost), rows = even > least_rows ? even : least_rows;
  return {rows, ceil_div(M, rows)};
}

inline void reduce_chunks(const float *partial, int64_t stride, int64_t count, int64_t k,
                          int64_t lanes, const deltaops_matrix &grad) {
  VecF total = {};
  for (int64_t c = 0; c < count; ++c) total += load(partial + c * stride + k);
  store_gradient(grad, k, total, lanes);
}

/* centred: LayerNorm, else RMSNorm. */
template <class T>
DELTAOPS_INLINE Stats row_stats(const T *x, int64_t K, float eps, bool centred) {
  const float share = 1.0f / static_cast<float>(K);
  const float mean = centred ? row_sum(x, K, [](VecF v) { return v; }) * share : 0.0f;
  const VecF middle = splat(mean);
  const float square = row_sum(x, K, [&](VecF v) { return (v - middle) * (v - middle); });
  return {mean, 1.0f / __builtin_sqrtf(square * share + eps)};
}

/* y = n gamma + bias. gamma, bias: [K] float. */
template <class T, class Y>
DELTAOPS_INLINE void normalize_row(const T *x, int64_t K, Stats s, const float *gamma,
                                   const float *bias, Y *y) {
  const VecF mean = splat(s.mean), rstd = splat(s.rstd);
  each_vector(K, [&](int64_t k, int64_t count) {
    const VecF n = (load_lanes(x + k, count) - mean) * rstd;
    store_lanes(y + k, n * load(gamma + k) + load(bias + k), count);
  });
}

/* What a row of dy gives: dx, unless NULL, plus `add` unless NULL; and its part of dgamma and dbias
 * added to [K] floats, unless NULL. gamma and those may be read up to a whole vector past K. */
template <class D, class T>
DELTAOPS_INLINE void normalize_row_backward(const D *dy, const T *x, int64_t K, Stats s,
                                            bool centred, const float *gamma, const T *add, T *dx,
                                            float *grad_gamma, float *grad_bias) {
  const VecF mean = splat(s.mean), rstd = splat(s.rstd);
  VecF sum_g = {}, sum_gn = {};
  each_vector(K, [&](int64_t k, int64_t count) {
    const VecF d = load_lanes(dy + k, count), g = d * load(gamma + k);
    const VecF n = (load_lanes(x + k, count) - mean) * rstd;
    sum_g += g;
    sum_gn += g * n;
    if (grad_gamma) store(grad_gamma + k, load(grad_gamma + k) + d * n);
    if (grad_bias) store(grad_bias + k, load(grad_bias + k) + d);
  });
  if (dx == nullptr) return;
  const float share = 1.0f / static_cast<float>(K);
  const VecF mean_g = splat(centred ? sum(sum_g) * share : 0.0f),
             mean_gn = splat(sum(sum_gn) * share);
  each_vector(K, [&](int64_t k, int64_t count) {
    const VecF g = load_lanes(dy + k, count) * load(gamma + k);
    const VecF n = (load_lanes(x + k, count) - mean) * rstd;
    VecF out = rstd * (g - mean_g - n * mean_gn);
    if (add) out += load_lanes(add + k, count);
    store_lanes(dx + k, out, count);
  });
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
