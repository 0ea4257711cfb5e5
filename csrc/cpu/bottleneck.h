/* bottleneck.h: a sequential adapter, forward and backward.
 *
 *     forward    z = norm(x);  h = z Down^T + down_bias;  y = residual + s act(h) Up^T + up_bias
 *     backward   dh = s dy Up * act'(h);   dz = dh Down;  dx = norm'(dz), + dy where x is residual
 *                dDown = dh^T z,  dUp = dy^T (s act(h)),  and the sums over rows of dh and dy
 *
 * Rows go through in blocks that stay in L2: the norm, the down product (panels of Down^T in L1),
 * the activation on [rows, R], and the up product, whose tiles add residual and bias in registers
 * and are stored once, rounded once. So x is read and y written once, and between them only
 * [M, R] floats exist. Both small matrices are packed once per call, in float, for all threads.
 *
 * Backward, dx takes the same path with the matrices exchanged; then the gradients that contract
 * over the rows are summed by segments of rows (outer.h says why), kWide columns of x or dy at a
 * time, and z is made again from x while its panel is copied. dgamma and dbeta are summed by blocks
 * of rows. No sum's order depends on the team.
 */
#ifndef DELTAOPS_CPU_BOTTLENECK_H
#define DELTAOPS_CPU_BOTTLENECK_H

#include "activation.h"
#include "delta_linear.h"
#include "norm.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* f(a value of the element type of a matrix). */
template <class F>
DELTAOPS_INLINE void with_dtype(int32_t dtype, const F &f) {
  if (dtype == DELTAOPS_BF16)
    f(Bf16{});
  else
    f(0.0f);
}

constexpr int64_t kNarrowK = 256;  // of the contraction at a time: a panel of it stays in L1
constexpr int64_t kSumRows = 128;  // of x or dy copied at a time for the sums over rows
constexpr int64_t kWide = 64;      // columns that one thread sums at a time: whole cache lines
constexpr int64_t kWideTiles = kWide / kTileColumns;

/* Sizes that both passes share. They follow from M, K and R alone. */
struct Bottleneck {
  int64_t M, K, R;
  int64_t k_padded, r_padded;  // whole vectors
  int64_t panels;              // of kTileColumns outputs
  int64_t block_rows, blocks;
  int64_t row;  // stride of a copied row
};

inline Bottleneck bottleneck_of(int64_t M, int64_t K, int64_t R) {
  constexpr int64_t kBlockFloats = 48 << 10, kMostRows = 96, kBlocks = 32, kLeastRows = 12;
  Bottleneck b = {};
  b.M = M;
  b.K = K;
  b.R = R;
  b.k_padded = round_up(K, kLanes);
  b.r_padded = round_up(R, kLanes);
  b.panels = ceil_div(K, kTileColumns);
  b.row = b.k_padded + 16;  // so that a tile's rows do not fall on the same cache sets
  int64_t rows = least(least(kMostRows, kBlockFloats / K), ceil_div(M, kBlocks));
  if (rows < kLeastRows) rows = kLeastRows;
  b.block_rows = round_up(rows, kNarrowRows);  // whole tiles of either product
  b.blocks = ceil_div(M, b.block_rows);
  return b;
}

/* Thread `self`'s part of packing m [R, K] as the first factor: [K][width] by panels of columns,
 * as narrow_columns reads it. */
inline void pack_narrow(const Bottleneck &b, const View<void> &m, int32_t dtype, float *packed,
                        int self, int threads) {
  const Range vectors = share(b.k_padded / kLanes, self, threads);
  const int64_t begin = vectors.begin * kLanes, end = vectors.end * kLanes;
  if (begin == end) return;
  with_dtype(dtype, [&](auto element) {
    const auto view = typed<decltype(element)>(m);
    for (int64_t column = 0; column < b.r_padded;) {
      const int64_t width = panel_vectors(b.r_padded - column) * kLanes;
      pack_panel(packed + column * b.k_padded + begin * width, width, view.at(column, begin),
                 least(width, b.R - column), least(end, b.K) - begin, end - begin);
      column += width;
    }
  });
}

/* The same for m [K, R] as the second factor: [R][kTileColumns] for each panel of outputs. */
inline void pack_wide(const Bottleneck &b, const View<void> &m, int32_t dtype, float *packed,
                      int self, int threads) {
  const Range mine = share(b.panels, self, threads);
  with_dtype(dtype, [&](auto element) {
    const auto view = typed<decltype(element)>(m);
    for (int64_t index = mine.begin; index < mine.end; ++index) {
      const int64_t n = index * kTileColumns;
      pack_panel(packed + index * b.R * kTileColumns, kTileColumns, view.at(n, 0),
                 least(kTileColumns, b.K - n), b.R, b.R);
    }
  });
}

/* s [rows, r_padded] = x P for a block of rows: x as floats, P packed by pack_narrow. */
inline void narrow_block(const Bottleneck &b, const float *x, ptrdiff_t x_row, int64_t rows,
                         const float *packed, float *s) {
  for (int64_t k = 0; k < b.K; k += kNarrowK)
    narrow_columns(x + k, x_row, rows, packed, b.k_padded, k, least(kNarrowK, b.K - k), 0,
                   b.r_padded, s, b.r_padded, k == 0);
}

/* One tile of y = bias + s Q + add; add and bias may be NULL. */
template <int MR, class T, class Y>
__attribute__((noinline)) void wide_tile(const float *s, ptrdiff_t s_row, const float *q,
                                         int64_t rank, const float *bias, const T *add,
                                         int64_t add_row, Y *y, int64_t y_row, int64_t columns) {
  VecF acc[MR][kTileVectors];
  DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    const VecF value = bias ? load(bias + j * kLanes) : VecF{};
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) acc[i][j] = value;
  }
  accumulate(acc, s, s_row, 1, q, rank);
  if (columns == kTileColumns) {
    DELTAOPS_UNROLL
    for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) {
      if (add) acc[i][j] += load(add + i * add_row + j * kLanes);
      store(y + i * y_row + j * kLanes, acc[i][j]);
    }
    return;
  }
  float edge[MR][kTileColumns];
  DELTAOPS_UNROLL
  for (int i = 0; i < MR; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) store(edge[i] + j * kLanes, acc[i][j]);
  for (int i = 0; i < MR; ++i)
    for (int64_t n = 0; n < columns; ++n)
      narrow(edge[i][n] + (add ? widen(add[i * add_row + n]) : 0.0f), y + i * y_row + n);
}

/* All of a block's y [rows, K] = bias + s Q + add. bias: [panels * kTileColumns] or NULL. */
template <class T, class Y>
void wide_block(const Bottleneck &b, const float *s, int64_t rows, const float *packed,
                const float *bias, const T *add, int64_t add_row, Y *y, int64_t y_row) {
  for (int64_t index = 0; index < b.panels; ++index) {
    const int64_t n = index * kTileColumns, columns = least(kTileColumns, b.K - n);
    for (int64_t i = 0; i < rows; i += kTileRows)
      with_rows<kTileRows>(least(kTileRows, rows - i), [&](auto size) {
        wide_tile<decltype(size)::value>(
            s + i * b.r_padded, b.r_padded, packed + index * b.R * kTileColumns, b.R,
            bias ? bias + n : nullptr, add ? add + i * add_row + n : nullptr, add_row,
            y + i * y_row + n, y_row, columns);
      });
  }
}

/* Rows of x as floats: themselves, or widened into `copy`. */
template <class T>
DELTAOPS_INLINE const float *as_floats(const Bottleneck &b, const T *x, int64_t x_row, int64_t rows,
                                       float *copy, int64_t *row) {
  if constexpr (sizeof(T) == 4) {
    *row = x_row;
    return x;
  } else {
    for (int64_t i = 0; i < rows; ++i) pack_row(copy + i * b.row, x + i * x_row, b.K, b.k_padded);
    *row = b.row;
    return copy;
  }
}

// ------------------------------------------------------------------------------------ forward

struct BottleneckForward {
  Bottleneck b;
  float *down, *up;                           // packed
  float *gamma, *beta, *down_bias, *up_bias;  // as floats
  float *rows, *h;                            // per thread
  int64_t rows_each, h_each;
};

inline void lay_out_bottleneck(BottleneckForward *f, int threads, Arena *arena) {
  const Bottleneck &b = f->b;
  f->down = arena->take<float>(b.r_padded * b.k_padded);
  f->up = arena->take<float>(b.panels * b.R * kTileColumns);
  f->gamma = arena->take<float>(b.k_padded);
  f->beta = arena->take<float>(b.k_padded);
  f->down_bias = arena->take<float>(b.r_padded);
  f->up_bias = arena->take<float>(b.panels * kTileColumns);
  f->rows_each = b.block_rows * b.row;
  f->h_each = b.block_rows * b.r_padded + 16;
  f->rows = arena->take<float>(threads * f->rows_each);
  f->h = arena->take<float>(threads * f->h_each);
}

template <class T>
void bottleneck_forward_block(const BottleneckForwardArgs &args, const BottleneckForward &f,
                              int self, int64_t m) {
  const Bottleneck &b = f.b;
  const int64_t rows = least(b.block_rows, b.M - m);
  const T *x = static_cast<const T *>(args.x.data) + m * args.x.row_stride;
  float *copy = f.rows + self * f.rows_each, *h = f.h + self * f.h_each;
  const float *z = copy;
  int64_t z_row = b.row;
  if (args.norm != DELTAOPS_NO_NORM) {
    for (int64_t i = 0; i < rows; ++i) {
      const T *from = x + i * args.x.row_stride;
      const Stats s = row_stats(from, b.K, args.eps, args.norm == DELTAOPS_LAYER_NORM);
      normalize_row(from, b.K, s, f.gamma, f.beta, copy + i * b.row);
      if (args.stats.data)
        memcpy(static_cast<float *>(args.stats.data) + (m + i) * args.stats.row_stride, &s,
               sizeof s);
    }
  } else {
    z = as_floats(b, x, args.x.row_stride, rows, copy, &z_row);
  }
  narrow_block(b, z, z_row, rows, f.down, h);
  const VecF scaling = splat(args.scaling);
  with_activation(args.activation, [&](auto kind) {
    for (int64_t i = 0; i < rows; ++i) {
      float *row = h + i * b.r_padded;
      float *out =
          args.h.data ? static_cast<float *>(args.h.data) + (m + i) * args.h.row_stride : nullptr;
      each_vector(b.R, [&](int64_t q, int64_t count) {
        const VecF v = load(row + q) + load(f.down_bias + q);
        if (out) store_lanes(out + q, v, count);
        store(row + q, scaling * activate<decltype(kind)::value>(v));
      });
    }
  });
  const T *residual =
      args.residual.data ? static_cast<const T *>(args.residual.data) + m * args.residual.row_stride
                         : nullptr;
  wide_block(b, h, rows, f.up, args.up_bias.data ? f.up_bias : nullptr, residual,
             args.residual.row_stride, static_cast<T *>(args.y.data) + m * args.y.row_stride,
             args.y.row_stride);
}

template <class T>
deltaops_status bottleneck_forward_as(const BottleneckForwardArgs &args) {
  BottleneckForward f = {};
  f.b = bottleneck_of(args.x.rows, args.x.cols, args.down.rows);
  const Bottleneck &b = f.b;
  if (b.M == 0) return DELTAOPS_OK;
  int threads = useful_threads(args.num_threads, (2 * b.M + 8) * b.K * b.R);
  for (;;) {
    Arena size(nullptr);
    lay_out_bottleneck(&f, threads, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("bottleneck_forward", size.used());
    Arena arena(memory);
    lay_out_bottleneck(&f, threads, &arena);
    widen_row(args.gamma, b.K, b.k_padded, 1.0f, f.gamma);
    widen_row(args.beta, b.K, b.k_padded, 0.0f, f.beta);
    widen_row(args.down_bias, b.R, b.r_padded, 0.0f, f.down_bias);
    widen_row(args.up_bias, b.K, b.panels * kTileColumns, 0.0f, f.up_bias);
    const int given = team(threads, [&](int self) {
      pack_narrow(b, view(args.down), args.down.dtype, f.down, self, threads);
      pack_wide(b, view(args.up), args.up.dtype, f.up, self, threads);
      barrier();
      const Range mine = share(b.blocks, self, threads);
      for (int64_t block = mine.begin; block < mine.end; ++block)
        bottleneck_forward_block<T>(args, f, self, block * b.block_rows);
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

// ----------------------------------------------------------------------------------- backward

struct BottleneckBackward {
  Bottleneck b;
  bool inner, past_down;          // dh is wanted; dz is wanted
  float *up, *down;               // packed: Up^T as the first factor, Down^T as the second
  float *gamma, *beta;            // as floats
  float *dh, *act;                // [M, r_padded]: dh, and s act(h)
  float *grad_gamma, *grad_beta;  // [blocks][k_padded]
  float *rows;                    // per thread
  int64_t rows_each;
  float *panels;  // per thread: copied, kWide columns of kSumRows rows
  Segments segments;
  float *sums[2];  // for dDown and for dUp: [segments][wides][sums_each]

  int64_t wides() const { return ceil_div(b.K, kWide); }
  /* The outer product as [kWide / kTileColumns][R][kTileColumns], and the columns' own sums. */
  int64_t sums_each() const { return (b.R + 1) * kWide; }
  float *sums_of(int sort, int64_t segment, int64_t wide) const {
    return sums[sort] + (segment * wides() + wide) * sums_each();
  }
};

inline void lay_out_bottleneck(const BottleneckBackwardArgs &args, BottleneckBackward *f,
                               int threads, Arena *arena) {
  const Bottleneck &b = f->b;
  f->up = arena->take<float>(f->inner ? b.r_padded * b.k_padded : 0);
  f->down = arena->take<float>(f->past_down ? b.panels * b.R * kTileColumns : 0);
  f->gamma = arena->take<float>(b.k_padded);
  f->beta = arena->take<float>(b.k_padded);
  f->dh = arena->take<float>(b.M * b.r_padded + 16);
  f->act = arena->take<float>(args.grad_up.data ? b.M * b.r_padded + 16 : 0);
  f->grad_gamma = arena->take<float>(args.grad_gamma.data ? b.blocks * b.k_padded : 0);
  f->grad_beta = arena->take<float>(args.grad_beta.data ? b.blocks * b.k_padded : 0);
  f->rows_each = b.block_rows * b.row;
  f->rows = arena->take<float>(threads * f->rows_each);
  f->panels = arena->take<float>(threads * kSumRows * kWide);
  const bool wanted[] = {args.grad_down.data != nullptr,
                         args.grad_up.data != nullptr || args.grad_up_bias.data != nullptr};
  for (int sort = 0; sort < 2; ++sort)
    f->sums[sort] =
        arena->take<float>(wanted[sort] ? f->segments.count * f->wides() * f->sums_each() : 0);
}

/* dh, s act(h), dx and a block's part of dgamma and dbeta. */
template <class T>
void bottleneck_backward_block(const BottleneckBackwardArgs &args, const BottleneckBackward &f,
                               int self, int64_t block) {
  const Bottleneck &b = f.b;
  const int64_t m = block * b.block_rows, rows = least(b.block_rows, b.M - m);
  const T *dy = static_cast<const T *>(args.grad_y.data) + m * args.grad_y.row_stride;
  float *copy = f.rows + self * f.rows_each, *dh = f.dh + m * b.r_padded;
  if (f.inner) {
    int64_t wide_row = 0;
    const float *wide = as_floats(b, dy, args.grad_y.row_stride, rows, copy, &wide_row);
    narrow_block(b, wide, wide_row, rows, f.up, dh);
  }
  const VecF scaling = splat(args.scaling);
  with_activation(args.activation, [&](auto kind) {
    for (int64_t i = 0; i < rows; ++i) {
      const float *h = static_cast<const float *>(args.h.data) + (m + i) * args.h.row_stride;
      float *act = args.grad_up.data ? f.act + (m + i) * b.r_padded : nullptr;
      float *row = dh + i * b.r_padded;
      each_vector(b.R, [&](int64_t q, int64_t count) {
        const VecF v = load_lanes(h + q, count);
        if (act) store(act + q, scaling * activate<decltype(kind)::value>(v));
        if (f.inner)
          store(row + q, scaling * load(row + q) * activate_slope<decltype(kind)::value>(v));
      });
    }
  });
  if (!f.past_down) return;
  const T *add = args.residual_is_x ? dy : nullptr;
  T *dx =
      args.grad_x.data ? static_cast<T *>(args.grad_x.data) + m * args.grad_x.row_stride : nullptr;
  if (args.norm == DELTAOPS_NO_NORM) {
    wide_block<T, T>(b, dh, rows, f.down, nullptr, add, args.grad_y.row_stride, dx,
                     args.grad_x.row_stride);
    return;
  }
  wide_block<T, float>(b, dh, rows, f.down, nullptr, nullptr, 0, copy, b.row);
  const size_t bytes = static_cast<size_t>(b.k_padded) * sizeof(float);
  float *grad_gamma = args.grad_gamma.data ? f.grad_gamma + block * b.k_padded : nullptr;
  float *grad_beta = args.grad_beta.data ? f.grad_beta + block * b.k_padded : nullptr;
  if (grad_gamma) memset(grad_gamma, 0, bytes);
  if (grad_beta) memset(grad_beta, 0, bytes);
  for (int64_t i = 0; i < rows; ++i) {
    Stats s;
    memcpy(&s, static_cast<const float *>(args.stats.data) + (m + i) * args.stats.row_stride,
           sizeof s);
    normalize_row_backward<float, T>(
        copy + i * b.row, static_cast<const T *>(args.x.data) + (m + i) * args.x.row_stride, b.K, s,
        args.norm == DELTAOPS_LAYER_NORM, f.gamma, add ? add + i * args.grad_y.row_stride : nullptr,
        dx ? dx + i * args.grad_x.row_stride : nullptr, grad_gamma, grad_beta);
  }
}

/* [R, K], or [K, R] where transposed: columns n ... n + columns - 1 of K from sums by tiles. */
inline void store_sums(const Bottleneck &b, const float *sums, int64_t n, int64_t columns,
                       const deltaops_matrix &grad, bool transposed) {
  with_dtype(grad.dtype, [&](auto element) {
    auto *to = static_cast<decltype(element) *>(grad.data);
    for (int64_t q = 0; q < b.R; ++q)
      for (int64_t c = 0; c < columns; ++c)
        narrow(sums[(c / kTileColumns * b.R + q) * kTileColumns + c % kTileColumns],
               to + (transposed ? (n + c) * b.R + q : q * b.K + n + c));
  });
}

/* sums = g^T v and the column sums of v, over a segment of the rows: kWide columns from n on. v is
 * x, normalized where `stats` is there, or dy. g [M, r_padded]; NULL: the column sums alone. */
template <class T>
void sum_columns(const BottleneckBackward &f, int self, const T *v, int64_t v_row, int64_t n,
                 const deltaops_matrix *stats, const float *g, int64_t segment, float *sums) {
  const Bottleneck &b = f.b;
  constexpr int kVectors = static_cast<int>(kWide) / kLanes;
  const int64_t columns = least(kWide, b.K - n);
  const int64_t begin = segment * f.segments.rows, end = least(b.M, begin + f.segments.rows);
  float *panels = f.panels + self * kSumRows * kWide, *total = sums + b.R * kWide;
  memset(sums, 0, static_cast<size_t>(f.sums_each()) * sizeof(float));
  for (int64_t m = begin; m < end; m += kSumRows) {
    const int64_t rows = least(kSumRows, end - m);
    VecF part[kVectors] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const T *from = v + (m + i) * v_row + n;
      Stats s = {0.0f, 1.0f};
      if (stats)
        memcpy(&s, static_cast<const float *>(stats->data) + (m + i) * stats->row_stride, sizeof s);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t c = j * kLanes, left = columns - c;
        if (left <= 0) break;
        VecF value = load_lanes(from + c, least(kLanes, left));
        part[j] += value;
        if (stats)
          value = (value - splat(s.mean)) * splat(s.rstd) * load(f.gamma + n + c) +
                  load(f.beta + n + c);
        store(panels + (c / kTileColumns * kSumRows + i) * kTileColumns + c % kTileColumns, value);
      }
    }
    for (int j = 0; j < kVectors; ++j)
      store(total + j * kLanes, load(total + j * kLanes) + part[j]);
    if (g == nullptr) continue;
    for (int64_t t = 0; t * kTileColumns < columns; ++t)
      for (int64_t q = 0; q < b.R; q += kTileRows)
        with_rows<kTileRows>(least(kTileRows, b.R - q), [&](auto size) {
          outer_tile<decltype(size)::value>(g + m * b.r_padded + q, b.r_padded,
                                            panels + t * kSumRows * kTileColumns, rows,
                                            sums + (t * b.R + q) * kTileColumns);
        });
  }
}

/* Thread `self`'s part of the sums for dDown and dUp: segments of rows that it has had before, for
 * the reason that outer.h gives. */
template <class T>
void bottleneck_sums(const BottleneckBackwardArgs &args, const BottleneckBackward &f, int self,
                     int threads) {
  const int64_t wides = f.wides();
  const Range mine = share(f.segments.count * 2 * wides, self, threads);
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    const int64_t segment = item / (2 * wides), wide = item % wides;
    const int sort = item / wides % 2;
    float *sums = f.sums_of(sort, segment, wide);
    if (sort == 0 && args.grad_down.data)
      sum_columns(f, self, static_cast<const T *>(args.x.data), args.x.row_stride, wide * kWide,
                  args.norm == DELTAOPS_NO_NORM ? nullptr : &args.stats, f.dh, segment, sums);
    if (sort == 1 && (args.grad_up.data || args.grad_up_bias.data))
      sum_columns(f, self, static_cast<const T *>(args.grad_y.data), args.grad_y.row_stride,
                  wide * kWide, nullptr, args.grad_up.data ? f.act : nullptr, segment, sums);
  }
}

/* One of the jobs at the end: kWide columns of dDown, of dUp, of dgamma and dbeta; or dh's column
 * sums. They are handed out in turn, so that each thread gets some of every sort. */
inline void bottleneck_finish(const BottleneckBackwardArgs &args, const BottleneckBackward &f,
                              int64_t job) {
  const Bottleneck &b = f.b;
  const int64_t wides = f.wides(), sort = job / wides, wide = job % wides, n = wide * kWide;
  const int64_t columns = least(kWide, b.K - n);
  const auto added = [&](int which) {  // the segments' sums, in order
    float *sums = f.sums_of(which, 0, wide);
    for (int64_t s = 1; s < f.segments.count; ++s) {
      const float *more = f.sums_of(which, s, wide);
      for (int64_t i = 0; i < f.sums_each(); i += kLanes)
        store(sums + i, load(sums + i) + load(more + i));
    }
    return sums;
  };
  if (sort == 0 && args.grad_down.data) {
    store_sums(b, added(0), n, columns, args.grad_down, false);
  } else if (sort == 1 && (args.grad_up.data || args.grad_up_bias.data)) {
    const float *sums = added(1);
    if (args.grad_up.data) store_sums(b, sums, n, columns, args.grad_up, true);
    if (args.grad_up_bias.data)
      for (int64_t c = 0; c < columns; c += kLanes)
        store_gradient(args.grad_up_bias, n + c, load(sums + b.R * kWide + c),
                       least(kLanes, columns - c));
  } else if (sort == 2) {
    for (int64_t k = n; k < least(n + kWide, b.K); k += kLanes) {
      const int64_t count = least(kLanes, b.K - k);
      if (args.grad_gamma.data)
        reduce_chunks(f.grad_gamma, b.k_padded, b.blocks, k, count, args.grad_gamma);
      if (args.grad_beta.data)
        reduce_chunks(f.grad_beta, b.k_padded, b.blocks, k, count, args.grad_beta);
    }
  } else if (sort == 3 && n == 0 && args.grad_down_bias.data) {
    each_vector(b.R, [&](int64_t q, int64_t count) {
      VecF total = {};
      for (int64_t m = 0; m < b.M; m += kSumRows) {
        VecF part = {};
        for (int64_t i = m; i < least(m + kSumRows, b.M); ++i)
          part += load(f.dh + i * b.r_padded + q);
        total += part;
      }
      store_gradient(args.grad_down_bias, q, total, count);
    });
  }
}

template <class T>
deltaops_status bottleneck_backward_as(const BottleneckBackwardArgs &args) {
  BottleneckBackward f = {};
  f.b = bottleneck_of(args.grad_y.rows, args.grad_y.cols, args.down.rows);
  const Bottleneck &b = f.b;
  f.past_down = args.grad_x.data || args.grad_gamma.data || args.grad_beta.data;
  f.inner = f.past_down || args.grad_down.data || args.grad_down_bias.data;
  f.segments = segments_of(b.M);
  const bool by_rows = f.inner || args.grad_up.data;
  int threads = useful_threads(args.num_threads, (4 * b.M + 8) * b.K * b.R);
  for (;;) {
    Arena size(nullptr);
    lay_out_bottleneck(args, &f, threads, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("bottleneck_backward", size.used());
    Arena arena(memory);
    lay_out_bottleneck(args, &f, threads, &arena);
    widen_row(args.gamma, b.K, b.k_padded, 1.0f, f.gamma);
    widen_row(args.beta, b.K, b.k_padded, 0.0f, f.beta);
    const int given = team(threads, [&](int self) {
      if (by_rows) {
        if (f.inner) pack_narrow(b, transposed(view(args.up)), args.up.dtype, f.up, self, threads);
        if (f.past_down)
          pack_wide(b, transposed(view(args.down)), args.down.dtype, f.down, self, threads);
        barrier();
        const Range mine = share(b.blocks, self, threads);
        for (int64_t block = mine.begin; block < mine.end; ++block)
          bottleneck_backward_block<T>(args, f, self, block);
        barrier();
      }
      bottleneck_sums<T>(args, f, self, threads);
      barrier();
      for (int64_t job = self; job < 4 * f.wides(); job += threads) bottleneck_finish(args, f, job);
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status bottleneck_forward(const BottleneckForwardArgs &args) {
  return args.x.dtype == DELTAOPS_BF16 ? bottleneck_forward_as<Bf16>(args)
                                       : bottleneck_forward_as<float>(args);
}

deltaops_status bottleneck_backward(const BottleneckBackwardArgs &args) {
  return args.grad_y.dtype == DELTAOPS_BF16 ? bottleneck_backward_as<Bf16>(args)
                                            : bottleneck_backward_as<float>(args);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
