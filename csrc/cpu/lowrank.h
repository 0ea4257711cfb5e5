/* lowrank.h: the first factor of every branch, from drop(x) P^T.
 *
 *     forward    x = activations [M, K], P = A [R, K]      H   = scale_i * drop(x) A^T + a
 *                                                          S   = s_i * act(H)
 *     backward   x = dy [M, N],          P = B^T [R, N]    dH' = s_i * scale_i * dy B * act'(H)
 *
 * P is packed once per call and shared, [K][width] for panels of 1, 2 or 4 vectors of columns;
 * each branch starts on a vector. S grows block of k by block of k from the rows that the main
 * product reads next, so x comes from memory once. A branch with dropout gets its own masked copy
 * of a few rows at a time, small enough for L1.
 *
 * The r-sized terms are float throughout, whatever the main product runs in: adapters kept in
 * float on a bf16 model lose nothing here.
 */
#ifndef DELTAOPS_CPU_LOWRANK_H
#define DELTAOPS_CPU_LOWRANK_H

#include "activation.h"
#include "mask.h"
#include "rows.h"
#include "team.h"
#include "tile.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* One branch as one of the two passes sees it. */
struct Term {
  View<void> p, q;  // P [rank, contraction] and Q [outputs, rank], typed by `bf16`
  bool bf16;        // what the adapters are stored in
  bool dead;        // everything is dropped: the product is zero whatever x holds
  float factor;     // of the product: scale_i, and s_i unless an activation follows
  float scaling;    // s_i
  int32_t activation;
  const void *bias;  // [rank] of what the adapters are stored in (forward); or NULL
  const float *h;    // H of all rows, where its slope is a factor (backward); or NULL
  int64_t h_row;
  uint32_t threshold, stream;
  Segment segment;       // its columns in the padded S, its steps in Q
  int64_t p_column;      // its columns in the packed P
  int64_t plain_column;  // its columns in [M, R] without padding, in the order of the branches
  const uint8_t *bits;   // keep-bits of all rows, in the backward pass; or NULL
  Rows rows;             // its own, where each row has one branch (Product::adapter)
};

template <class T>
DELTAOPS_INLINE View<T> typed(const View<void> &view) {
  return {static_cast<const T *>(view.data), view.row_stride, view.col_stride};
}

/* The widest panel that still has all its columns: 4, 2 or 1 vectors. */
DELTAOPS_INLINE int panel_vectors(int64_t columns_left) {
  int vectors = kTileVectors;
  while (vectors > 1 && vectors * kLanes > columns_left) vectors /= 2;
  return vectors;
}

/* Packs k_begin ... k_end - 1 (multiples of kLanes, or the end) of the columns
 * [term.p_column, + rank), into P: panel of columns c, width w at P + c * k_padded, [k][w].
 * group_end is where the group of terms that share panels ends. */
template <class T>
void pack_term(float *packed, int64_t k_padded, const Term &term, int64_t group_begin,
               int64_t group_end, int64_t k_begin, int64_t k_end, int64_t K) {
  const View<T> p = typed<T>(term.p);
  int64_t column = group_begin;
  while (column < group_end) {
    const int64_t width = panel_vectors(group_end - column) * kLanes;
    // This panel's vectors that belong to the term.
    for (int64_t v = column; v < column + width; v += kLanes) {
      const int64_t row = v - term.p_column;
      if (row < 0 || row >= term.segment.rank) continue;
      float vector_panel[kLanes * kLanes];
      for (int64_t k = k_begin; k < k_end; k += kLanes) {
        const int64_t steps = least(kLanes, k_end - k);
        pack_panel(vector_panel, kLanes, p.at(row, k), least(kLanes, term.segment.rank - row),
                   least(steps, K - k), steps);
        float *to = packed + column * k_padded + k * width + (v - column);
        for (int64_t i = 0; i < steps; ++i) store(to + i * width, load(vector_panel + i * kLanes));
      }
    }
    column += width;
  }
}

/* S (+)= a P over one block of k: rows x (NV vectors of columns). */
template <int MR, int NV>
__attribute__((noinline)) void narrow_tile(const float *a, ptrdiff_t a_row, const float *panel,
                                           int64_t steps, float *s, ptrdiff_t s_row, bool first) {
  VecF acc[MR][NV];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NV; ++j) acc[i][j] = VecF{};
  accumulate_chains(acc, a, a_row, panel, steps);
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NV; ++j) {
    float *to = s + i * s_row + j * kLanes;
    store(to, first ? acc[i][j] : load(to) + acc[i][j]);
  }
}

/* Narrow panels take more rows, to have enough independent accumulators. */
template <int NV>
constexpr int narrow_rows() {
  return NV == kTileVectors ? kTileRows : 2 * kTileRows;
}
constexpr int kNarrowRows = 2 * kTileRows;

template <int NV>
void narrow_panel(const float *a, ptrdiff_t a_row, int64_t rows, const float *panel, int64_t steps,
                  float *s, ptrdiff_t s_row, bool first) {
  constexpr int MR = narrow_rows<NV>();
  int64_t i = 0;
  for (; i + MR <= rows; i += MR)
    narrow_tile<MR, NV>(a + i * a_row, a_row, panel, steps, s + i * s_row, s_row, first);
  for (; i + 3 <= rows; i += 3)
    narrow_tile<3, NV>(a + i * a_row, a_row, panel, steps, s + i * s_row, s_row, first);
  for (; i < rows; ++i)
    narrow_tile<1, NV>(a + i * a_row, a_row, panel, steps, s + i * s_row, s_row, first);
}

/* The columns [begin, end) of S for some rows, over the block k0 ... k0 + steps - 1. */
DELTAOPS_INLINE void narrow_columns(const float *a, ptrdiff_t a_row, int64_t rows,
                                    const float *packed, int64_t k_padded, int64_t k0,
                                    int64_t steps, int64_t begin, int64_t end, float *s,
                                    ptrdiff_t s_row, bool first) {
  for (int64_t column = begin; column < end;) {
    const int vectors = panel_vectors(end - column);
    const float *panel = packed + column * k_padded + k0 * vectors * kLanes;
    if (vectors == kTileVectors)
      narrow_panel<kTileVectors>(a, a_row, rows, panel, steps, s + column, s_row, first);
    else if (kTileVectors > 2 && vectors == 2)
      narrow_panel<(kTileVectors > 2 ? 2 : 1)>(a, a_row, rows, panel, steps, s + column, s_row,
                                               first);
    else
      narrow_panel<1>(a, a_row, rows, panel, steps, s + column, s_row, first);
    column += vectors * kLanes;
  }
}

/* Copies ks elements of a row, dropped ones as zeros; whole vectors. bits are those of this block.
 */
template <class T>
DELTAOPS_INLINE void pack_kept(float *to, const T *x, const uint8_t *bits, int64_t ks) {
  int64_t k = 0;
  for (; k + kLanes <= ks; k += kLanes) store(to + k, keep(load(x + k), bits, k));
  if (k < ks) store(to + k, keep(load_units_partial<float>(x + k, ks - k), bits, k));
}

/* The bias of kLanes columns from q on, times what the product's factor has of s_i. */
DELTAOPS_INLINE VecF bias_of(const Term &term, int64_t q) {
  if (term.bias == nullptr) return VecF{};
  const int64_t count = term.segment.rank - q;
  const VecF bias =
      term.bf16 ? load_units_partial<float>(static_cast<const Bf16 *>(term.bias) + q, count)
                : load_units_partial<float>(static_cast<const float *>(term.bias) + q, count);
  return term.activation == DELTAOPS_IDENTITY ? bias * splat(term.scaling) : bias;
}

/* From the products of rows m ... m + rows - 1 to S (or dH'), once the last block of k is in. The
 * caller's copy has no padding, and is taken before the activation. */
inline void finish_s(const Term *terms, int64_t count, float *s, ptrdiff_t s_row, int64_t m,
                     int64_t rows, float *out, ptrdiff_t out_row) {
  for (int64_t t = 0; t < count; ++t) {
    const Term &term = terms[t];
    const int64_t rank = term.segment.rank;
    float *columns = s + term.segment.column;
    for (int64_t q = 0; q < rank; q += kLanes) {
      const VecF bias = bias_of(term, q);
      for (int64_t i = 0; i < rows; ++i) {
        float *at = columns + i * s_row + q;
        VecF v = bias;
        if (!term.dead) v += load(at) * splat(term.factor);
        if (term.h)
          v *= activate_slope(term.activation, load_units_partial<float>(
                                                   term.h + (m + i) * term.h_row + q, rank - q));
        store(at, v);
      }
    }
    if (out)
      for (int64_t i = 0; i < rows; ++i)
        memcpy(out + i * out_row + term.plain_column, columns + i * s_row,
               static_cast<size_t>(rank) * sizeof(float));
    if (term.h || term.activation == DELTAOPS_IDENTITY) continue;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t q = 0; q < rank; q += kLanes) {
        float *at = columns + i * s_row + q;
        store(at, activate(term.activation, load(at)) * splat(term.scaling));
      }
  }
}

/* up = s_i * act(H) for some rows, without padding: what dB contracts with dy. */
inline void activate_rows(const Term &term, Range rows, float *up, int64_t up_row) {
  const int64_t rank = term.segment.rank;
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for (int64_t q = 0; q < rank; q += kLanes) {
      const VecF h = load_units_partial<float>(term.h + m * term.h_row + q, rank - q);
      const VecF v = activate(term.activation, h) * splat(term.scaling);
      memcpy(up + m * up_row + q, &v, static_cast<size_t>(least(kLanes, rank - q)) * sizeof(float));
    }
}

/* sum (+)= mask * (S Q): a dropout branch's part of a tile of dX. bits: the tile's first row. */
template <int MR>
__attribute__((noinline)) void masked_tile(const float *s, ptrdiff_t s_row, const float *q,
                                           int64_t rank, const uint8_t *bits, ptrdiff_t bits_row,
                                           int64_t column, float *sum, bool first) {
  VecF acc[MR][kTileVectors];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) acc[i][j] = VecF{};
  accumulate(acc, s, s_row, 1, q, rank);
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    float *to = sum + i * kTileColumns + j * kLanes;
    const VecF kept = keep(acc[i][j], bits + i * bits_row, column + j * kLanes);
    store(to, first ? kept : load(to) + kept);
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
