/* delta_linear_terms.h: what both directions make of the caller's weight and branches.
 *
 * Matrices become views, branches the terms of a Product: their order, their columns in S and their
 * steps in Q, and with adapters by row the rows of each.
 */
#ifndef DELTAOPS_CPU_DELTA_LINEAR_TERMS_H
#define DELTAOPS_CPU_DELTA_LINEAR_TERMS_H

#include "core.h"
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
 * sizes. Branches without dropout come first, so that they lie side by side; where each row has its
 * own, all stay in their order. */
inline void set_terms(const deltaops_branch *branches, int64_t count, bool forward, Term *terms,
                      Segment *segments, Product *p) {
  p->terms = terms;
  p->segments = segments;
  p->num_terms = count;
  p->num_plain = p->s_columns = p->p_columns = p->plain_columns = p->ranks = 0;
  int64_t at = 0;
  for (int dropout = 0; dropout < (p->adapter ? 1 : 2); ++dropout) {
    int64_t plain_column = 0;
    for (int64_t i = 0; i < count; plain_column += rank_of(branches[i]), ++i) {
      const deltaops_branch &branch = branches[i];
      if (!p->adapter && (branch.drop_threshold > 0) != (dropout == 1)) continue;
      const int64_t padded = round_up(rank_of(branch), kLanes);
      const Segment segment = {p->adapter ? 0 : p->s_columns, p->ranks, rank_of(branch)};
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
        term.p_column = p->p_columns;
        term.plain_column = plain_column;
        term.bits = nullptr;
        term.rows = {nullptr, 0};
        segments[at] = segment;
      }
      ++at;
      p->ranks += segment.rank;
      p->p_columns += padded;
      p->s_columns = p->adapter ? most(p->s_columns, padded) : p->p_columns;
      if (dropout == 0 && !p->adapter) p->num_plain = at, p->plain_columns = p->s_columns;
      if (p->adapter) p->num_plain += branch.drop_threshold == 0;
    }
  }
}

/* Gives each term its rows, where each row has its own branch. */
inline void set_rows(const Product &p, Term *terms, Arena *arena) {
  if (p.adapter == nullptr) return;
  int64_t *order = arena->take<int64_t>(p.M), *ends = arena->take<int64_t>(p.num_terms);
  if (terms == nullptr) return;
  sort_rows(p.adapter, p.M, p.num_terms, order, ends);
  for (int64_t t = 0, begin = 0; t < p.num_terms; begin = ends[t++])
    terms[t].rows = {order + begin, ends[t] - begin};
}

inline deltaops_status no_memory(const char *op, size_t bytes) {
  return fail(DELTAOPS_OUT_OF_MEMORY,
              "%s: the scratch memory must be allocated before the op starts, and %zu bytes were "
              "refused. Free some memory, use fewer threads or smaller batches.",
              op, bytes);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
