/* dot.h: the main product for a handful of rows (generation), where reading W is the whole cost.
 *
 *     c[m][n] = sum_k x[m][k] W[n][k]
 *
 * Nothing is packed: rows of W [N, K] stream through once, several at a time so that the memory
 * system has as many streams to follow and the FMAs as many chains, and each is used for all rows
 * of x before the next ones come. x has been widened to float and fits in L1.
 */
#ifndef DELTAOPS_CPU_DOT_H
#define DELTAOPS_CPU_DOT_H

#include "tile.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kDotRows = 8;  // rows of x up to which this path is taken

template <int MR, int NB, class T>
__attribute__((noinline)) void dot_block(const float *x, ptrdiff_t x_row, const T *w, int64_t w_row,
                                         int64_t K, float *c, ptrdiff_t c_row) {
  float total[MR][NB] = {};
  int64_t k = 0;
  while (k + kLanes <= K) {  // once for each chain
    const int64_t end = least(K - kLanes, k + (kChain - 1) * kLanes);
    VecF acc[MR][NB];
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NB; ++j) acc[i][j] = VecF{};
    for (; k <= end; k += kLanes) {
      VecF row[MR];
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i) row[i] = load(x + i * x_row + k);
      DELTAOPS_UNROLL
      for (int j = 0; j < NB; ++j) {
        const VecF value = load(w + j * w_row + k);
        DELTAOPS_UNROLL
        for (int i = 0; i < MR; ++i) acc[i][j] += row[i] * value;
      }
    }
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NB; ++j) total[i][j] += sum(acc[i][j]);
  }
  for (; k < K; ++k) DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NB; ++j) total[i][j] += x[i * x_row + k] * widen(w[j * w_row + k]);
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NB; ++j) c[i * c_row + j] = total[i][j];
}

/* `rows` rows of x against `columns` rows of W. */
template <class T>
void dot_panel(const float *x, ptrdiff_t x_row, int64_t rows, const T *w, int64_t w_row,
               int64_t columns, int64_t K, float *c, ptrdiff_t c_row) {
  constexpr int NB = 4;
  for (int64_t n = 0; n < columns;) {
    const bool block = n + NB <= columns;
    const T *at = w + n * w_row;
    for (int64_t i = 0; i < rows;) {
      const float *xi = x + i * x_row;
      float *ci = c + i * c_row + n;
      if (i + 2 <= rows) {
        if (block)
          dot_block<2, NB>(xi, x_row, at, w_row, K, ci, c_row);
        else
          dot_block<2, 1>(xi, x_row, at, w_row, K, ci, c_row);
        i += 2;
      } else {
        if (block)
          dot_block<1, NB>(xi, x_row, at, w_row, K, ci, c_row);
        else
          dot_block<1, 1>(xi, x_row, at, w_row, K, ci, c_row);
        i += 1;
      }
    }
    n += block ? NB : 1;
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
