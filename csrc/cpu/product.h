/* product.h: one pass over the rows of x, frozen product and low-rank products together.
 *
 *     out = round(bias + x W^T + sum_i mask_i(S_i Q_i^T)),      S_i = factor_i * drop_i(x) P_i^T
 *
 * The forward pass is this with P = A, Q = B and the dropout on x; the gradient of x is this with
 * x = dy, W, A and B transposed (strides swapped) and the mask on the low-rank product.
 *
 * Layers that share x (q, k and v; gate and up) are a group of such products. Forward they have the
 * same x: a block of it is fetched once, for all of them. Backward they have the same out: it is
 * the sum of their products, which add to one another where it lies.
 *
 * Threads form a grid of row groups x column shares. A thread walks its rows in blocks, and each
 * block through k in blocks: copy the block of x (L2) where the tiles cannot read it as it lies,
 * add its part of S, then for each panel of W: pack it (L2) and run the tiles down the block.
 * Threads that share rows share the copy and S, double buffered, with a barrier where a copy is
 * made and before S is read; with one thread a row group there is no barrier at all. How a product
 * is cut never changes the order of one element's sum: the same bits for any team.
 */
#ifndef DELTAOPS_CPU_PRODUCT_H
#define DELTAOPS_CPU_PRODUCT_H

#include "dot.h"
#include "lowrank.h"
#include "team.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* Cuts one block of memory into buffers; with no memory behind it, it only counts. */
class Arena {
 public:
  explicit Arena(void *memory) : base_(static_cast<char *>(memory)) {}

  template <class T>
  T *take(int64_t count) {
    T *at = base_ ? reinterpret_cast<T *>(base_ + used_) : nullptr;
    // A line between buffers: vector stores round sizes up, and threads must not share lines.
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64) + 64);
    return at;
  }
  size_t used() const { return used_; }

 private:
  char *base_;
  size_t used_ = 0;
};

struct Product {
  int64_t M, N, K;  // rows, outputs, contraction
  const void *x;
  int64_t x_row;
  View<void> w;        // [N, K]; data NULL: only S is wanted
  const void *packed;  // its panels (packed.h), or NULL: they are packed on the way
  const void *bias;    // [N] or NULL
  void *out;
  int64_t out_row;
  const Term *terms;  // those without a mask on their product first
  const Segment *segments;
  int64_t num_terms, num_plain;      // plain: no dropout
  int64_t s_columns, plain_columns;  // of the padded S
  int64_t p_columns;                 // of the packed P: those of S, unless rows have one term each
  int64_t ranks;                     // sum of the ranks
  bool mask_x;                       // dropout on x (forward) or on the product (backward)
  float *s;                          // [M, ranks] for the caller, or NULL
  int64_t s_row;
  int64_t bits_row;  // bytes of one row of the keep-bits (backward)
  uint64_t seed;
  bool adds, more;         // in a sum: not the first of it, not the last
  const int32_t *adapter;  // each row's one term or -1, in the order of the branches; or NULL
};

/* How a Product is cut for a team, and the team's buffers. */
struct Cut {
  int threads, row_groups, shares;  // threads = row_groups * shares
  int64_t group_rows, block_rows, blocks;
  int64_t panels, panels_each;
  int64_t block_k, k_blocks, x_row;
  int64_t s_k;  // what S grows by at a time: block_k, or what it would be without dots
  bool dot, scratch_c;
  bool copy_x;  // false: the tiles read x where it lies
  float *packed_p;
  int64_t k_padded;
  char *x;  // [row_groups][2][block_rows][x_row] units
  int64_t x_buffer;
  float *s;  // [row_groups][2][block_rows][s_columns]
  int64_t s_buffer;
  float *panel;  // per thread
  int64_t panel_each;
  float *q;
  int64_t q_each;
  float *c;
  int64_t c_each;
  float *rows;  // a few widened or masked rows
  int64_t rows_each;
  uint8_t *bits;
  int64_t bits_each;
};

template <class T>
struct MainUnit {
  using type = float;
};
#if DELTAOPS_DPBF16
template <>
struct MainUnit<Bf16> {
  using type = Pair;
};
#endif

/* One product of a group, and how it is cut. Rows and threads are cut alike for all of them, k by
 * each one's own K: S sums up in the order that it has alone. */
struct Part {
  Product p;
  Cut cut;
};

/* Its products: those of one x, or those of one out. */
struct Group {
  Part *parts;
  int64_t count;
  bool sum;

  Part *begin() const { return parts; }
  Part *end() const { return parts + count; }
  bool sums() const { return sum && count > 1; }
};

/* The grid with the least work on its busiest thread, in multiply-adds per k: a column packed
 * costs about as much as kPackRows rows of it, and one read where it lies packed as kReadRows,
 * which hide behind those that it is multiplied with. Rows that are copied decide nothing: threads
 * that share rows share their copy, so that each copies M / threads of them in any grid. */
inline void choose_grid(const Group &group, Cut *cut) {
  constexpr int64_t kPackRows = 8, kReadRows = 16, kBarrier = 6144;
  const int64_t passes = group.sum ? group.count : 1, M = group.parts[0].p.M;
  int64_t least_cost = -1;
  for (int shares = 1; shares <= cut->threads; ++shares) {
    if (cut->threads % shares != 0) continue;
    const int64_t rows = ceil_div(M, cut->threads / shares);
    int64_t cost = shares > 1 ? passes * kBarrier : 0;
    for (const Part &part : group) {
      const int64_t columns = ceil_div(part.cut.panels, shares) * kTileColumns;
      cost += (part.p.packed ? most(rows, kReadRows) : rows + kPackRows) * columns;
    }
    if (least_cost >= 0 && cost >= least_cost) continue;
    least_cost = cost;
    cut->shares = shares;
  }
  cut->row_groups = cut->threads / cut->shares;
}

/* Few rows, and rows of W to read as they lie. Another order of the sums: the layers of a group go
 * the same way, which is the way that they go alone. */
inline bool by_dots(const Product &p) { return p.M <= kDotRows && p.w.col_stride == 1; }

/* Rows this many bytes apart share cache sets: a block of them would evict itself from L2, unless
 * they are at most kFewRows. */
constexpr int64_t kConflict = 2048, kFewRows = 32;

/* Whether rows of x lie as the tiles read them: whole units, each where a unit may stand. */
template <class T>
bool lies_ready(const Product &p) {
  using Unit = typename MainUnit<T>::type;
  constexpr int64_t kUnit = UnitOf<Unit>::k;
  return sizeof(Unit) == kUnit * sizeof(T) && p.K % kUnit == 0 && p.x_row % kUnit == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % alignof(Unit) == 0;
}

template <class T>
void plan(const Group &group, int threads) {
  const int64_t M = group.parts[0].p.M;
  Cut cut = {};
  cut.threads = threads;
  cut.dot = !group.sums();
  bool products = false;
  for (Part &part : group) {
    const Product &p = part.p;
    cut.dot = cut.dot && (p.w.data == nullptr || by_dots(p));
    products = products || p.w.data;
    part.cut.panels = p.w.data ? ceil_div(p.N, kTileColumns) : 0;
  }
  cut.dot = cut.dot && products;
  choose_grid(group, &cut);
  if (cut.dot) {
    cut.shares = threads;
    cut.row_groups = 1;
  }
  cut.group_rows = ceil_div(M, cut.row_groups);
  const int64_t row_limit = DELTAOPS_BLOCK_ROWS;
  cut.blocks = ceil_div(cut.group_rows, row_limit);
  cut.block_rows =
      cut.blocks ? round_up(ceil_div(cut.group_rows, cut.blocks), kTileRows) : kTileRows;
  cut.blocks = ceil_div(cut.group_rows, cut.block_rows);
  const int64_t k_limit = sizeof(T) == 4 ? DELTAOPS_BLOCK_K_F32 : DELTAOPS_BLOCK_K_BF16;
  for (Part &part : group) {
    const Product &p = part.p;
    cut.panels = part.cut.panels;
    cut.panels_each = ceil_div(cut.panels, cut.shares);
    // Whole bytes of keep-bits and whole vectors in every block but the last.
    cut.s_k = round_up(ceil_div(p.K, most(ceil_div(p.K, k_limit), 1)), 16);
    cut.block_k = cut.dot ? round_up(p.K, 16) : cut.s_k;
    cut.x_row = cut.block_k + 16;
    cut.k_blocks = p.K ? ceil_div(p.K, cut.block_k) : 1;
    // Floats sum up in y itself; bf16 needs a place for the sums between blocks of k.
    cut.scratch_c = sizeof(T) != 4 && (cut.k_blocks > 1 || group.sums()) && !cut.dot;
    cut.k_padded = round_up(p.K, kLanes);
    const bool conflict =
        cut.block_rows > kFewRows && p.x_row * static_cast<int64_t>(sizeof(T)) % kConflict == 0;
    // Dots read floats.
    cut.copy_x = !lies_ready<T>(p) || (sizeof(T) != 4 && cut.dot) || (cut.k_blocks > 1 && conflict);
    part.cut = cut;
  }
}

/* What the parts use one after the other they share: x, and each thread's scratch. */
template <class T>
void lay_out(const Group &group, Arena *arena) {
  Cut all = {};
  int64_t widest = 0;
  for (const Part &part : group) {
    const Cut &cut = part.cut;
    if (cut.copy_x) all.x_buffer = most(all.x_buffer, cut.block_rows * cut.x_row * 4);
    if (!cut.dot && !part.p.packed)
      all.panel_each = most(all.panel_each, cut.block_k * kTileColumns + 64);
    all.q_each = most(all.q_each, part.p.ranks * kTileColumns + 64);
    all.x_row = most(all.x_row, cut.x_row);
    all.block_k = most(all.block_k, cut.block_k);
    if (part.p.adapter) widest = most(widest, part.p.s_columns);
  }
  const Cut &one = group.parts[0].cut;
  const int64_t buffers = one.shares > 1 ? 2 : 1;
  all.rows_each = kNarrowRows * (all.x_row + widest) + 64;
  all.bits_each = all.block_k / 8 + 64;
  all.x = arena->take<char>(one.row_groups * buffers * all.x_buffer);
  all.panel = arena->take<float>(one.threads * all.panel_each);
  all.q = arena->take<float>(one.threads * all.q_each);
  all.rows = arena->take<float>(one.threads * all.rows_each);
  all.bits = arena->take<uint8_t>(one.threads * all.bits_each);
  for (Part &part : group) {
    Cut *cut = &part.cut;
    cut->x_buffer = all.x_buffer, cut->x = all.x;
    cut->panel_each = all.panel_each, cut->panel = all.panel;
    cut->q_each = all.q_each, cut->q = all.q;
    cut->rows_each = all.rows_each, cut->rows = all.rows;
    cut->bits_each = all.bits_each, cut->bits = all.bits;
    cut->packed_p = arena->take<float>(part.p.p_columns * cut->k_padded);
    cut->s_buffer = cut->block_rows * part.p.s_columns;
    cut->s = arena->take<float>(cut->row_groups * buffers * cut->s_buffer);
    if (group.sum && &part != group.parts) {
      cut->c_each = one.c_each, cut->c = one.c;
      continue;
    }
    cut->c_each = cut->scratch_c ? cut->block_rows * cut->panels_each * kTileColumns + 64 : 0;
    cut->c = arena->take<float>(cut->threads * cut->c_each);
  }
}

/* Thread `self`'s part of packing P for all. */
inline void pack_p(const Product &p, const Cut &cut, int self) {
  const Range vectors = share(ceil_div(p.K, kLanes), self, cut.threads);
  const int64_t begin = vectors.begin * kLanes, end = least(vectors.end * kLanes, p.K);
  for (int64_t t = 0; t < p.num_terms; ++t) {
    const Term &term = p.terms[t];
    if (p.adapter && term.rows.count == 0) continue;
    const bool shared = !p.adapter && (!p.mask_x || t < p.num_plain);
    const int64_t group_begin = shared ? 0 : term.p_column;
    const int64_t group_end = !shared    ? group_begin + round_up(term.segment.rank, kLanes)
                              : p.mask_x ? p.plain_columns
                                         : p.s_columns;
    if (term.bf16)
      pack_term<Bf16>(cut.packed_p, cut.k_padded, term, group_begin, group_end, begin, end, p.K);
    else
      pack_term<float>(cut.packed_p, cut.k_padded, term, group_begin, group_end, begin, end, p.K);
  }
}

/* The same for a group; true where anything was packed. */
inline bool pack_adapters(const Group &group, int self) {
  bool any = false;
  for (const Part &part : group) {
    pack_p(part.p, part.cut, self);
    any = any || part.p.num_terms > 0;
  }
  return any;
}

/* S for rows m ... m + rows - 1, over ks elements from k0 on. `floats`: the same rows as floats,
 * floats_row apart; or NULL. */
template <class T>
void lowrank_rows(const Product &p, const Cut &cut, int self, int64_t m, int64_t rows, int64_t k0,
                  int64_t ks, const float *floats, int64_t floats_row, float *s) {
  const bool first = k0 == 0;
  const int64_t shared_end = p.mask_x ? p.plain_columns : p.s_columns;
  float *few = cut.rows + self * cut.rows_each;
  uint8_t *bits = cut.bits + self * cut.bits_each;
  if (floats && shared_end > 0)
    narrow_columns(floats, floats_row, rows, cut.packed_p, cut.k_padded, k0, ks, 0, shared_end, s,
                   p.s_columns, first);
  if (floats && shared_end == p.s_columns) return;
  const T *x = static_cast<const T *>(p.x) + m * p.x_row + k0;
  for (int64_t i = 0; i < rows; i += kNarrowRows) {
    const int64_t count = least(kNarrowRows, rows - i);
    float *s_few = s + i * p.s_columns;
    if (!floats && shared_end > 0) {
      for (int64_t r = 0; r < count; ++r)
        pack_row<float>(few + r * cut.x_row, x + (i + r) * p.x_row, ks, ks);
      narrow_columns(few, cut.x_row, count, cut.packed_p, cut.k_padded, k0, ks, 0, shared_end,
                     s_few, p.s_columns, first);
    }
    for (int64_t t = p.mask_x ? p.num_plain : p.num_terms; t < p.num_terms; ++t) {
      const Term &term = p.terms[t];
      for (int64_t r = 0; r < count; ++r) {
        keep_bits(bits, m + i + r, k0 / 8, ceil_div(ks, 8), p.seed, term.stream, term.threshold);
        pack_kept(few + r * cut.x_row, x + (i + r) * p.x_row, bits, ks);
      }
      const int64_t begin = term.segment.column;
      narrow_columns(few, cut.x_row, count, cut.packed_p, cut.k_padded, k0, ks, begin,
                     begin + round_up(term.segment.rank, kLanes), s_few, p.s_columns, first);
    }
  }
}

/* The same where each row has one branch, whose rows are gathered a few at a time unless they are
 * neighbours that lie as floats. All branches have the same columns. */
template <class T>
void lowrank_own_rows(const Product &p, const Cut &cut, int self, int64_t m, int64_t rows,
                      int64_t k0, int64_t ks, const float *floats, int64_t floats_row, float *s) {
  float *few = cut.rows + self * cut.rows_each, *sums = few + kNarrowRows * cut.x_row;
  uint8_t *bits = cut.bits + self * cut.bits_each;
  const T *x = static_cast<const T *>(p.x) + k0;
  for (int64_t t = 0; t < p.num_terms; ++t) {
    const Term &term = p.terms[t];
    const Rows own = rows_between(term.rows, m, m + rows);
    const int64_t width = round_up(term.segment.rank, kLanes);
    const float *packed = cut.packed_p + term.p_column * cut.k_padded;
    const bool masked = p.mask_x && term.threshold > 0;
    for (int64_t i = 0, count; i < own.count; i += count) {
      const int64_t from = own.list[i] - m;
      float *to = s + from * p.s_columns;
      count = masked || !floats ? 0 : neighbours(own, i);
      if (count >= kNarrowRows) {
        narrow_columns(floats + from * floats_row, floats_row, count, packed, cut.k_padded, k0, ks,
                       0, width, to, p.s_columns, k0 == 0);
        continue;
      }
      count = least(kNarrowRows, own.count - i);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = own.list[i + r];
        float *copy = few + r * cut.x_row;
        if (!masked) {
          pack_row<float>(copy, x + row * p.x_row, ks, ks);
          continue;
        }
        keep_bits(bits, row, k0 / 8, ceil_div(ks, 8), p.seed, term.stream, term.threshold);
        pack_kept(copy, x + row * p.x_row, bits, ks);
      }
      if (own.list[i + count - 1] - own.list[i] == count - 1) {
        narrow_columns(few, cut.x_row, count, packed, cut.k_padded, k0, ks, 0, width, to,
                       p.s_columns, k0 == 0);
        continue;
      }
      narrow_columns(few, cut.x_row, count, packed, cut.k_padded, k0, ks, 0, width, sums, width,
                     true);
      for (int64_t r = 0; r < count; ++r) {
        float *row = s + (own.list[i + r] - m) * p.s_columns;
        for (int64_t c = 0; c < width; c += kLanes) {
          const VecF sum = load(sums + r * width + c);
          store(row + c, k0 == 0 ? sum : load(row + c) + sum);
        }
      }
    }
  }
}

/* finish_s for all terms, or for each row's own. */
inline void finish_rows(const Product &p, float *s, int64_t m, int64_t rows) {
  float *out = p.s ? p.s + m * p.s_row : nullptr;
  if (p.adapter == nullptr) {
    finish_s(p.terms, p.num_terms, s, p.s_columns, m, rows, out, p.s_row);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (out && p.mask_x)  // the caller's S, with columns for all
      memset(out + i * p.s_row, 0, static_cast<size_t>(p.ranks) * sizeof(float));
    const int32_t own = p.adapter[m + i];
    if (own >= 0)
      finish_s(p.terms + own, 1, s + i * p.s_columns, p.s_columns, m + i, 1,
               out ? out + i * p.s_row : nullptr, p.s_row);
  }
}

/* sum = bias + S_i Q_i for a tile of rows, each with its own branch, masked where that has dropout;
 * the bias (or 0) for rows without one. n: the first of the tile's columns. Branches are read row
 * by row: neighbours may have any, and one's NaN is not another's. Sums as a tile of one branch
 * does. */
inline void own_tile(const Product &p, int64_t m, int64_t rows, const float *s, const float *q,
                     int64_t n, const float *bias, float *sum) {
  for (int64_t i = 0; i < rows; ++i, sum += kTileColumns) {
    VecF acc[1][kTileVectors] = {}, start[kTileVectors];
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) start[j] = bias ? load(bias + j * kLanes) : VecF{};
    const int32_t own = p.adapter[m + i];
    const bool masked = own >= 0 && !p.mask_x && p.terms[own].threshold > 0;
    if (!masked) DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j) acc[0][j] = start[j];
    if (own >= 0) {
      const Term &term = p.terms[own];
      accumulate(acc, s + i * p.s_columns, 0, 1, q + term.segment.step * kTileColumns,
                 term.segment.rank);
    }
    const uint8_t *bits = masked ? p.terms[own].bits + (m + i) * p.bits_row : nullptr;
    DELTAOPS_UNROLL
    for (int j = 0; j < kTileVectors; ++j)
      store(sum + j * kLanes,
            masked ? start[j] + keep(acc[0][j], bits, n + j * kLanes) : acc[0][j]);
  }
}

/* Whether some rows from m on have the same branch, or none. */
DELTAOPS_INLINE bool same_branch(const Product &p, int64_t m, int64_t rows) {
  for (int64_t i = 1; i < rows; ++i)
    if (p.adapter[m + i] != p.adapter[m]) return false;
  return true;
}

/* At most so many tiles would each ask for so many lines of the next panel at once that they wait
 * for them themselves: there the lines are asked for while a tile runs, a few at a time. */
constexpr int64_t kFewTiles = 16;

/* The panels of one thread over one block of rows and k. */
template <class T, class Unit>
void panels(const Product &p, const Cut &cut, int self, int64_t m, int64_t rows, const Unit *x,
            int64_t x_row, const float *s, int64_t k0, int64_t ks, Range range) {
  constexpr int64_t kUnit = UnitOf<Unit>::k;
  const bool first = k0 == 0, last = k0 + ks == p.K;
  const View<T> w = typed<T>(p.w);
  Unit *panel = reinterpret_cast<Unit *>(cut.panel + self * cut.panel_each);
  float *q = cut.q + self * cut.q_each;
  const int64_t c_columns = cut.panels_each * kTileColumns;
  const int64_t num_direct = !last || p.adapter ? 0 : p.mask_x ? p.num_terms : p.num_plain;
  float bias[kTileColumns], start[kTileRows * kTileColumns], dots[kTileRows * kTileColumns];
  Tile<Unit, T> t = {};
  t.a_row = x_row;
  t.b = panel;
  t.steps = cut.dot ? 0 : ceil_div(ks, kUnit);
  t.s_row = p.s_columns;
  t.q = q;
  t.segments = p.segments;
  t.num_segments = num_direct;
  const float *starts = p.bias && first ? bias : nullptr;
  t.bias = starts;
  t.bits_row = p.bits_row;
  t.y_row = p.out_row;

  for (int64_t index = range.begin; index < range.end; ++index) {
    const int64_t n = index * kTileColumns;
    t.columns = least(kTileColumns, p.N - n);
    if (p.packed)
      t.b = static_cast<const Unit *>(p.packed) +
            (index * ceil_div(p.K, kUnit) + k0 / kUnit) * kTileColumns;
    else if (!cut.dot)
      pack_panel(panel, kTileColumns, w.at(n, k0), t.columns, ks, t.steps);
    if (last)
      for (int64_t j = 0; j < p.num_terms; ++j) {
        const Term &term = p.terms[j];
        if (p.adapter && rows_between(term.rows, m, m + rows).count == 0) continue;
        float *to = q + term.segment.step * kTileColumns;
        if (term.bf16)
          pack_panel(to, kTileColumns, typed<Bf16>(term.q).at(n, 0), t.columns, term.segment.rank,
                     term.segment.rank);
        else
          pack_panel(to, kTileColumns, typed<float>(term.q).at(n, 0), t.columns, term.segment.rank,
                     term.segment.rank);
      }
    if (starts) pack_row(bias, static_cast<const T *>(p.bias) + n, t.columns, kTileColumns);
    Prefetch<T> next;
    const bool another = index + 1 < range.end;
    const int64_t tiles = ceil_div(rows, kTileRows);
    const Unit *next_panel = t.b + ceil_div(p.K, kUnit) * kTileColumns;
    t.ahead = {};
    int64_t lines = 0;  // for each tile to ask for
    if (p.packed && another && !cut.dot && tiles <= kFewTiles && ks > 0) {
      lines = ceil_div(t.steps * kTileColumns, 16 * tiles);
      t.ahead = {reinterpret_cast<const char *>(next_panel),
                 ceil_div(lines * PanelAhead::kSlice, t.steps)};
    } else if (p.packed && another) {
      next = Prefetch<T>(next_panel, t.steps * kTileColumns, tiles);
    } else if (!cut.dot && another) {
      next = Prefetch<T>(w.at(n + kTileColumns, k0), least(kTileColumns, p.N - n - kTileColumns),
                         ks, tiles);
    }
    for (int64_t i = 0; i < rows; i += kTileRows) {
      next.some();
      const int64_t count = least(kTileRows, rows - i);
      t.a = x + i * x_row;
      t.s = s + i * p.s_columns;
      T *out = static_cast<T *>(p.out) + (m + i) * p.out_row + n;
      t.y = last && !p.more ? out : nullptr;
      t.add_c = !first || p.adds;
      if constexpr (sizeof(T) == 4) {
        t.c = out;
        t.c_row = p.out_row;
      } else {
        t.c = cut.c + self * cut.c_each + i * c_columns + n - range.begin * kTileColumns;
        t.c_row = c_columns;
      }
      if constexpr (sizeof(Unit) == sizeof(float) && UnitOf<Unit>::k == 1) {
        if (cut.dot) {
          dot_panel(t.a, t.a_row, count, w.at(n, 0).data, w.row_stride, t.columns, p.K, dots,
                    kTileColumns);
          t.c = dots;
          t.c_row = kTileColumns;
          t.add_c = true;
        }
      }
      with_rows<kTileRows>(count, [&](auto size) {
        constexpr int MR = decltype(size)::value;
        t.start = nullptr;
        t.masked = nullptr;
        const auto mask = [&](const Term &term) {
          t.masked = &term.segment;
          t.bits = term.bits + (m + i) * p.bits_row + n / 8;
        };
        if (last && p.adapter) {
          const int32_t own = p.adapter[m + i];
          t.num_segments = 0;
          t.bias = starts;
          if (!same_branch(p, m + i, MR)) {
            own_tile(p, m + i, MR, t.s, q, n, starts, start);
            t.start = start;
            t.bias = nullptr;
          } else if (own >= 0 && !p.mask_x && p.terms[own].threshold > 0) {
            mask(p.terms[own]);
          } else if (own >= 0) {
            t.segments = p.segments + own;
            t.num_segments = 1;
          }
        } else if (last && num_direct < p.num_terms) {
          // the last one in the tile's own registers
          for (int64_t j = num_direct; j + 1 < p.num_terms; ++j) {
            const Term &term = p.terms[j];
            masked_tile<MR>(t.s + term.segment.column, p.s_columns,
                            q + term.segment.step * kTileColumns, term.segment.rank,
                            term.bits + (m + i) * p.bits_row, p.bits_row, n, start,
                            j == num_direct);
            t.start = start;
          }
          mask(p.terms[p.num_terms - 1]);
        }
        tile<MR>(t);
      });
      t.ahead.line += lines * 64;
    }
  }
}

/* One thread's part of one block of rows, for products of the same x. step: how many copies of x
 * were made; the two places take turns. */
template <class T, class Unit>
void row_block(const Part *parts, int64_t count, int self, int64_t block, int64_t *step) {
  const Product &one = parts[0].p;
  const Cut &cut = parts[0].cut;
  const int group = self / cut.shares, member = self % cut.shares;
  const int64_t begin = group * cut.group_rows, end = least(one.M, begin + cut.group_rows);
  const int64_t buffers = cut.shares > 1 ? 2 : 1;
  const int64_t m = begin + block * cut.block_rows;
  const int64_t rows = m < end ? least(cut.block_rows, end - m) : 0;
  const Range mine = share(rows, member, cut.shares);
  const auto s_of = [&](const Part &part) {
    return part.cut.s + (group * buffers + block % buffers) * part.cut.s_buffer;
  };
  bool products = false, terms = false;
  for (const Part *part = parts; part != parts + count; ++part) {
    products = products || part->p.w.data;
    terms = terms || part->p.num_terms > 0;
  }
  for (int64_t kb = 0; kb < cut.k_blocks; ++kb) {
    const int64_t k0 = kb * cut.block_k, ks = least(cut.block_k, one.K - k0);
    const int64_t steps = ceil_div(ks, UnitOf<Unit>::k);
    const T *rows_of_x = static_cast<const T *>(one.x) + m * one.x_row + k0;
    const Unit *x;
    int64_t x_row = cut.x_row;
    if (cut.copy_x) {
      Unit *copy =
          reinterpret_cast<Unit *>(cut.x + (group * buffers + *step % buffers) * cut.x_buffer);
      ++*step;
      if (products || UnitOf<Unit>::k == 1)
        for (int64_t i = mine.begin; i < mine.end; ++i)
          pack_row(copy + i * x_row, rows_of_x + i * one.x_row, ks, steps);
      x = copy;
    } else {
      x = reinterpret_cast<const Unit *>(rows_of_x);
      x_row = one.x_row / UnitOf<Unit>::k;
    }
    if (mine.begin < mine.end)
      for (const Part *part = parts; part != parts + count; ++part) {
        const Product &p = part->p;
        if (p.num_terms == 0) continue;
        const float *floats = nullptr;
        if constexpr (UnitOf<Unit>::k == 1) floats = x + mine.begin * x_row;
        float *s_mine = s_of(*part) + mine.begin * p.s_columns;
        const int64_t first = m + mine.begin, count = mine.end - mine.begin;
        int64_t at = k0;
        do {
          const int64_t some = least(part->cut.s_k, k0 + ks - at);
          const float *here = floats ? floats + (at - k0) : nullptr;
          if (p.adapter)
            lowrank_own_rows<T>(p, part->cut, self, first, count, at, some, here, x_row, s_mine);
          else
            lowrank_rows<T>(p, part->cut, self, first, count, at, some, here, x_row, s_mine);
          at += some;
        } while (at < k0 + ks);
        if (k0 + ks == p.K) finish_rows(p, s_mine, first, count);
      }
    const bool needs_s = terms && k0 + ks == one.K;
    if (cut.shares > 1 && (cut.copy_x || needs_s)) barrier();
    if (rows > 0)
      for (const Part *part = parts; part != parts + count; ++part)
        panels<T, Unit>(part->p, part->cut, self, m, rows, x, x_row, s_of(*part), k0, ks,
                        share(part->cut.panels, member, cut.shares));
  }
}

/* One thread's part; all threads of the team call it, after P has been packed. */
template <class T, class Unit>
void product(const Group &group, int self) {
  int64_t step = 0;
  for (int64_t block = 0; block < group.parts[0].cut.blocks; ++block) {
    if (group.sum)
      for (const Part &part : group) row_block<T, Unit>(&part, 1, self, block, &step);
    else
      row_block<T, Unit>(group.parts, group.count, self, block, &step);
  }
}

/* Dots read floats whatever the ISA multiplies; every other product its own unit. */
template <class T>
void run_product(const Group &group, int self) {
  if (group.parts[0].cut.dot)
    product<T, float>(group, self);
  else
    product<T, typename MainUnit<T>::type>(group, self);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
