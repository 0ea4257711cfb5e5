/* dot.h: the main product for a handful of rows (generation), where reading W is the whole cost.
 *
 *     c[m][n] = sum_k x[m][k] W[n][k]
 *
 * Nothing is packed: rows of W [N, K] stream through once, a few at a time so that the memory
 * system has as many streams to follow and the FMAs as many chains. Each vector of them meets all
 * rows of x before the next one comes. Where those are several, k goes in blocks for which they
 * stay in L1, and the lines of the next few rows of W are asked for meanwhile: their pieces are too
 * short for a prefetcher to follow.
 */
#ifndef DELTAOPS_CPU_DOT_H
#define DELTAOPS_CPU_DOT_H

#include "tile.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kDotRows = 8;  // rows of x up to which this path is taken

/* As many sums as registers allow, for so many rows of x at once that there are three of W or more
 * beside them. */
constexpr int kDotSums = sizeof(VecF) == 64 ? 24 : 12;
constexpr int kDotPass = sizeof(VecF) == 64 ? 8 : 4;
constexpr int dot_columns(int rows) { return rows <= 3 ? kDotSums / 3 : kDotSums / rows; }
constexpr int64_t kDotBytes = 24 * 1024;  // of x in a block of k

DELTAOPS_INLINE VecF multiply_units(VecF acc, VecF a, VecF b, float) { return acc + a * b; }
DELTAOPS_INLINE VecF multiply_units(VecF acc, VecF a, VecF b, Pair) { return dpbf16(acc, a, b); }

/* Units of x as lanes, `count` of them and then zeros. */
template <class Unit>
DELTAOPS_INLINE VecF units_of_x(const Unit *x, int64_t count) {
  Unit part[kLanes] = {};
  memcpy(part, x, static_cast<size_t>(count) * sizeof(Unit));
  VecF v;
  memcpy(&v, part, sizeof v);
  return v;
}

/* c = the products of `K` columns, or c += them. ahead: how many elements after those of this block
 * the next one's lie. */
template <int MR, int NB, class Unit, class T>
__attribute__((noinline)) void dot_block(const Unit *x, ptrdiff_t x_row, const T *w, int64_t w_row,
                                         int64_t K, int64_t ahead, bool first, float *c,
                                         ptrdiff_t c_row) {
  constexpr int64_t kUnit = UnitOf<Unit>::k, kStep = kLanes * kUnit;
  float total[MR][NB] = {};
  for (int64_t k = 0; k < K;) {  // once for each chain
    VecF acc[MR][NB];
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NB; ++j) acc[i][j] = VecF{};
    const int64_t whole = least(K / kStep * kStep, k + kChain * kStep);
    for (; k < whole; k += kStep) {
      VecF value[NB];
      DELTAOPS_UNROLL
      for (int j = 0; j < NB; ++j) {
        const T *at = w + j * w_row + k;
        value[j] = load_units(at, Unit{});
        if constexpr (MR > 2) __builtin_prefetch(at + ahead, 0, 3);
      }
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i) {
        VecF row;
        memcpy(&row, x + i * x_row + k / kUnit, sizeof row);
        DELTAOPS_UNROLL
        for (int j = 0; j < NB; ++j) acc[i][j] = multiply_units(acc[i][j], row, value[j], Unit{});
      }
    }
    if (k < K && K - k < kStep) {  // the last chain, which may have no more than this
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i) {
        const VecF row = units_of_x(x + i * x_row + k / kUnit, ceil_div(K - k, kUnit));
        DELTAOPS_UNROLL
        for (int j = 0; j < NB; ++j)
          acc[i][j] = multiply_units(acc[i][j], row,
                                     load_units_partial<Unit>(w + j * w_row + k, K - k), Unit{});
      }
      k = K;
    }
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NB; ++j) total[i][j] += sum(acc[i][j]);
  }
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NB; ++j) {
    float *to = c + i * c_row + j;
    *to = first ? total[i][j] : *to + total[i][j];
  }
}

/* `rows` rows of x, kDotRows at most, against `columns` rows of W. */
template <class Unit, class T>
void dot_panel(const Unit *x, ptrdiff_t x_row, int64_t rows, const T *w, int64_t w_row,
               int64_t columns, int64_t K, float *c, ptrdiff_t c_row) {
  for (int64_t i = 0, count; i < rows; i += count) {
    count = least(rows - i, kDotPass);
    with_rows<kDotPass>(count, [&](auto size) {
      constexpr int MR = decltype(size)::value, NB = dot_columns(MR);
      constexpr int64_t kUnit = UnitOf<Unit>::k;
      float *ci = c + i * c_row;
      const int64_t each = kDotBytes / 4 * kUnit / MR / 64 * 64;
      for (int64_t k = 0; k == 0 || k < K; k += each) {
        const int64_t ks = least(each, K - k);
        const Unit *xi = x + i * x_row + k / kUnit;
        int64_t n = 0;
        for (; n + NB <= columns; n += NB) {
          const int64_t ahead = n + 2 * NB <= columns ? NB * w_row : 0;
          dot_block<MR, NB>(xi, x_row, w + n * w_row + k, w_row, ks, ahead, k == 0, ci + n, c_row);
        }
        for (; n < columns; ++n)
          dot_block<MR, 1>(xi, x_row, w + n * w_row + k, w_row, ks, 0, k == 0, ci + n, c_row);
      }
    });
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
