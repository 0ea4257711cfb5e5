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

#include "product_plan.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

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
  float bias[kTileColumns], start[kTileRows * kTileColumns], dots[kDotRows * kTileColumns];
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
    if (cut.dot && rows > 0)
      dot_panel(x, x_row, rows, w.at(n, 0).data, w.row_stride, t.columns, p.K, dots, kTileColumns);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      next.some();
      const int64_t count = least(kTileRows, rows - i);
      t.a = x + i * x_row;
      t.s = s + i * p.s_columns;
      T *out = static_cast<T *>(p.out) + (m + i) * p.out_row + n;
      t.y = last && !p.more ? out : nullptr;
      t.add_c = !first || p.adds;
      if (cut.dot) {
        t.c = dots + i * kTileColumns;
        t.c_row = kTileColumns;
        t.add_c = true;
      } else if constexpr (sizeof(T) == 4) {
        t.c = out;
        t.c_row = p.out_row;
      } else {
        t.c = cut.c + self * cut.c_each + i * c_columns + n - range.begin * kTileColumns;
        t.c_row = c_columns;
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
template <class T>
void product(const Group &group, int self) {
  using Unit = typename MainUnit<T>::type;
  int64_t step = 0;
  for (int64_t block = 0; block < group.parts[0].cut.blocks; ++block) {
    if (group.sum)
      for (const Part &part : group) row_block<T, Unit>(&part, 1, self, block, &step);
    else
      row_block<T, Unit>(group.parts, group.count, self, block, &step);
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
