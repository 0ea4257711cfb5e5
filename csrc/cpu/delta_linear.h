/* delta_linear.h: the op, forward and backward (deltaops.h has its mathematics).
 *
 *     forward    y  = x W^T + bias + sum S_i B_i^T              one Product; S kept for backward
 *     backward   dX = dy W + sum mask_i(dH'_i A_i)              one Product on transposed views
 *                dA_i = dH'_i^T mask_i(x),  dB_i = dy^T S_i,  db = sum_m dy        outer.h
 *                da_i = sum_m dH'_i / scale_i
 *
 * dH'_i = s_i scale_i dy B_i * act'(H_i), so the dropout scale is paid once and dX and dA need only
 * the bits. Those are made once per backward pass, for both: M * K / 8 bytes of scratch for each
 * branch with dropout. Past an activation H_i is what the forward pass kept, and S_i = s_i act(H_i)
 * is made again, in scratch. Everything is allocated before the first store.
 *
 * Where each row has its own branch (rows.h), the same with sums over a branch's rows alone: work
 * follows the rows, not the branches, and the bits are one matrix for all of them.
 */
#ifndef DELTAOPS_CPU_DELTA_LINEAR_H
#define DELTAOPS_CPU_DELTA_LINEAR_H

#include "delta_linear_layout.h"
#include "peak.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* The product of one layer's forward pass; the terms come later. */
inline Product forward_product(const ForwardArgs &args) {
  Product p = {};
  p.M = args.x.rows;
  p.N = args.weight.rows;
  p.K = args.x.cols;
  p.x = args.x.data;
  p.x_row = args.x.row_stride;
  p.w = view(args.weight);
  p.packed = panels_of(args.packed_weight);
  p.bias = args.bias.data;
  p.out = args.y.data;
  p.out_row = args.y.row_stride;
  p.mask_x = true;
  p.s = static_cast<float *>(args.s.data);
  p.s_row = args.s.row_stride;
  p.seed = args.seed;
  p.adapter = args.adapter;
  set_terms(args.branches, args.num_branches, true, nullptr, nullptr, &p);
  if (p.N == 0)
    p.w.data = nullptr;  // S alone
  else if (p.w.data == nullptr)
    p.w.data = &args;  // K = 0: never read, but there is an output
  return p;
}

template <class T>
void lay_out_forward(const ForwardArgs *const *of, const Group &group, Arena *arena) {
  for (Part &part : group) {
    const ForwardArgs &args = **of++;
    Term *terms = arena->take<Term>(args.num_branches);
    Segment *segments = arena->take<Segment>(args.num_branches);
    set_terms(args.branches, args.num_branches, true, terms, segments, &part.p);
    set_rows(part.p, terms, arena);
  }
  lay_out<T>(group, arena);
}

/* One layer, or some that share x. */
template <class T>
deltaops_status forward_as(const ForwardArgs *layers, int64_t count) {
  Part parts[DELTAOPS_MAX_GROUP];
  const ForwardArgs *of[DELTAOPS_MAX_GROUP];
  Group group = {parts, 0, false};
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Product p = forward_product(layers[i]);
    if (p.M == 0 || (p.N == 0 && (p.s == nullptr || p.ranks == 0))) continue;
    work += p.M * (p.N + p.ranks) * (p.K + 1);
    of[group.count] = &layers[i];
    parts[group.count++] = {p, {}};
  }
  if (group.count == 0) return DELTAOPS_OK;

  int threads = useful_threads(layers[0].num_threads, work);
  for (;;) {
    plan<T>(group, threads);
    Arena size(nullptr);
    lay_out_forward<T>(of, group, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("delta_linear_forward", size.used());
    Arena arena(memory);
    lay_out_forward<T>(of, group, &arena);
    const int given = team(threads, [&](int self) {
      if (pack_adapters(group, self)) barrier();
      product<T>(group, self);
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

/* Thread `self`'s branches' da: whole sums, so that no team changes a bit. */
inline void branch_bias_grads(const BackwardArgs &args, const Product &p, const Layer &layer,
                              int self, int threads) {
  int64_t column = 0;
  for (int64_t i = 0; i < args.num_branches; column += rank_of(args.branches[i]), ++i) {
    if (i % threads != self || !wanted(args.grad_branch_bias, i)) continue;
    const deltaops_matrix &grad = args.grad_branch_bias[i];
    const int64_t rank = rank_of(args.branches[i]);
    const double scale = scale_of(args.branches[i]);
    const Rows *own = p.adapter ? &p.terms[i].rows : nullptr;
    const float *ds = layer.ds + (own ? 0 : column);
    if (grad.dtype == DELTAOPS_BF16)
      column_sums(ds, layer.columns, p.M, own, rank, scale, static_cast<Bf16 *>(grad.data));
    else
      column_sums(ds, layer.columns, p.M, own, rank, scale, static_cast<float *>(grad.data));
  }
}

/* What dB contracts with dy, of each row's own branch, from the first column on: the caller's S has
 * columns for all, and those of neighbouring rows far apart. */
inline void own_rows(const BackwardArgs &args, const Product &p, Range rows, float *up,
                     int64_t up_row) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int32_t own = p.adapter[m];
    if (own < 0) continue;
    const Term &term = p.terms[own];
    // a branch's step in Q is its first rank in S
    const float *s = static_cast<const float *>(args.s.data) + m * args.s.row_stride;
    if (term.h)
      activate_rows(term, {m, m + 1}, up, up_row);
    else
      memcpy(up + m * up_row, s + term.segment.step,
             static_cast<size_t>(term.segment.rank) * sizeof(float));
  }
}

/* The keep-bits of each row's own branch: all are kept where it has no dropout, or there is none.
 */
inline void keep_bits_of_rows(const Product &p, uint8_t *bits, Range rows) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    uint8_t *to = bits + m * p.bits_row;
    const int32_t own = p.adapter[m];
    if (own >= 0 && p.terms[own].threshold > 0)
      keep_bits(to, m, 0, ceil_div(p.N, 8), p.seed, p.terms[own].stream, p.terms[own].threshold);
    else
      memset(to, 0xFF, static_cast<size_t>(ceil_div(p.N, 8)));
  }
}

/* Thread `self`'s part of what the products need: S past an activation, and the keep-bits. */
inline void prepare(const BackwardArgs &args, const Product &p, const Layer &layer, int self,
                    int threads) {
  const Range rows = share(p.M, self, threads);
  if (layer.again && p.adapter)
    own_rows(args, p, rows, layer.up, layer.columns);
  else if (layer.again)
    for (int64_t t = 0; t < p.num_terms; ++t)
      if (p.terms[t].h)
        activate_rows(p.terms[t], rows, layer.up + p.terms[t].plain_column, layer.columns);
  if (!layer.need_ds) return;
  if (p.adapter) {
    if (layer.num_bits > 0) keep_bits_of_rows(p, layer.bits, rows);
    return;
  }
  for (int64_t t = p.num_plain; t < p.num_terms; ++t)
    for (int64_t m = rows.begin; m < rows.end; ++m)
      keep_bits(layer.bits + (t - p.num_plain) * layer.bits_each + m * p.bits_row, m, 0,
                ceil_div(p.N, 8), p.seed, p.terms[t].stream, p.terms[t].threshold);
}

/* f(matrix, its panels) for those of a cut that are among `panels`: first those of x, then each
 * dy's. Returns how many panels the cut has. */
template <class F>
int64_t each_input(const Backward &b, int64_t cut, Range panels, const F &f) {
  int64_t before = 0;
  for (int64_t i = -1; i < b.count; ++i) {
    if (i >= 0 && b.layers[i].cut != cut) continue;
    const OuterInput &in = i < 0 ? b.x[cut] : b.layers[i].dy;
    const Range mine = {most(panels.begin - before, 0), least(panels.end - before, in.panels())};
    if (mine.begin < mine.end) f(in, mine);
    before += in.panels();
  }
  return before;
}

inline int64_t panels_of(const Backward &b, int64_t cut) {
  return each_input(b, cut, {0, 0}, [](const OuterInput &, Range) {});
}

/* Thread `self`'s part of the outer products, segment by segment. */
template <class T>
void outer_products(const Backward &b, int self, int threads) {
  bool more = false;  // segments than one, of some cut
  for (int64_t c = 0; c < b.num_cuts; ++c) {
    const Segments &cut = b.cuts[c];
    const int64_t panels = panels_of(b, c);
    const Range all = share(cut.count * panels, self, threads);
    for (int64_t at = all.begin; at < all.end;) {
      const int64_t segment = at / panels, first = at % panels;
      const Range mine = {first, least(panels, first + all.end - at)};
      each_input(b, c, mine, [&](const OuterInput &in, Range some) {
        outer_sums<T>(in, cut, segment, some, b.panel + self * kOuterPanel);
        if (cut.count == 1) outer_finish(in, cut, some);
      });
      at += mine.end - mine.begin;
    }
    more = more || (cut.count > 1 && panels > 0);
  }
  if (!more) return;
  barrier();
  for (int64_t c = 0; c < b.num_cuts; ++c)
    if (b.cuts[c].count > 1)
      each_input(b, c, share(panels_of(b, c), self, threads),
                 [&](const OuterInput &in, Range some) { outer_finish(in, b.cuts[c], some); });
}

template <class T>
void backward_thread(Backward &b, int self, int threads) {
  bool again = false;
  for (int64_t i = 0; i < b.count; ++i) {
    prepare(*b.of[i], b.parts[i].p, b.layers[i], self, threads);
    again = again || b.layers[i].again;
  }
  if (b.num_products > 0) {
    pack_adapters(b.products(), self);
    barrier();
    product<T>(b.products(), self);
  }
  if (b.num_products > 0 || again) barrier();
  outer_products<T>(b, self, threads);
  for (int64_t i = 0; i < b.count; ++i)
    if (b.layers[i].any_bias) branch_bias_grads(*b.of[i], b.parts[i].p, b.layers[i], self, threads);
}

/* One layer, or some that share x, whose gradient is the first one's grad_x. */
template <class T>
deltaops_status backward_as(const BackwardArgs *layers, int64_t count) {
  Backward b;
  b.count = b.num_products = b.num_cuts = 0;
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Product p = backward_product(layers[i], layers[0].grad_x);
    if (add_layer(layers[i], p, &b))
      work += (p.w.data ? p.M * p.N * (p.K + 1) : 0) + p.M * (p.N + p.K) * (p.ranks + 1);
  }
  if (b.count == 0) return DELTAOPS_OK;
  if (layers[0].grad_x.data)
    for (int64_t i = 0; i < b.num_products; ++i) {
      b.parts[i].p.adds = i > 0;
      b.parts[i].p.more = i + 1 < b.num_products;
    }

  int threads = useful_threads(layers[0].num_threads, work);
  for (;;) {
    if (b.num_products > 0) plan<T>(b.products(), threads);
    Arena size(nullptr);
    lay_out_backward<T>(threads, &b, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("delta_linear_backward", size.used());
    Arena arena(memory);
    lay_out_backward<T>(threads, &b, &arena);
    set_outers(&b);
    const int given = team(threads, [&](int self) { backward_thread<T>(b, self, threads); });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status forward(const ForwardArgs *layers, int64_t count) {
  const auto some = [&](const ForwardArgs *from, int64_t of) {
    return from->x.dtype == DELTAOPS_BF16 ? forward_as<Bf16>(from, of)
                                          : forward_as<float>(from, of);
  };
  bool alike = true;
  for (int64_t i = 1; i < count; ++i)
    alike = alike && by_dots(forward_product(layers[i])) == by_dots(forward_product(layers[0]));
  if (alike) return some(layers, count);
  deltaops_status status = DELTAOPS_OK;
  for (int64_t i = 0; i < count && status == DELTAOPS_OK; ++i) status = some(layers + i, 1);
  return status;
}

deltaops_status backward(const BackwardArgs *layers, int64_t count) {
  return layers[0].grad_y.dtype == DELTAOPS_BF16 ? backward_as<Bf16>(layers, count)
                                                 : backward_as<float>(layers, count);
}

template <class T>
void pack_weight_as(const deltaops_matrix &weight, void *packed, int threads) {
  using Unit = typename MainUnit<T>::type;
  constexpr int64_t kUnit = UnitOf<Unit>::k;
  const PackedHeader header = {kPackedMagic, weight.rows,  weight.cols, weight.dtype,
                               kUnit,        kTileColumns, {}};
  memcpy(packed, &header, sizeof header);
  Unit *panels = reinterpret_cast<Unit *>(static_cast<char *>(packed) + sizeof header);
  const View<T> w = typed<T>(view(weight));
  if (weight.cols == 0) return;  // no panels, however many rows
  const int64_t count = ceil_div(weight.rows, kTileColumns), steps = ceil_div(weight.cols, kUnit);
  const auto pack = [&](int self, int of) {
    const Range range = share(count, self, of);
    for (int64_t i = range.begin; i < range.end; ++i)
      pack_panel(panels + i * steps * kTileColumns, kTileColumns, w.at(i * kTileColumns, 0),
                 least(kTileColumns, weight.rows - i * kTileColumns), weight.cols, steps);
  };
  const int wanted = useful_threads(threads, weight.rows * weight.cols);
  const int given = team(wanted, [&](int self) { pack(self, wanted); });
  if (given != wanted)
    for (int self = 0; self < wanted; ++self) pack(self, wanted);
}

void pack_weight(const deltaops_matrix &weight, void *packed, int threads) {
  if (weight.dtype == DELTAOPS_BF16)
    pack_weight_as<Bf16>(weight, packed, threads);
  else
    pack_weight_as<float>(weight, packed, threads);
}

int64_t peak(int32_t dtype, int64_t steps, int threads) {
  return dtype == DELTAOPS_BF16 ? fma_peak<MainUnit<Bf16>::type>(steps, threads)
                                : fma_peak<MainUnit<float>::type>(steps, threads);
}

void dropout_mask(uint8_t *to, int64_t M, int64_t K, uint64_t seed, uint32_t stream,
                  uint32_t threshold) {
  constexpr int64_t kBytes = 64;
  uint8_t bits[kBytes];
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; k += 8 * kBytes) {
      const int64_t count = least(8 * kBytes, K - k);
      keep_bits(bits, m, k / 8, ceil_div(count, 8), seed, stream, threshold);
      for (int64_t i = 0; i < count; ++i) to[m * K + k + i] = (bits[i / 8] >> (i % 8)) & 1;
    }
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
