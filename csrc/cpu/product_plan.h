/* product_plan.h: how a product of product.h is cut for a team of threads, and where its buffers
 * lie.
 *
 * The grid of row groups x column shares, the blocks of rows and of k, whether x is copied, and one
 * arena for all of it. A group's products are cut together. Nothing here touches a number of
 * theirs.
 */
#ifndef DELTAOPS_CPU_PRODUCT_PLAN_H
#define DELTAOPS_CPU_PRODUCT_PLAN_H

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
    cut.copy_x = !lies_ready<T>(p) || (cut.k_blocks > 1 && conflict);
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

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
