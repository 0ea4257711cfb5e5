/* outer.h: gradients that contract over the rows.
 *
 *     dA_i = dH_i^T drop_i(x)  [R_i, K]       dB_i^T = S_i^T dy  [R_i, N]       db = sum_m dy  [N]
 *     da_i = sum_m dH_i  [R_i]
 *
 * Work is cut into segments of rows first, and by columns within: a thread reads the rows that it
 * multiplied, which lie in its own core's caches. Where cores have no cache in common, rows read
 * crosswise cost twice, when they are read and when their memory is next written: 2.4 ms instead of
 * 0.2 for 5.6 MB. How rows are cut depends on their number alone, and the segments' sums are added
 * in order, so the result does not depend on the team.
 *
 * A segment's columns are gone down kOuterColumns at a time, in blocks of rows. Of each block a
 * panel of kTileColumns columns is copied (widened, masked) into L1, by the first tile that reads
 * it, or before: where columns are summed on the way, hang over the edge, or rows are gathered. The
 * micro-kernel runs with S as the broadcast side (its ranks are neighbours in memory) and the panel
 * as the vector side. While it runs, the lines of the next block are asked for. dy is read once for
 * dB of every branch and db.
 */
#ifndef DELTAOPS_CPU_OUTER_H
#define DELTAOPS_CPU_OUTER_H

#include "lowrank.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kOuterRows = 128, kOuterColumns = 64;
static_assert(kOuterRows <= kChain && kOuterColumns % kTileColumns == 0, "whole panels");
constexpr int64_t kOuterPanels = kOuterColumns / kTileColumns;
constexpr int64_t kOuterPanel = kOuterRows * kTileColumns + 64;  // of scratch, each thread's

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
  const Rows *own;  // the rows to sum over; NULL: all
};

/* to[c] = sum over rows (`own` or all M) of g[row][c] / scale, for `count` columns. In double: a
 * bias is few numbers, each a long sum that may cancel. */
template <class G>
void column_sums(const float *g, int64_t g_row, int64_t M, const Rows *own, int64_t count,
                 double scale, G *to) {
  const int64_t rows = own ? own->count : M;
  typedef double VecD __attribute__((vector_size(2 * DELTAOPS_VECTOR_BYTES)));
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = least(kLanes, count - c);
    VecD total = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t m = own ? own->list[i] : i;
      total += __builtin_convertvector(load_units_partial<float>(g + m * g_row + c, lanes), VecD);
    }
    for (int64_t i = 0; i < lanes; ++i) narrow(static_cast<float>(total[i] / scale), to + c + i);
  }
}

/* Asks for the lines of some rows, row by row and a line at a time, into L2. The columns of a block
 * are a short run on every page of x, which hardware prefetchers start afresh each time. */
class RowsAhead {
 public:
  RowsAhead() = default;
  /* tiles: how many read each panel of the block at work, and so share the lines. */
  template <class T>
  RowsAhead(const T *x, int64_t x_row, int64_t rows, int64_t columns, int64_t tiles)
      : at_(reinterpret_cast<const char *>(x)),
        rows_(rows),
        lines_(ceil_div(columns * static_cast<int64_t>(sizeof(T)), kLine)),
        left_(lines_),
        skip_(x_row * static_cast<int64_t>(sizeof(T)) - lines_ * kLine),
        each_(tiles > 0 ? ceil_div(kSteps, tiles) : 0) {}

  static constexpr int64_t kSteps = 4;  // of a tile, for each some()

  DELTAOPS_INLINE void one() {
    if (rows_ == 0) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += kLine;
    if (--left_ == 0) left_ = lines_, at_ += skip_, --rows_;
  }
  DELTAOPS_INLINE void some() {
    for (int64_t i = 0; i < each_; ++i) one();
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr;
  int64_t rows_ = 0, lines_ = 0, left_ = 0, skip_ = 0, each_ = 0;
};

/* Where a tile's panel comes from: it lies there, or is copied from x on the way, all of it or what
 * keep-bits say; loads and stores hide under the products. */
enum class Panel { lies, copied, kept };

/* sum[q][:] += sum over rows of g[row][q] * panel[row][:]. bits: of the panel's first column. */
template <int MR, Panel From, class T>
__attribute__((noinline)) void outer_tile_ahead(const float *g, ptrdiff_t g_row, const T *x,
                                                ptrdiff_t x_row, const uint8_t *bits,
                                                ptrdiff_t bits_row, float *panel, int64_t rows,
                                                float *sum, RowsAhead *state) {
  RowsAhead ahead = *state;  // in registers
  VecF acc[MR][kTileVectors];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) acc[i][j] = VecF{};
  for (int64_t left = rows; left > 0; left -= RowsAhead::kSteps) {
    ahead.some();
    for (int64_t step = 0; step < least(left, RowsAhead::kSteps); ++step) {
      VecF column[kTileVectors];
      DELTAOPS_UNROLL
      for (int j = 0; j < kTileVectors; ++j) {
        if constexpr (From != Panel::lies) {
          column[j] = load(x + j * kLanes);
          if constexpr (From == Panel::kept) column[j] = keep(column[j], bits, j * kLanes);
          store(panel + j * kLanes, column[j]);
        } else {
          column[j] = load(panel + j * kLanes);
        }
      }
      DELTAOPS_UNROLL
      for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
      for (int j = 0; j < kTileVectors; ++j) acc[i][j] = multiply_add(acc[i][j], g[i], column[j]);
      g += g_row;
      panel += kTileColumns;
      if constexpr (From != Panel::lies) x += x_row;
      if constexpr (From == Panel::kept) bits += bits_row;
    }
  }
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    float *to = sum + i * kTileColumns + j * kLanes;
    store(to, load(to) + acc[i][j]);
  }
  *state = ahead;
}

/* The same from a panel that lies ready, with nothing to ask for. */
template <int MR>
DELTAOPS_INLINE void outer_tile(const float *g, ptrdiff_t g_row, float *panel, int64_t rows,
                                float *sum) {
  RowsAhead nothing;
  outer_tile_ahead<MR, Panel::lies>(g, g_row, panel, 0, nullptr, 0, panel, rows, sum, &nothing);
}

/* sum[q][:] += sum over some rows of g[row][q] * panel[row - m][:]. */
template <int MR>
__attribute__((noinline)) void outer_tile_of(const float *g, ptrdiff_t g_row, const Rows &rows,
                                             int64_t m, const float *panel, float *sum,
                                             RowsAhead *state) {
  RowsAhead ahead = *state;
  VecF acc[MR][kTileVectors];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) acc[i][j] = VecF{};
  for (int64_t r = 0; r < rows.count; ++r) {
    if (r % RowsAhead::kSteps == 0) ahead.some();
    const float *values = g + rows.list[r] * g_row;
    const float *from = panel + (rows.list[r] - m) * kTileColumns;
    VecF column[kTileVectors];
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) column[j] = load(from + j * kLanes);
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j)
      acc[i][j] = multiply_add(acc[i][j], values[i], column[j]);
  }
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    float *to = sum + i * kTileColumns + j * kLanes;
    store(to, load(to) + acc[i][j]);
  }
  *state = ahead;
}

/* panel = rows of x, columns n ... n + columns - 1, masked; column sums added to `total`. */
template <bool Whole, bool Masked, class T>
DELTAOPS_INLINE void outer_rows(float *panel, const T *x, int64_t x_row, int64_t rows, int64_t n,
                                int64_t columns, const uint8_t *bits, int64_t bits_row,
                                RowsAhead *ahead, VecF (&column)[kTileVectors]) {
  for (int64_t i = 0; i < rows; ++i, x += x_row, panel += kTileColumns) {
    ahead->one();
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
                 RowsAhead *ahead) {
  VecF column[kTileVectors] = {};
  const T *from = x + m * x_row + n;
  const bool whole = columns == kTileColumns;
  if (bits == nullptr && whole)
    outer_rows<true, false>(panel, from, x_row, rows, n, columns, bits, 0, ahead, column);
  else if (bits == nullptr)
    outer_rows<false, false>(panel, from, x_row, rows, n, columns, bits, 0, ahead, column);
  else if (whole)
    outer_rows<true, true>(panel, from, x_row, rows, n, columns, bits + m * bits_row, bits_row,
                           ahead, column);
  else
    outer_rows<false, true>(panel, from, x_row, rows, n, columns, bits + m * bits_row, bits_row,
                            ahead, column);
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

/* How the rows are cut: by their number alone, so that no team changes a sum. Where each row has
 * one of some branches, a segment has as many rows for each as it would have for one: its sums are
 * as many as all branches have, and would cost more than the products. */
struct Segments {
  int64_t rows, count;
};
inline Segments segments_of(int64_t M, int64_t branches = 1) {
  constexpr int64_t kMost = 8;
  const int64_t least_rows = kOuterRows * most(branches, 1);
  const int64_t rows = round_up(most(ceil_div(M, kMost), least_rows), kOuterRows);
  return {rows, most(ceil_div(M, rows), 1)};
}

/* A matrix x [M, C], the gradients that read it, and their sums over each segment of its rows. */
struct OuterInput {
  const void *x;
  int64_t x_row, M, C;
  const Outer *outers;
  int64_t count, ranks;
  void *bias_grad;  // of the columns' own sums; or NULL
  bool bias_bf16;
  float *sums;  // [segments][panels][sum_rows()][kTileColumns]

  int64_t panels() const { return ceil_div(C, kTileColumns); }
  int64_t sum_rows() const { return ranks + (bias_grad ? 1 : 0); }
  int64_t sums_each() const { return panels() * sum_rows() * kTileColumns; }
  float *sums_of(int64_t segment, int64_t panel) const {
    return sums + segment * sums_each() + panel * sum_rows() * kTileColumns;
  }
};

/* Sums over the rows of one segment, for `group` panels of the columns, the first at n0. Gradients
 * without keep bits share a panel, which lies in scratch: [kOuterRows][kTileColumns]. */
template <class T>
void outer_columns(const OuterInput &in, Range segment, int64_t n0, int64_t group, float *panel,
                   float *sums) {
  const T *x = static_cast<const T *>(in.x);
  const int64_t x_row = in.x_row, C = in.C, sum_rows = in.sum_rows();
  const int64_t width = least(group * kTileColumns, C - n0), right = n0 + width;
  int64_t tiles = 0, plain = 0, own_tiles = 0;
  for (int64_t j = 0; j < in.count; ++j) {
    const int64_t heights = ceil_div(in.outers[j].rank, kTileRows);
    if (in.outers[j].own)
      own_tiles = most(own_tiles, heights);  // of which a row is read by one branch's
    else
      tiles += heights;
    plain += in.outers[j].bits == nullptr;
  }
  tiles += own_tiles;
  memset(sums, 0, static_cast<size_t>(group * sum_rows * kTileColumns) * sizeof(float));
  for (int64_t m = segment.begin; m < segment.end; m += kOuterRows) {
    const int64_t rows = least(kOuterRows, segment.end - m), below = m + rows;
    RowsAhead ahead;  // the rows below, or the top of the columns to the right
    if (below < segment.end)
      ahead = RowsAhead(x + below * x_row + n0, x_row, least(kOuterRows, segment.end - below),
                        width, tiles);
    else if (right < C)
      ahead = RowsAhead(x + segment.begin * x_row + right, x_row,
                        least(kOuterRows, segment.end - segment.begin),
                        least(kOuterColumns, C - right), tiles);
    for (int64_t p = 0; p < group; ++p) {
      const int64_t n = n0 + p * kTileColumns, columns = least(kTileColumns, C - n);
      float *sum = sums + p * sum_rows * kTileColumns;
      const bool whole = columns == kTileColumns;
      bool copied = in.bias_grad || (!whole && plain > 0);  // the panel holds these columns
      if (copied)
        outer_panel(panel, x, x_row, m, rows, n, columns, nullptr, 0,
                    in.bias_grad ? sum + in.ranks * kTileColumns : nullptr, &ahead);
      const uint8_t *bits = nullptr;                // of the panel
      for (int masked = 0; masked < 2; ++masked) {  // the shared panel is there for the first lap
        int64_t rank = 0;
        for (int64_t j = 0; j < in.count; rank += in.outers[j].rank, ++j) {
          const Outer &outer = in.outers[j];
          if ((outer.bits != nullptr) != (masked == 1)) continue;
          Rows own = {nullptr, 0};
          Range read = {0, rows};
          if (outer.own) {
            own = rows_between(*outer.own, m, m + rows);
            if (own.count == 0) continue;
            read = {own.list[0] - m, own.list[own.count - 1] + 1 - m};
          }
          const bool gathered = outer.own && read.end - read.begin != own.count;
          bool lies = copied && outer.bits == bits;
          if (!lies && (gathered || !whole)) {
            outer_panel(panel, x, x_row, m, rows, n, columns, outer.bits, outer.bits_row, nullptr,
                        &ahead);
            bits = outer.bits;
            lies = copied = true;
          }
          const bool ready = lies;
          const int64_t top = m + read.begin, count = read.end - read.begin;
          const T *from = x + top * x_row + n;
          const uint8_t *kept = outer.bits ? outer.bits + top * outer.bits_row + n / 8 : nullptr;
          float *panel_top = panel + read.begin * kTileColumns;
          // Tiles of about the same height: one of few rows waits for its own sums.
          const int64_t heights = ceil_div(outer.rank, kTileRows);
          for (int64_t t = 0; t < heights; ++t) {
            const Range q = share(outer.rank, t, heights);
            const float *g = outer.g + top * outer.g_row + q.begin;
            float *to = sum + (rank + q.begin) * kTileColumns;
            with_rows<kTileRows>(q.end - q.begin, [&](auto size) {
              constexpr int MR = decltype(size)::value;
              if (gathered)
                outer_tile_of<MR>(outer.g + q.begin, outer.g_row, own, m, panel, to, &ahead);
              else if (lies)
                outer_tile_ahead<MR, Panel::lies>(g, outer.g_row, from, x_row, kept, outer.bits_row,
                                                  panel_top, count, to, &ahead);
              else if (kept)
                outer_tile_ahead<MR, Panel::kept>(g, outer.g_row, from, x_row, kept, outer.bits_row,
                                                  panel_top, count, to, &ahead);
              else
                outer_tile_ahead<MR, Panel::copied>(g, outer.g_row, from, x_row, kept,
                                                    outer.bits_row, panel_top, count, to, &ahead);
            });
            lies = true;
          }
          if (ready) continue;
          copied = !outer.own;  // else its rows alone
          bits = outer.bits;
        }
      }
    }
  }
}

/* The same for a range of panels, which may be empty. */
template <class T>
void outer_sums(const OuterInput &in, const Segments &cut, int64_t segment, Range panels,
                float *scratch) {
  const Range rows = {segment * cut.rows, least(in.M, (segment + 1) * cut.rows)};
  for (int64_t first = panels.begin; first < panels.end; first += kOuterPanels)
    outer_columns<T>(in, rows, first * kTileColumns, least(kOuterPanels, panels.end - first),
                     scratch, in.sums_of(segment, first));
}

/* The gradients of some panels: the segments' sums, added in order. */
inline void outer_finish(const OuterInput &in, const Segments &cut, Range panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float *sums = in.sums_of(0, panel);
    for (int64_t i = 0; cut.count > 1 && i < in.sum_rows() * kTileColumns; i += kLanes) {
      VecF total = load(sums + i);
      for (int64_t s = 1; s < cut.count; ++s) total += load(sums + s * in.sums_each() + i);
      store(sums + i, total);
    }
    const int64_t n = panel * kTileColumns, columns = least(kTileColumns, in.C - n);
    for (int64_t j = 0; j < in.count; sums += in.outers[j++].rank * kTileColumns) {
      if (in.outers[j].bf16)
        outer_store<Bf16>(in.outers[j], sums, n, columns);
      else
        outer_store<float>(in.outers[j], sums, n, columns);
    }
    for (int64_t c = 0; in.bias_grad && c < columns; ++c) {
      if (in.bias_bf16)
        narrow(sums[c], static_cast<Bf16 *>(in.bias_grad) + n + c);
      else
        narrow(sums[c], static_cast<float *>(in.bias_grad) + n + c);
    }
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
