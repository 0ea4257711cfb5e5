/* reduce.h: partial sums added up in a fixed order     out[i, j] = scale * sum_p partial[p, i, j]
 *
 * partial [parts, rows, cols] fp32, contiguous. One thread adds each element from p = 0 on, so that
 * the bits are the same every time. Traffic: 4 parts rows cols bytes read.
 */
#ifndef DELTAOPS_CUDA_AMPERE_REDUCE_H
#define DELTAOPS_CUDA_AMPERE_REDUCE_H

#include "primitives/element.h"

namespace deltaops::ampere {

constexpr int kReduceThreads = 256;

struct ReduceArguments {
  const float *partial;
  int64_t parts, rows, cols;
  float scale;
  float *wide;  /* may be NULL */
  void *narrow; /* of 16-bit elements; may be NULL */
  int64_t wide_stride, narrow_stride;
};

template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ ReduceArguments g) {
  const int64_t count = g.rows * g.cols, step = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < count;
       i += step) {
    float sum = 0.0f;
    for (int64_t part = 0; part < g.parts; ++part) sum += g.partial[part * count + i];
    sum *= g.scale;
    const int64_t row = i / g.cols, col = i % g.cols;
    if (g.wide != nullptr) g.wide[row * g.wide_stride + col] = sum;
    if (g.narrow != nullptr)
      static_cast<T *>(g.narrow)[row * g.narrow_stride + col] = from_float<T>(sum);
  }
}

}  // namespace deltaops::ampere
#endif
