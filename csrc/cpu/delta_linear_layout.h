/* delta_linear_layout.h: what a backward pass has to do, and where its scratch lies.
 *
 * The layers of a call are added one after the other: whether a layer has a product, what its outer
 * products read, how its rows are cut. Then every buffer gets its place, all in one block, and the
 * outer products learn where their operands are. delta_linear.h runs what is laid out here.
 */
#ifndef DELTAOPS_CPU_DELTA_LINEAR_LAYOUT_H
#define DELTAOPS_CPU_DELTA_LINEAR_LAYOUT_H

#include "delta_linear_terms.h"
#include "outer.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* What one layer's backward pass has beside its part: see Backward. */
struct Layer {
  bool need_ds;
  float *ds;      // [M, columns], branches side by side; or each row's own
  uint8_t *bits;  // a matrix for each branch with dropout, or one for all: each row's own
  int64_t bits_each, num_bits;
  Outer *b_outers;
  OuterInput dy;  // without columns where no dB and no db is wanted
  int64_t cut;    // of its rows, for the outer products: which of Backward's
  bool any_bias;
  bool again;       // some dB is wanted past an activation, or by rows
  float *up;        // [M, columns]: S made again, in the columns of branches with an activation
  int64_t columns;  // of ds and up: the sum of the ranks, or room for the widest
};

/* What the backward pass shares between its phases. Layers with a product (need_ds) come first. */
struct Backward {
  const BackwardArgs *of[DELTAOPS_MAX_GROUP];
  Part parts[DELTAOPS_MAX_GROUP];
  Layer layers[DELTAOPS_MAX_GROUP];
  int64_t count, num_products;
  Outer *a_outers;  // of all layers
  // Rows are cut as they are for a layer alone; x is read once for all layers of a cut.
  Segments cuts[DELTAOPS_MAX_GROUP];
  OuterInput x[DELTAOPS_MAX_GROUP];  // a cut's: without columns where no dA is wanted
  int64_t num_cuts;
  float *panel;  // per thread

  Group products() { return {parts, num_products, true}; }
};

inline bool wanted(const deltaops_matrix *grads, int64_t i) {
  return grads != nullptr && grads[i].data != nullptr && grads[i].rows > 0 && grads[i].cols > 0;
}

inline bool any_wanted(const deltaops_matrix *grads, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (wanted(grads, i)) return true;
  return false;
}

inline int64_t ranks_wanted(const BackwardArgs &args, const deltaops_matrix *grads) {
  int64_t ranks = 0;
  for (int64_t i = 0; i < args.num_branches; ++i)
    if (wanted(grads, i)) ranks += rank_of(args.branches[i]);
  return ranks;
}

/* The product of one layer's backward pass, dX [M, K of the op] = dy [M, N of the op] W: N and K
 * change places. grad_x: the sum of a group's. */
inline Product backward_product(const BackwardArgs &args, const deltaops_matrix &grad_x) {
  Product p = {};
  p.M = args.grad_y.rows;
  p.K = args.grad_y.cols;
  p.N = grad_x.data ? grad_x.cols : any_wanted(args.grad_a, args.num_branches) ? args.x.cols : 0;
  p.x = args.grad_y.data;
  p.x_row = args.grad_y.row_stride;
  if (grad_x.data && p.M > 0 && p.N > 0) {
    p.w = transposed(view(args.weight));
    if (p.w.data == nullptr) p.w.data = &args;  // N = 0 of the op: never read, dX is zero
    p.packed = panels_of(args.packed_weight);
  }
  p.out = grad_x.data;
  p.out_row = grad_x.row_stride;
  p.mask_x = false;
  p.seed = args.seed;
  p.adapter = args.adapter;
  p.bits_row = round_up(ceil_div(p.N, 8), 8) + 8;
  set_terms(args.branches, args.num_branches, false, nullptr, nullptr, &p);
  return p;
}

/* Which cut a layer's rows have: that which they have alone. */
inline int64_t cut_of(const BackwardArgs &args, Backward *b) {
  const Segments cut = segments_of(args.grad_y.rows, args.adapter ? args.num_branches : 1);
  int64_t c = 0;
  while (c < b->num_cuts && b->cuts[c].rows != cut.rows) ++c;
  if (c < b->num_cuts) return c;
  b->cuts[c] = cut;
  b->x[c] = {};
  return b->num_cuts++;
}

/* Adds a layer; true where it has anything to do. */
inline bool add_layer(const BackwardArgs &args, const Product &p, Backward *b) {
  const int64_t branches = args.num_branches;
  const bool any_a = any_wanted(args.grad_a, branches), any_b = any_wanted(args.grad_b, branches);
  Layer layer = {};
  layer.cut = cut_of(args, b);
  layer.any_bias = any_wanted(args.grad_branch_bias, branches);
  for (int64_t i = 0; i < branches; ++i)
    layer.again = layer.again || (wanted(args.grad_b, i) && p.M > 0 &&
                                  (p.adapter || args.branches[i].activation != DELTAOPS_IDENTITY));
  layer.need_ds = p.M > 0 && (p.w.data || any_a || layer.any_bias);
  layer.num_bits = p.num_terms - p.num_plain;
  if (p.adapter) layer.num_bits = least(layer.num_bits, 1);
  if (any_b || args.grad_bias.data)
    layer.dy = {args.grad_y.data,
                args.grad_y.row_stride,
                p.M,
                p.K,
                nullptr,
                0,
                ranks_wanted(args, args.grad_b),
                args.grad_bias.data,
                args.grad_bias.dtype == DELTAOPS_BF16,
                nullptr};
  if (any_a) {
    OuterInput &x = b->x[layer.cut];
    const int64_t ranks = x.ranks + ranks_wanted(args, args.grad_a);
    x = {args.x.data, args.x.row_stride, p.M, p.N, nullptr, 0, ranks, nullptr, false, nullptr};
  }
  if (!layer.need_ds && !layer.any_bias && !any_a && layer.dy.C == 0) return false;
  int64_t at = b->count++;
  if (layer.need_ds) {  // before those without a product
    const int64_t first = b->num_products++;
    b->of[at] = b->of[first], b->parts[at] = b->parts[first], b->layers[at] = b->layers[first];
    at = first;
  }
  b->of[at] = &args;
  b->parts[at] = {p, {}};
  b->layers[at] = layer;
  return true;
}

template <class T>
void lay_out_backward(int threads, Backward *b, Arena *arena) {
  int64_t branches = 0;
  for (int64_t i = 0; i < b->count; ++i) {
    const int64_t count = b->of[i]->num_branches;
    Product &p = b->parts[i].p;
    Layer &layer = b->layers[i];
    Term *terms = arena->take<Term>(count);
    Segment *segments = arena->take<Segment>(count);
    layer.b_outers = arena->take<Outer>(count);
    layer.bits_each = p.M * p.bits_row;
    layer.bits = arena->take<uint8_t>(layer.need_ds ? layer.num_bits * layer.bits_each : 0);
    layer.columns = p.adapter ? p.s_columns : p.ranks;
    layer.ds = arena->take<float>(layer.need_ds ? p.M * layer.columns : 0);
    layer.up = arena->take<float>(layer.again ? p.M * layer.columns : 0);
    if (layer.need_ds) {
      p.s = layer.ds;
      p.s_row = layer.columns;
    }
    branches += count;
    set_terms(b->of[i]->branches, count, false, terms, segments, &p);
    set_rows(p, terms, arena);
    if (terms == nullptr) continue;
    if (p.adapter)
      for (int64_t t = 0; t < p.num_terms; ++t)
        terms[t].bits = layer.num_bits > 0 ? layer.bits : nullptr;
    else
      for (int64_t t = p.num_plain; t < p.num_terms; ++t)
        terms[t].bits = layer.bits + (t - p.num_plain) * layer.bits_each;
    const deltaops_matrix &s = b->of[i]->s;
    for (int64_t t = 0; t < p.num_terms; ++t)
      if (terms[t].activation != DELTAOPS_IDENTITY && s.data) {
        terms[t].h = static_cast<const float *>(s.data) + terms[t].plain_column;
        terms[t].h_row = s.row_stride;
      }
    for (int64_t t = 0; p.adapter && t < p.num_terms; ++t) terms[t].plain_column = 0;
  }
  b->a_outers = arena->take<Outer>(branches);
  b->panel = arena->take<float>(threads * kOuterPanel);
  for (int64_t i = 0; i < b->num_cuts; ++i)
    b->x[i].sums = arena->take<float>(b->cuts[i].count * b->x[i].sums_each());
  for (int64_t i = 0; i < b->count; ++i) {
    OuterInput &dy = b->layers[i].dy;
    dy.sums = arena->take<float>(b->cuts[b->layers[i].cut].count * dy.sums_each());
  }
  if (b->num_products > 0) lay_out<T>(b->products(), arena);
}

/* One layer's outer products that are wanted; those of x go to `a_outers`, after the others. */
inline void set_outers(const BackwardArgs &args, const Product &p, Layer *layer, OuterInput *x,
                       Outer *a_outers) {
  layer->dy.outers = layer->b_outers;
  layer->dy.count = 0;
  int64_t column = 0;
  for (int64_t i = 0; i < args.num_branches; column += rank_of(args.branches[i]), ++i) {
    const int64_t rank = rank_of(args.branches[i]);
    const Rows *own = p.adapter ? &p.terms[i].rows : nullptr;
    const int64_t at = own ? 0 : column;
    if (wanted(args.grad_a, i)) {
      const uint8_t *bits = own ? p.terms[i].bits : nullptr;
      for (int64_t t = 0; !own && t < p.num_terms; ++t)
        if (p.terms[t].plain_column == column) bits = p.terms[t].bits;
      a_outers[x->count++] = {layer->ds + at,
                              layer->columns,
                              rank,
                              args.grad_a[i].data,
                              args.grad_a[i].dtype == DELTAOPS_BF16,
                              false,
                              p.N,
                              bits,
                              p.bits_row,
                              own};
    }
    const bool kept = !own && args.branches[i].activation == DELTAOPS_IDENTITY;
    if (wanted(args.grad_b, i))
      layer->b_outers[layer->dy.count++] = {
          (kept ? static_cast<const float *>(args.s.data) : layer->up) + at,
          kept ? args.s.row_stride : layer->columns,
          rank,
          args.grad_b[i].data,
          args.grad_b[i].dtype == DELTAOPS_BF16,
          true,
          p.K,
          nullptr,
          0,
          own};
  }
}

/* Those of all layers, once the buffers have their places. */
inline void set_outers(Backward *b) {
  Outer *a_outers = b->a_outers;
  for (int64_t c = 0; c < b->num_cuts; ++c) {
    b->x[c].outers = a_outers;
    b->x[c].count = 0;
    for (int64_t i = 0; i < b->count; ++i)
      if (b->layers[i].cut == c)
        set_outers(*b->of[i], b->parts[i].p, &b->layers[i], &b->x[c], a_outers);
    a_outers += b->x[c].count;
  }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
