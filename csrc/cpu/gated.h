/* gated.h: the product in the middle of a gated MLP, element by element.
 *
 *     y = act(g) u,    dg = dy u act'(g),    du = dy act(g)
 *
 * Without u, NULL then, it is the activation alone: y = act(g), dg = dy act'(g).
 *
 * Bound by memory: forward reads g and u and writes y once, backward reads dy, g and u and writes
 * dg and du once, with one exponential for the value and the slope together. A row belongs to one
 * thread, so the bits are the same for any team.
 */
#ifndef DELTAOPS_CPU_GATED_H
#define DELTAOPS_CPU_GATED_H

#include "activation.h"
#include "delta_linear.h"
#include "norm.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* act(h) and act'(h). Where activation.h has the limit at an infinity, this has torch's NaN of
 * infinity * 0. So the argument is clamped only for the gate that has h^2 in its slope. */
template <int kind>
DELTAOPS_INLINE VecF activate_and_slope(VecF h, VecF *slope) {
  if constexpr (kind == DELTAOPS_IDENTITY || kind == DELTAOPS_RELU) {
    *slope = activate_slope<kind>(h);
    return activate<kind>(h);
  } else {
    VecF bend;
    const VecF near = kind == DELTAOPS_GELU_TANH ? clamp(h, -kFar, kFar) : h;
    const VecF factor = gate<kind>(near, &bend);
    *slope = factor + h * bend;
    return h * factor;
  }
}

template <class T>
DELTAOPS_INLINE T *row_of(const deltaops_matrix &matrix, int64_t m) {
  return static_cast<T *>(matrix.data) + m * matrix.row_stride;
}

/* body(m) for each of M rows; `each` multiply-adds, about, for an element. */
template <class Body>
inline void each_row_of(int64_t M, int64_t K, int wanted, int64_t each, const Body &body) {
  if (M == 0) return;
  int threads = useful_threads(static_cast<int>(least(wanted, M)), each * M * K);
  for (;;) {
    const int given = team(threads, [&](int self) {
      const Range rows = share(M, self, threads);
      for (int64_t m = rows.begin; m < rows.end; ++m) body(m);
    });
    if (given == threads) return;
    threads = given;
  }
}

/* Rows of K floats. */
template <int kind>
DELTAOPS_INLINE void gated_row(const float *g, const float *u, int64_t K, float *y) {
  each_vector(K, [&](int64_t k, int64_t count) {
    VecF unused;  // costs nothing: the compiler drops it
    const VecF value = activate_and_slope<kind>(load_lanes(g + k, count), &unused);
    store_lanes(y + k, u ? value * load_lanes(u + k, count) : value, count);
  });
}

/* dg and du may be NULL where they are not wanted; u is read for dg only. */
template <int kind>
DELTAOPS_INLINE void gated_row_backward(const float *dy, const float *g, const float *u, int64_t K,
                                        float *dg, float *du) {
  each_vector(K, [&](int64_t k, int64_t count) {
    VecF slope;
    const VecF value = activate_and_slope<kind>(load_lanes(g + k, count), &slope);
    const VecF d = load_lanes(dy + k, count);
    if (dg) store_lanes(dg + k, (u ? d * load_lanes(u + k, count) : d) * slope, count);
    if (du) store_lanes(du + k, d * value, count);
  });
}

/* bf16 in pieces, widened and narrowed in loops of their own: with the conversions at both ends of
 * the exponential's chain, a CPU's scheduler holds too few elements at once to overlap them. */
constexpr int64_t kPiece = 256;

DELTAOPS_INLINE void widen_piece(const Bf16 *p, int64_t count, float *to) {
  each_vector(count, [&](int64_t k, int64_t lanes) { store(to + k, load_lanes(p + k, lanes)); });
}

DELTAOPS_INLINE void narrow_piece(const float *p, int64_t count, Bf16 *to) {
  each_vector(count, [&](int64_t k, int64_t lanes) { store_lanes(to + k, load(p + k), lanes); });
}

template <int kind>
DELTAOPS_INLINE void gated_row(const Bf16 *g, const Bf16 *u, int64_t K, Bf16 *y) {
  float a[kPiece], b[kPiece];
  for (int64_t k = 0; k < K; k += kPiece) {
    const int64_t count = least(kPiece, K - k);
    widen_piece(g + k, count, a);
    if (u) widen_piece(u + k, count, b);
    gated_row<kind>(a, u ? b : nullptr, round_up(count, kLanes), a);
    narrow_piece(a, count, y + k);
  }
}

template <int kind>
DELTAOPS_INLINE void gated_row_backward(const Bf16 *dy, const Bf16 *g, const Bf16 *u, int64_t K,
                                        Bf16 *dg, Bf16 *du) {
  float a[kPiece], b[kPiece], c[kPiece];
  for (int64_t k = 0; k < K; k += kPiece) {
    const int64_t count = least(kPiece, K - k);
    widen_piece(dy + k, count, a);
    widen_piece(g + k, count, b);
    if (dg && u) widen_piece(u + k, count, c);
    gated_row_backward<kind>(a, b, u ? c : nullptr, round_up(count, kLanes), dg ? c : nullptr,
                             du ? a : nullptr);
    if (dg) narrow_piece(c, count, dg + k);
    if (du) narrow_piece(a, count, du + k);
  }
}

template <class T>
void gated_forward_as(const GatedForwardArgs &args) {
  const int64_t M = args.gate.rows, K = args.gate.cols;
  with_activation(args.activation, [&](auto kind) {
    each_row_of(M, K, args.num_threads, 8, [&](int64_t m) {
      const T *up = args.up.data ? row_of<const T>(args.up, m) : nullptr;
      gated_row<decltype(kind)::value>(row_of<const T>(args.gate, m), up, K, row_of<T>(args.y, m));
    });
  });
}

template <class T>
void gated_backward_as(const GatedBackwardArgs &args) {
  const int64_t M = args.gate.rows, K = args.gate.cols;
  with_activation(args.activation, [&](auto kind) {
    each_row_of(M, K, args.num_threads, 16, [&](int64_t m) {
      const bool want_gate = args.grad_gate.data, want_up = args.grad_up.data;
      gated_row_backward<decltype(kind)::value>(
          row_of<const T>(args.grad_y, m), row_of<const T>(args.gate, m),
          want_gate && args.up.data ? row_of<const T>(args.up, m) : nullptr, K,
          want_gate ? row_of<T>(args.grad_gate, m) : nullptr,
          want_up ? row_of<T>(args.grad_up, m) : nullptr);
    });
  });
}

deltaops_status gated_forward(const GatedForwardArgs &args) {
  args.gate.dtype == DELTAOPS_BF16 ? gated_forward_as<Bf16>(args) : gated_forward_as<float>(args);
  return DELTAOPS_OK;
}

deltaops_status gated_backward(const GatedBackwardArgs &args) {
  if (!args.grad_gate.data && !args.grad_up.data) return DELTAOPS_OK;
  args.gate.dtype == DELTAOPS_BF16 ? gated_backward_as<Bf16>(args) : gated_backward_as<float>(args);
  return DELTAOPS_OK;
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
