/* outer.h: gradients that contract over the rows.
 *
 *     dA_i = dH_i^T drop_i(x)  [R_i, K]       dB_i^T = S_i^T dy  [R_i, N]       db = sum_m dy  [N]
 *     da_i = sum_m dH_i  [R_i]
 *
 * Work is cut by columns of x or dy, never by rows: each thread owns its columns for all M, so no
 * partial sums meet and the result does not depend on the team. A panel of kTileColumns columns
 * and a block of rows is copied (widened, masked) into L1, and the column sums for db are taken on
 * the way; then the micro-kernel runs with S as the broadcast side (its ranks are neighbours in
 * memory) and the panel as the vector side. dy is read once for dB of every branch and db.
 */
#ifndef DELTAOPS_CPU_OUTER_H
#define DELTAOPS_CPU_OUTER_H

#include "lowrank.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kOuterRows = 256;

/* One gradient of an outer product: `rank` columns of g [M, ...], to [rank, columns] or its
 * transpose. */
struct Outer {
  const float *g;
  int64_t g_row, rank;
  void *grad;
  bool bf16, transposed;
  int64_t columns;      // of the whole gradient
  const uint8_t *bits;  // keep-bits of the other operand, or NULL
  int64_t bits_row;
};

/* to[c] = sum over rows of g[row][c] / scale, for `count` columns. In double: a bias is few
 * numbers, each a long sum that may cancel. */
template <class G>
void column_sums(const float *g, int64_t g_row, int64_t M, int64_t count, double scale, G *to) {
  typedef double VecD __attribute__((vector_size(2 * DELTAOPS_VECTOR_BYTES)));
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = least(kLanes, count - c);
    VecD total = {};
    for (int64_t m = 0; m < M; ++m)
      total += __builtin_convertvector(load_units_partial<float>(g + m * g_row + c, lanes), VecD);
    for (int64_t i = 0; i < lanes; ++i) narrow(static_cast<float>(total[i] / scale), to + c + i);
  }
}

/* acc[q][:] += sum over rows of g[row][q] * panel[row][:]. */
template <int MR>
__attribute__((noinline)) void outer_tile(const float *g, ptrdiff_t g_row, const float *panel,
                                          int64_t rows, float *sum) {
  VecF acc[MR][kTileVectors];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) acc[i][j] = VecF{};
  accumulate(acc, g, 1, g_row, panel, rows);
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    float *to = sum + i * kTileColumns + j * kLanes;
    store(to, load(to) + acc[i][j]);
  }
}

/* panel = rows of x, columns n ... n + columns - 1, masked; column sums added to `total`. A panel
 * is a short run on every page of x, which no hardware prefetcher follows: the rows from `next` on,
 * which the next panel will want, are asked for now and come while the products run. */
template <bool Whole, bool Masked, class T>
DELTAOPS_INLINE void outer_rows(float *panel, const T *x, int64_t x_row, int64_t rows, int64_t n,
                                int64_t columns, const uint8_t *bits, int64_t bits_row,
                                const T *next, VecF (&column)[kTileVectors]) {
  for (int64_t i = 0; i < rows; ++i, x += x_row, next += x_row, panel += kTileColumns) {
    __builtin_prefetch(next, 0, 2);
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) {
      VecF v = Whole ? load(x + j * kLanes)
                     : load_units_partial<float>(x + j * kLanes, columns - j * kLanes);
      if (Masked) v = keep(v, bits + i * bits_row, n + j * kLanes);
      column[j] += v;
      store(panel + j * kLanes, v);
    }
  }
}

template <class T>
void outer_panel(float *panel, const T *x, int64_t x_row, int64_t m, int64_t rows, int64_t n,
                 int64_t columns, const uint8_t *bits, int64_t bits_row, float *total,
                 const T *next) {
  VecF column[kTileVectors] = {};
  const T *from = x + m * x_row + n;
  const bool whole = columns == kTileColumns;
  if (bits == nullptr && whole)
    outer_rows<true, false>(panel, from, x_row, rows, n, columns, bits, 0, next, column);
  else if (bits == nullptr)
    outer_rows<false, false>(panel, from, x_row, rows, n, columns, bits, 0, next, column);
  else if (whole)
    outer_rows<true, true>(panel, from, x_row, rows, n, columns, bits + m * bits_row, bits_row,
                           next, column);
  else
    outer_rows<false, true>(panel, from, x_row, rows, n, columns, bits + m * bits_row, bits_row,
                            next, column);
  if (total) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j)
    store(total + j * kLanes, load(total + j * kLanes) + column[j]);
}

template <class G>
void outer_store(const Outer &outer, const float *sum, int64_t n, int64_t columns) {
  G *grad = static_cast<G *>(outer.grad);
  for (int64_t q = 0; q < outer.rank; ++q)
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = outer.transposed ? (n + c) * outer.rank + q : q * outer.columns + n + c;
      narrow(sum[q * kTileColumns + c], grad + at);
    }
}

/* All gradients that read one matrix x [M, C], for one panel of its columns. Those without keep
 * bits share a panel; scratch: [kOuterRows][kTileColumns] and then the sums, by rank. */
template <class T>
void outer_products(const T *x, int64_t x_row, int64_t M, int64_t C, int64_t index,
                    const Outer *outers, int64_t count, void *bias_grad, bool bias_bf16,
                    float *scratch) {
  const int64_t n = index * kTileColumns, columns = least(kTileColumns, C - n);
  float *panel = scratch, *sums = scratch + kOuterRows * kTileColumns;
  float total[kTileColumns] = {};
  int64_t ranks = 0, plain = 0;
  for (int64_t j = 0; j < count; ++j) ranks += outers[j].rank, plain += outers[j].bits == nullptr;
  memset(sums, 0, static_cast<size_t>(ranks * kTileColumns) * sizeof(float));
  for (int64_t m = 0; m < M; m += kOuterRows) {
    const int64_t rows = least(kOuterRows, M - m);
    const T *next = m + kOuterRows < M ? x + (m + kOuterRows) * x_row + n
                    : n + columns < C  ? x + n + columns
                                       : x + m * x_row + n;
    if (bias_grad || plain > 0)
      outer_panel(panel, x, x_row, m, rows, n, columns, nullptr, 0, bias_grad ? total : nullptr,
                  next);
    for (int masked = 0; masked < 2; ++masked) {  // the shared panel is in place for the first lap
      int64_t rank = 0;
      for (int64_t j = 0; j < count; rank += outers[j].rank, ++j) {
        const Outer &outer = outers[j];
        if ((outer.bits != nullptr) != (masked == 1)) continue;
        if (masked)
          outer_panel(panel, x, x_row, m, rows, n, columns, outer.bits, outer.bits_row, nullptr,
                      next);
        for (int64_t q = 0; q < outer.rank; q += kTileRows)
          with_rows<kTileRows>(least(kTileRows, outer.rank - q), [&](auto size) {
            outer_tile<decltype(size)::value>(outer.g + m * outer.g_row + q, outer.g_row, panel,
                                              rows, sums + (rank + q) * kTileColumns);
          });
      }
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (outers[j].bf16)
      outer_store<Bf16>(outers[j], sums, n, columns);
    else
      outer_store<float>(outers[j], sums, n, columns);
    sums += outers[j].rank * kTileColumns;
  }
  if (bias_grad)
    for (int64_t c = 0; c < columns; ++c) {
      if (bias_bf16)
        narrow(total[c], static_cast<Bf16 *>(bias_grad) + n + c);
      else
        narrow(total[c], static_cast<float *>(bias_grad) + n + c);
    }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
