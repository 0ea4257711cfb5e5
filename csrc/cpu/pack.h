/* pack.h: operands copied into the order in which the tile reads them.
 *
 *     panel  [steps][width]   of units: width neighbouring rows n of a strided matrix (n, k), step
 *                             after step of the contraction k, zeros past either edge
 *     rows   [rows][stride]   of units: rows of x as they are, the stride padded so that the rows
 * of a tile do not fall on the same cache sets
 *
 * A unit is a float (one k) or a Pair of bf16 (two k: the low half is the even k). bf16 is
 * widened on the way where the unit is float. A frozen weight is packed once where its owner keeps
 * the panels; else on the fly, panel by panel, from either layout, which costs no memory: one read
 * of the panel per row block, against block_rows multiply-adds for each element.
 */
#ifndef DELTAOPS_CPU_PACK_H
#define DELTAOPS_CPU_PACK_H

#include "dpbf16.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* Element (n, k) at data[n * row_stride + k * col_stride]; one of the strides is 1. */
template <class T>
struct View {
  const T *data;
  int64_t row_stride, col_stride;

  View at(int64_t n, int64_t k) const {
    return {data + n * row_stride + k * col_stride, row_stride, col_stride};
  }
};

template <class Unit>
struct UnitOf;  // how many k a unit holds
template <>
struct UnitOf<float> {
  static constexpr int64_t k = 1;
};
template <>
struct UnitOf<Pair> {
  static constexpr int64_t k = 2;
};

/* kLanes neighbouring units as 32-bit lanes. */
DELTAOPS_INLINE VecF load_units(const float *p, float) { return load(p); }
DELTAOPS_INLINE VecF load_units(const Bf16 *p, float) { return load(p); }
DELTAOPS_INLINE VecF load_units(const Bf16 *p, Pair) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* The same from `count` elements, zeros after them; count may be anything, negative included. */
template <class Unit, class T>
DELTAOPS_INLINE VecF load_units_partial(const T *p, int64_t count) {
  constexpr int64_t kFull = kLanes * UnitOf<Unit>::k;
  if (count >= kFull) return load_units(p, Unit{});
  T part[kFull] = {};
  for (int64_t i = 0; i < kFull; ++i)
    if (i < count) part[i] = p[i];
  return load_units(part, Unit{});
}

template <class Unit>
DELTAOPS_INLINE void store_units(Unit *p, VecF v) {
  memcpy(p, &v, sizeof v);
}

/* k is contiguous: kLanes rows are transposed in registers. */
template <class Unit, class T>
void pack_panel_rows(Unit *panel, int64_t width, const T *w, int64_t row_stride, int64_t rows,
                     int64_t ks, int64_t steps) {
  constexpr int64_t kUnit = UnitOf<Unit>::k;
  for (int64_t n = 0; n < width; n += kLanes)
    for (int64_t step = 0; step < steps; step += kLanes) {
      const int64_t k = step * kUnit;
      VecF r[kLanes];
      if (n + kLanes <= rows && k + kLanes * kUnit <= ks) {
        DELTAOPS_UNROLL
        for (int i = 0; i < kLanes; ++i) r[i] = load_units(w + (n + i) * row_stride + k, Unit{});
      } else {
        VecF edge[kLanes] = {};
        for (int i = 0; i < kLanes && n + i < rows; ++i)
          edge[i] = load_units_partial<Unit>(w + (n + i) * row_stride + k, ks - k);
        DELTAOPS_UNROLL
        for (int i = 0; i < kLanes; ++i) r[i] = edge[i];
      }
      transpose(r);
      Unit *to = panel + step * width + n;
      if (step + kLanes <= steps) {
        DELTAOPS_UNROLL
        for (int i = 0; i < kLanes; ++i) store_units(to + i * width, r[i]);
      } else {
        VecF edge[kLanes];
        DELTAOPS_UNROLL
        for (int i = 0; i < kLanes; ++i) edge[i] = r[i];
        for (int i = 0; step + i < steps; ++i) store_units(to + i * width, edge[i]);
      }
    }
}

/* n is contiguous: each step is a copy, or two rows of bf16 zipped into pairs. */
template <class T>
void pack_panel_cols(float *panel, int64_t width, const T *w, int64_t col_stride, int64_t rows,
                     int64_t ks, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t n = 0; n < width; n += kLanes)
      store(panel + step * width + n,
            step < ks ? load_units_partial<float>(w + step * col_stride + n, rows - n) : VecF{});
}

DELTAOPS_INLINE VecF load_halves(const Bf16 *p, int64_t count) {  // bits in the low half
  return (VecF)((VecU)load_units_partial<float>(p, count) >> 16);
}

inline void pack_panel_cols(Pair *panel, int64_t width, const Bf16 *w, int64_t col_stride,
                            int64_t rows, int64_t ks, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t n = 0; n < width; n += kLanes) {
      const Bf16 *even = w + 2 * step * col_stride + n;
      VecU pair = {};
      if (2 * step < ks) pair = (VecU)load_halves(even, rows - n);
      if (2 * step + 1 < ks) pair |= (VecU)load_halves(even + col_stride, rows - n) << 16;
      store_units(panel + step * width + n, (VecF)pair);
    }
}

/* Packs rows 0 ... rows - 1 (of a panel of `width`) and k 0 ... ks - 1 (of `steps` steps). */
template <class Unit, class T>
void pack_panel(Unit *panel, int64_t width, const View<T> &w, int64_t rows, int64_t ks,
                int64_t steps) {
  if (w.col_stride == 1)
    pack_panel_rows(panel, width, w.data, w.row_stride, rows, ks, steps);
  else
    pack_panel_cols(panel, width, w.data, w.col_stride, rows, ks, steps);
}

/* Brings the lines that the next panel will be read from into L2, a few at each tile in between:
 * from the weight they are many short runs on as many pages, which hardware prefetchers start
 * afresh each time; a packed panel is one run, and they start it late. */
template <class T>
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const View<T> &w, int64_t rows, int64_t ks, int64_t calls) {
    const bool by_rows = w.col_stride == 1;
    runs_ = by_rows ? rows : ks;
    stride_ = by_rows ? w.row_stride : w.col_stride;
    lines_ = ceil_div(by_rows ? ks : rows, kLine);
    data_ = w.data;
    each_ = ceil_div(runs_ * lines_, calls);
  }

  /* A packed panel of `count` units of 4 bytes. */
  template <class Unit>
  Prefetch(const Unit *panel, int64_t count, int64_t calls)
      : data_(reinterpret_cast<const T *>(panel)),
        runs_(1),
        lines_(ceil_div(count, 16)),
        each_(ceil_div(lines_, calls)) {}

  DELTAOPS_INLINE void some() {
    for (int64_t i = 0; i < each_ && run_ < runs_; ++i) {
      __builtin_prefetch(data_ + run_ * stride_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, ++run_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T *data_ = nullptr;
  int64_t runs_ = 0, stride_ = 0, lines_ = 0, each_ = 0, run_ = 0, line_ = 0;
};

/* Copies ks elements of one row, zeros up to `steps` steps. */
template <class Unit, class T>
DELTAOPS_INLINE void pack_row(Unit *to, const T *x, int64_t ks, int64_t steps) {
  constexpr int64_t kUnit = UnitOf<Unit>::k;
  int64_t step = 0;
  for (; (step + kLanes) * kUnit <= ks; step += kLanes)
    store_units(to + step, load_units(x + step * kUnit, Unit{}));
  for (; step < steps; step += kLanes) {
    Unit edge[kLanes];
    store_units(edge, load_units_partial<Unit>(x + step * kUnit, ks - step * kUnit));
    memcpy(to + step, edge, static_cast<size_t>(least(kLanes, steps - step)) * sizeof(Unit));
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
