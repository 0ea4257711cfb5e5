/* rotary.h: rotary position embedding, each head of each token turned by its position.
 *
 *     y1 = x1 c1 - x2 s1,    y2 = x2 c2 + x1 s2        x1, x2: the halves of a head's D elements
 *     dx1 = dy1 c1 + dy2 s2, dx2 = dy2 c2 - dy1 s1     the same with the other sine, turned back
 *
 * Bound by memory: x is read and y written once, wherever their strides say; the token's row of the
 * tables stays in L1 for all of its heads. A token belongs to one thread, so the bits are the same
 * for any team.
 */
#ifndef DELTAOPS_CPU_ROTARY_H
#define DELTAOPS_CPU_ROTARY_H

#include "gated.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* One head: `half` elements and as many again behind them, of x, y and the tables alike. */
template <bool backward, class X, class Table, class Y>
DELTAOPS_INLINE void turn_head(const X *x, const Table *cos, const Table *sin, int64_t half, Y *y) {
  each_vector(half, [&](int64_t k, int64_t count) {
    const VecF x1 = load_lanes(x + k, count), x2 = load_lanes(x + half + k, count);
    const VecF c1 = load_lanes(cos + k, count), c2 = load_lanes(cos + half + k, count);
    const VecF s1 = load_lanes(sin + k, count), s2 = load_lanes(sin + half + k, count);
    store_lanes(y + k, backward ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1, count);
    store_lanes(y + half + k, backward ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2, count);
  });
}

template <bool backward, class T, class Table>
void rotary_as(const RotaryArgs &args) {
  const int64_t heads = args.sizes[1], tokens = args.sizes[2], half = args.sizes[3] / 2;
  const int64_t *from = args.x_strides, *to = args.y_strides;
  if (heads == 0) return;  // x and y may be NULL, from which no stride counts
  each_row_of(args.sizes[0] * tokens, heads * half, args.num_threads, 16, [&](int64_t row) {
    const int64_t b = row / tokens, l = row % tokens;
    const T *x = static_cast<const T *>(args.x) + b * from[0] + l * from[2];
    T *y = static_cast<T *>(args.y) + b * to[0] + l * to[2];
    const int64_t at = b * args.table_strides[0] + l * args.table_strides[1];
    const Table *cos = static_cast<const Table *>(args.cos) + at;
    const Table *sin = static_cast<const Table *>(args.sin) + at;
    for (int64_t h = 0; h < heads; ++h)
      turn_head<backward>(x + h * from[1], cos, sin, half, y + h * to[1]);
  });
}

template <class T, class Table>
void rotary_as(const RotaryArgs &args) {
  args.backward ? rotary_as<true, T, Table>(args) : rotary_as<false, T, Table>(args);
}

deltaops_status rotary(const RotaryArgs &args) {
  if (args.dtype == DELTAOPS_F32)
    rotary_as<float, float>(args);
  else if (args.table_dtype == DELTAOPS_F32)
    rotary_as<Bf16, float>(args);
  else
    rotary_as<Bf16, Bf16>(args);
  return DELTAOPS_OK;
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
