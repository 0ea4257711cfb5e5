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
 */
#ifndef DELTAOPS_CPU_DELTA_LINEAR_H
#define DELTAOPS_CPU_DELTA_LINEAR_H

#include "core.h"
#include "outer.h"
#include "peak.h"
#include "product.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

DELTAOPS_INLINE View<void> view(const deltaops_matrix &m) {
  // With one row or one column a stride means nothing: say which one is the unit stride.
  if (m.cols <= 1 || m.col_stride == 1) return {m.data, m.row_stride, 1};
  return {m.data, 1, m.col_stride};
}

DELTAOPS_INLINE View<void> transposed(const View<void> &v) {
  return {v.data, v.col_stride, v.row_stride};
}

inline const void *panels_of(const void *packed) {
  return packed ? static_cast<const char *>(packed) + sizeof(PackedHeader) : nullptr;
}

/* As many threads as have a few microseconds of work each. */
inline int useful_threads(int wanted, int64_t multiply_adds) {
  constexpr int64_t kLeast = 1 << 16;
  return static_cast<int>(least(wanted, 1 + multiply_adds / kLeast));
}

/* scale_i: what dropout multiplies the kept elements by; 1 where none are kept. */
inline double scale_of(const deltaops_branch &branch) {
  const uint32_t kept = 65536u - branch.drop_threshold;
  return kept ? 65536.0 / kept : 1.0;
}

inline int64_t rank_of(const deltaops_branch &branch) { return branch.a.rows; }

/* Fills terms and segments (arrays of num_branches) and the sizes of p; with NULL arrays, only the
 * sizes. Branches without dropout come first, so that they lie side by side. */
inline void set_terms(const deltaops_branch *branches, int64_t count, bool forward, Term *terms,
                      Segment *segments, Product *p) {
  p->terms = terms;
  p->segments = segments;
  p->num_terms = count;
  p->num_plain = p->s_columns = p->plain_columns = p->ranks = 0;
  int64_t at = 0;
  for (int dropout = 0; dropout < 2; ++dropout) {
    int64_t plain_column = 0;
    for (int64_t i = 0; i < count; plain_column += rank_of(branches[i]), ++i) {
      const deltaops_branch &branch = branches[i];
      if ((branch.drop_threshold > 0) != (dropout == 1)) continue;
      const Segment segment = {p->s_columns, p->ranks, rank_of(branch)};
      if (terms) {
        const View<void> a = view(branch.a), b = view(branch.b);
        Term &term = terms[at];
        term.p = forward ? a : transposed(b);
        term.q = forward ? b : transposed(a);
        term.bf16 = branch.a.dtype == DELTAOPS_BF16;
        // Backward the bits say it, for dX and dA; what the bias gets is alive.
        term.dead = forward && branch.drop_threshold == 65536u;
        term.scaling = branch.scaling;
        term.activation = branch.activation;
        const bool scaled = !forward || branch.activation == DELTAOPS_IDENTITY;
        term.factor = static_cast<float>((scaled ? branch.scaling : 1.0) * scale_of(branch));
        term.bias = forward ? branch.bias.data : nullptr;
        term.h = nullptr;
        term.h_row = 0;
        term.threshold = branch.drop_threshold;
        term.stream = branch.stream;
        term.segment = segment;
        term.plain_column = plain_column;
        term.bits = nullptr;
        segments[at] = segment;
      }
      ++at;
      p->ranks += segment.rank;
      p->s_columns += round_up(segment.rank, kLanes);
      if (dropout == 0) p->num_plain = at, p->plain_columns = p->s_columns;
    }
  }
}

inline deltaops_status no_memory(const char *op, size_t bytes) {
  return fail(DELTAOPS_OUT_OF_MEMORY,
              "%s: the scratch memory must be allocated before the op starts, and %zu bytes were "
              "refused. Free some memory, use fewer threads or smaller batches.",
              op, bytes);
}

template <class T>
deltaops_status forward_as(const ForwardArgs &args) {
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
  const int64_t branches = args.num_branches;
  set_terms(args.branches, branches, true, nullptr, nullptr, &p);
  if (p.M == 0 || (p.N == 0 && (p.s == nullptr || p.ranks == 0))) return DELTAOPS_OK;
  if (p.N == 0)
    p.w.data = nullptr;  // S alone
  else if (p.w.data == nullptr)
    p.w.data = &p;  // K = 0: never read, but there is an output

  int threads = useful_threads(args.num_threads, p.M * (p.N + p.ranks) * (p.K + 1));
  for (;;) {
    Cut cut = plan<T>(p, threads);
    Arena size(nullptr);
    size.take<Term>(branches);
    size.take<Segment>(branches);
    lay_out<T>(p, &cut, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("delta_linear_forward", size.used());
    Arena arena(memory);
    Term *terms = arena.take<Term>(branches);
    Segment *segments = arena.take<Segment>(branches);
    lay_out<T>(p, &cut, &arena);
    set_terms(args.branches, branches, true, terms, segments, &p);
    const int given = team(threads, [&](int self) {
      if (p.num_terms > 0) {
        pack_p(p, cut, self);
        barrier();
      }
      run_product<T>(p, cut, self);
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

/* What the backward pass shares between its phases. */
struct Backward {
  Product p;
  Cut cut;
  bool need_ds;
  float *ds;  // [M, ranks], branches side by side
  uint8_t *bits;
  int64_t bits_each;
  Outer *a_outers, *b_outers;
  int64_t num_a, num_b;
  int64_t a_panels, b_panels;
  bool any_bias;
  bool again;  // some dB is wanted past an activation
  float *up;   // [M, ranks]: S made again, in the columns of branches with an activation
  float *outer;
  int64_t outer_each;
};

inline bool wanted(const deltaops_matrix *grads, int64_t i) {
  return grads != nullptr && grads[i].data != nullptr && grads[i].rows > 0 && grads[i].cols > 0;
}

template <class T>
void lay_out_backward(const BackwardArgs &args, Backward *b, Arena *arena) {
  const int64_t branches = args.num_branches;
  Term *terms = arena->take<Term>(branches);
  Segment *segments = arena->take<Segment>(branches);
  b->a_outers = arena->take<Outer>(branches);
  b->b_outers = arena->take<Outer>(branches);
  const int64_t masked = b->need_ds ? b->p.num_terms - b->p.num_plain : 0;
  b->bits_each = b->p.M * b->p.bits_row;
  b->bits = arena->take<uint8_t>(masked * b->bits_each);
  b->ds = arena->take<float>(b->need_ds ? b->p.M * b->p.ranks : 0);
  b->up = arena->take<float>(b->again ? b->p.M * b->p.ranks : 0);
  b->outer_each = (kOuterRows + kOuterPanels * b->p.ranks) * kTileColumns + 64;
  b->outer = arena->take<float>(args.num_threads * b->outer_each);
  if (b->need_ds) lay_out<T>(b->p, &b->cut, arena);
  set_terms(args.branches, branches, false, terms, segments, &b->p);
  if (terms == nullptr) return;
  for (int64_t t = b->p.num_plain; t < b->p.num_terms; ++t)
    terms[t].bits = b->bits + (t - b->p.num_plain) * b->bits_each;
  for (int64_t t = 0; t < b->p.num_terms; ++t)
    if (terms[t].activation != DELTAOPS_IDENTITY && args.s.data) {
      terms[t].h = static_cast<const float *>(args.s.data) + terms[t].plain_column;
      terms[t].h_row = args.s.row_stride;
    }
}

/* The outer products that are wanted, once the buffers have their places. */
inline void set_outers(const BackwardArgs &args, Backward *b) {
  b->num_a = b->num_b = 0;
  int64_t column = 0;
  for (int64_t i = 0; i < args.num_branches; column += rank_of(args.branches[i]), ++i) {
    const int64_t rank = rank_of(args.branches[i]);
    if (wanted(args.grad_a, i)) {
      const uint8_t *bits = nullptr;
      for (int64_t t = 0; t < b->p.num_terms; ++t)
        if (b->p.terms[t].plain_column == column) bits = b->p.terms[t].bits;
      b->a_outers[b->num_a++] = {b->ds + column,
                                 b->p.ranks,
                                 rank,
                                 args.grad_a[i].data,
                                 args.grad_a[i].dtype == DELTAOPS_BF16,
                                 false,
                                 b->p.N,
                                 bits,
                                 b->p.bits_row};
    }
    const bool kept = args.branches[i].activation == DELTAOPS_IDENTITY;
    if (wanted(args.grad_b, i))
      b->b_outers[b->num_b++] = {(kept ? static_cast<const float *>(args.s.data) : b->up) + column,
                                 kept ? args.s.row_stride : b->p.ranks,
                                 rank,
                                 args.grad_b[i].data,
                                 args.grad_b[i].dtype == DELTAOPS_BF16,
                                 true,
                                 b->p.K,
                                 nullptr,
                                 0};
  }
}

/* Thread `self`'s branches' da: whole sums, so that no team changes a bit. */
inline void branch_bias_grads(const BackwardArgs &args, const Backward &b, int self, int threads) {
  int64_t column = 0;
  for (int64_t i = 0; i < args.num_branches; column += rank_of(args.branches[i]), ++i) {
    if (i % threads != self || !wanted(args.grad_branch_bias, i)) continue;
    const deltaops_matrix &grad = args.grad_branch_bias[i];
    const int64_t rank = rank_of(args.branches[i]);
    const double scale = scale_of(args.branches[i]);
    if (grad.dtype == DELTAOPS_BF16)
      column_sums(b.ds + column, b.p.ranks, b.p.M, rank, scale, static_cast<Bf16 *>(grad.data));
    else
      column_sums(b.ds + column, b.p.ranks, b.p.M, rank, scale, static_cast<float *>(grad.data));
  }
}

template <class T>
void backward_thread(const BackwardArgs &args, const Backward &b, int self, int threads) {
  const Product &p = b.p;
  const Range rows = share(p.M, self, threads);
  if (b.again)
    for (int64_t t = 0; t < p.num_terms; ++t)
      if (p.terms[t].h) activate_rows(p.terms[t], rows, b.up + p.terms[t].plain_column, p.ranks);
  if (b.need_ds) {
    for (int64_t t = p.num_plain; t < p.num_terms; ++t)
      for (int64_t m = rows.begin; m < rows.end; ++m)
        keep_bits(b.bits + (t - p.num_plain) * b.bits_each + m * p.bits_row, m, 0, ceil_div(p.N, 8),
                  p.seed, p.terms[t].stream, p.terms[t].threshold);
    pack_p(p, b.cut, self);
    barrier();
    run_product<T>(p, b.cut, self);
  }
  if (b.need_ds || b.again) barrier();
  float *scratch = b.outer + self * b.outer_each;
  const Range panels = share(b.a_panels + b.b_panels, self, threads);
  const int64_t a_panels = b.a_panels;
  outer_products(static_cast<const T *>(args.x.data), args.x.row_stride, p.M, p.N,
                 {panels.begin, least(panels.end, a_panels)}, b.a_outers, b.num_a, nullptr, false,
                 scratch);
  outer_products(static_cast<const T *>(args.grad_y.data), args.grad_y.row_stride, p.M, p.K,
                 {panels.begin < a_panels ? 0 : panels.begin - a_panels, panels.end - a_panels},
                 b.b_outers, b.num_b, args.grad_bias.data, args.grad_bias.dtype == DELTAOPS_BF16,
                 scratch);
  if (b.any_bias) branch_bias_grads(args, b, self, threads);
}

template <class T>
deltaops_status backward_as(const BackwardArgs &args) {
  Backward b = {};
  const int64_t branches = args.num_branches;
  bool any_a = false, any_b = false;
  for (int64_t i = 0; i < branches; ++i) {
    any_a = any_a || wanted(args.grad_a, i);
    any_b = any_b || wanted(args.grad_b, i);
    b.any_bias = b.any_bias || wanted(args.grad_branch_bias, i);
    b.again = b.again || (wanted(args.grad_b, i) && args.grad_y.rows > 0 &&
                          args.branches[i].activation != DELTAOPS_IDENTITY);
  }
  Product &p = b.p;  // dX [M, K of the op] = dy [M, N of the op] W: N and K change places
  p.M = args.grad_y.rows;
  p.K = args.grad_y.cols;
  p.N = args.grad_x.data ? args.grad_x.cols : any_a ? args.x.cols : 0;
  p.x = args.grad_y.data;
  p.x_row = args.grad_y.row_stride;
  const bool need_dx = args.grad_x.data != nullptr && p.M > 0 && p.N > 0;
  if (need_dx) {
    p.w = transposed(view(args.weight));
    if (p.w.data == nullptr) p.w.data = &b;  // N = 0 of the op: never read, dX is zero
    p.packed = panels_of(args.packed_weight);
  }
  p.out = args.grad_x.data;
  p.out_row = args.grad_x.row_stride;
  p.mask_x = false;
  p.seed = args.seed;
  p.bits_row = round_up(ceil_div(p.N, 8), 8) + 8;
  set_terms(args.branches, branches, false, nullptr, nullptr, &p);
  b.need_ds = p.M > 0 && (need_dx || any_a || b.any_bias);
  b.a_panels = any_a ? ceil_div(p.N, kTileColumns) : 0;
  b.b_panels = any_b || args.grad_bias.data ? ceil_div(p.K, kTileColumns) : 0;
  if (!b.need_ds && !b.any_bias && b.a_panels + b.b_panels == 0) return DELTAOPS_OK;

  const int64_t work = (need_dx ? p.M * p.N * (p.K + 1) : 0) + p.M * (p.N + p.K) * (p.ranks + 1);
  int threads = useful_threads(args.num_threads, work);
  for (;;) {
    if (b.need_ds) b.cut = plan<T>(p, threads);
    Arena size(nullptr);
    lay_out_backward<T>(args, &b, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("delta_linear_backward", size.used());
    Arena arena(memory);
    lay_out_backward<T>(args, &b, &arena);
    if (b.need_ds) {
      p.s = b.ds;
      p.s_row = p.ranks;
    }
    set_outers(args, &b);
    const int given = team(threads, [&](int self) { backward_thread<T>(args, b, self, threads); });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status forward(const ForwardArgs &args) {
  return args.x.dtype == DELTAOPS_BF16 ? forward_as<Bf16>(args) : forward_as<float>(args);
}

deltaops_status backward(const BackwardArgs &args) {
  return args.grad_y.dtype == DELTAOPS_BF16 ? backward_as<Bf16>(args) : backward_as<float>(args);
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
