/* tile.h: the micro-kernel, and the tile of y built from it.
 *
 *     c[i][n] += sum_k a[i][k] b[k][n]       i < MR rows, n < NV * kLanes columns
 *
 * MR x NV accumulators stay in registers; each step loads NV vectors of b (packed, from L1 or L2)
 * and broadcasts MR values of a. With two FMAs a cycle the loads are covered once MR * NV / 2
 * cycles exceed (MR + NV) / 2 loads: 6 x 2 on AVX2 (12 of 16 registers), 6 x 4 on AVX-512 (24 of
 * 32), 4 x 2 on SSE2.
 *
 * A finished tile is
 *     y = round(bias + sum_j S_j B_j^T + sum over blocks of k of x W^T)
 * with the rank-R products as extra steps of the same accumulators. No chain of additions is longer
 * than kChain steps: each starts from zero and is added to the running float sum, within the tile
 * as between blocks of k. So the error follows the chain and not K, and blocks of k may be as long
 * as the caches like them.
 */
#ifndef DELTAOPS_CPU_TILE_H
#define DELTAOPS_CPU_TILE_H

#include "mask.h"
#include "pack.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int kTileRows = DELTAOPS_TILE_ROWS;
constexpr int kTileVectors = DELTAOPS_TILE_VECTORS;
constexpr int kTileColumns = kTileVectors * kLanes;
static_assert(kTileColumns % 8 == 0, "a tile's keep-bits are whole bytes");
constexpr int64_t kChain = 256;  // torch's products, the yardstick of accuracy, block k alike

DELTAOPS_INLINE VecF multiply_add(VecF acc, float a, VecF b) { return acc + splat(a) * b; }
DELTAOPS_INLINE VecF multiply_add(VecF acc, Pair a, VecF b) {
  return dpbf16(acc, (VecF)(a.bits - VecU{}), b);
}

/* Lines of memory to ask for on the way: some of them for every kSlice steps. */
struct PanelAhead {
  static constexpr int64_t kSlice = 8;
  const char *line;
  int64_t each;

  DELTAOPS_INLINE void some() {
    for (int64_t i = 0; i < each; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

/* acc += a b over `steps` steps. a: element (row, step) at a[row * a_row + step * a_step];
 * b: NV * kLanes neighbours at b[step * b_step], packed where it is left out. Three rows share a
 * pointer: base, base + a_row and base + 2 a_row are all addressing modes, so that six rows cost
 * two increments. Asking: for the lines of `ahead`. */
template <int MR, int NV, bool Asking = false, class Unit, class Ahead = PanelAhead>
DELTAOPS_INLINE void accumulate(VecF (&acc)[MR][NV], const Unit *a, ptrdiff_t a_row,
                                ptrdiff_t a_step, const Unit *b, int64_t steps,
                                ptrdiff_t b_step = NV * kLanes, Ahead *ahead = nullptr) {
  constexpr int kBases = (MR + 2) / 3;
  const Unit *base[kBases];
  DELTAOPS_UNROLL
  for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * a_row;
  for (int64_t step = 0; step < steps; ++step) {
    if constexpr (Asking)
      if (step % PanelAhead::kSlice == 0) ahead->some();
    VecF column[NV];
    DELTAOPS_UNROLL
    for (int j = 0; j < NV; ++j) memcpy(&column[j], b + j * kLanes, sizeof column[j]);
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Unit value = base[i / 3][(i % 3) * a_row];
      DELTAOPS_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add(acc[i][j], value, column[j]);
    }
    DELTAOPS_UNROLL
    for (int g = 0; g < kBases; ++g) base[g] += a_step;
    b += b_step;
  }
}

/* The same for rows of a, in chains of kChain. */
template <int MR, int NV, bool Asking = false, class Unit, class Ahead = PanelAhead>
DELTAOPS_INLINE void accumulate_chains(VecF (&acc)[MR][NV], const Unit *a, ptrdiff_t a_row,
                                       const Unit *b, int64_t steps, Ahead *ahead = nullptr,
                                       ptrdiff_t b_step = NV * kLanes) {
  accumulate<MR, NV, Asking>(acc, a, a_row, 1, b, least(steps, kChain), b_step, ahead);
  for (int64_t step = kChain; step < steps; step += kChain) {
    float held[MR][NV * kLanes];
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      store(held[i] + j * kLanes, acc[i][j]);
      acc[i][j] = VecF{};
    }
    accumulate<MR, NV, Asking>(acc, a + step, a_row, 1, b + step * b_step,
                               least(steps - step, kChain), b_step, ahead);
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] += load(held[i] + j * kLanes);
  }
}

/* A branch's columns in S and its steps in the packed Q = B (forward) or A^T (backward). */
struct Segment {
  int64_t column, step, rank;
};

template <class Unit, class T>
struct Tile {
  const Unit *a;  // rows of x, as they lie or copied; row i at a + i * a_row
  ptrdiff_t a_row;
  const Unit *b;  // panel of W
  int64_t steps;
  const float *s;  // rows of S; row i at s + i * s_row
  ptrdiff_t s_row;
  const float *q;  // [sum of ranks][kTileColumns]
  const Segment *segments;
  int64_t num_segments;
  const Segment *masked;  // a branch whose product is masked; or NULL
  const uint8_t *bits;    // its keep-bits from the tile's first column on; row i at i * bits_row
  int64_t bits_row;
  const float *start;  // [rows][kTileColumns], added; or NULL
  const float *bias;   // [kTileColumns], added; or NULL
  float *c;            // running sum; row i at c + i * c_row
  ptrdiff_t c_row;
  bool add_c;  // c has a sum already
  T *y;        // the finished tile goes here, rounded; NULL: to c
  ptrdiff_t y_row;
  int64_t columns;   // valid ones, at most kTileColumns
  PanelAhead ahead;  // what the next panel will be read from, or nothing
};

template <int MR, class Unit, class T>
__attribute__((noinline)) void tile(const Tile<Unit, T> &t) {
  // The running sum is needed at the very end; by then it has come up from L3.
  if (t.add_c)
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < kTileColumns; j += 16) __builtin_prefetch(t.c + i * t.c_row + j, 1);
  VecF acc[MR][kTileVectors];
  if (t.masked) {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) acc[i][j] = VecF{};
    accumulate(acc, t.s + t.masked->column, t.s_row, 1, t.q + t.masked->step * kTileColumns,
               t.masked->rank);
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) {
      const VecF value = t.bias ? load(t.bias + j * kLanes) : VecF{};
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i)
        acc[i][j] = value + keep(acc[i][j], t.bits + i * t.bits_row, j * kLanes);
    }
  } else {
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) {
      const VecF value = t.bias ? load(t.bias + j * kLanes) : VecF{};
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i) acc[i][j] = value;
    }
  }
  if (t.start) {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j)
      acc[i][j] += load(t.start + i * kTileColumns + j * kLanes);
  }
  for (int64_t g = 0; g < t.num_segments; ++g)
    accumulate(acc, t.s + t.segments[g].column, t.s_row, 1, t.q + t.segments[g].step * kTileColumns,
               t.segments[g].rank);
  PanelAhead ahead = t.ahead;
  if (ahead.each > 0)
    accumulate_chains<MR, kTileVectors, true>(acc, t.a, t.a_row, t.b, t.steps, &ahead);
  else
    accumulate_chains(acc, t.a, t.a_row, t.b, t.steps);

  float edge[MR][kTileColumns];  // a tile that hangs over the right edge goes through here
  const bool whole = t.columns == kTileColumns;
  const size_t valid = static_cast<size_t>(t.columns) * sizeof(float);
  if (t.add_c) {
    const float *c = t.c;
    ptrdiff_t c_row = t.c_row;
    if (!whole) {
      memset(edge, 0, sizeof edge);
      for (int i = 0; i < MR; ++i) memcpy(edge[i], t.c + i * t.c_row, valid);
      c = edge[0];
      c_row = kTileColumns;
    }
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) acc[i][j] += load(c + i * c_row + j * kLanes);
  }
  if (!whole) {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) store(edge[i] + j * kLanes, acc[i][j]);
    for (int i = 0; i < MR; ++i) {
      if (t.y == nullptr)
        memcpy(t.c + i * t.c_row, edge[i], valid);
      else
        for (int64_t n = 0; n < t.columns; ++n) narrow(edge[i][n], t.y + i * t.y_row + n);
    }
  } else if (t.y != nullptr) {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) store(t.y + i * t.y_row + j * kLanes, acc[i][j]);
  } else {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) store(t.c + i * t.c_row + j * kLanes, acc[i][j]);
  }
}

/* f(Constant<rows>{}) for 1 <= rows <= MR. */
template <int MR, class F>
DELTAOPS_INLINE void with_rows(int64_t rows, const F &f) {
  if constexpr (MR == 1) {
    f(Constant<1>{});
  } else {
    if (rows == MR)
      f(Constant<MR>{});
    else
      with_rows<MR - 1>(rows, f);
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
