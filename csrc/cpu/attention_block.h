/* attention_block.h: what both directions do with a block of kQueries queries and kKeys keys.
 *
 * The products run on the micro-kernel of tile.h with operands that stay in L2: keys (and values,
 * backward) transposed into panels for the products that make a score, everything else as rows of
 * floats whose stride is an odd number of cache lines, so that a column of them spreads over all
 * sets. P never leaves a block. What causality hides is left out tile by tile: nearly half of the
 * work. A strip of queries, as many as a tile has rows, makes its scores, softmax and sums in one
 * go, which all stay in L1.
 *
 * The keys of a prefix come before those of the sequence: keys 0 ... P - 1 of an axis of P + Lk,
 * joined while they are packed, so that one softmax runs over both. No mask and no causality
 * reaches them. Without a prefix P is 0.
 */
#ifndef DELTAOPS_CPU_ATTENTION_BLOCK_H
#define DELTAOPS_CPU_ATTENTION_BLOCK_H

#include "attention_operands.h"
#include "cross_entropy.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

constexpr int64_t kQueries = 132;          // of a block, at most: their rows stay in L2
constexpr int64_t kKeys = 128;             // of a block
constexpr int64_t kScoreRow = kKeys + 16;  // odd in lines; a strip of keys may hang over the edge
static_assert(kQueries % kTileRows == 0 && kKeys % kTileColumns == 0 && kKeys <= kChain, "");
static_assert(kTileRows <= kScoreRow - kKeys, "");

/* c = factor a b for kTileRows rows of neighbours a and the first NV vectors of a panel b. */
template <int NV, class T>
__attribute__((noinline)) void score_tile(const float *a, ptrdiff_t a_row, const float *b,
                                          int64_t steps, float factor, float *c,
                                          TokensAhead<T> *ahead) {
  VecF acc[kTileRows][NV] = {};
  accumulate_chains<kTileRows, NV, true>(acc, a, a_row, b, steps, ahead, kTileColumns);
  DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < NV; ++j) store(c + i * kScoreRow + j * kLanes, acc[i][j] * splat(factor));
}

/* c = a b, or c += a b, over at most kChain steps. */
template <bool add, class T>
__attribute__((noinline)) void sum_tile(const float *a, ptrdiff_t a_row, ptrdiff_t a_step,
                                        const float *b, int64_t steps, ptrdiff_t row, float *c,
                                        TokensAhead<T> *ahead) {
  VecF acc[kTileRows][kTileVectors] = {};
  accumulate<kTileRows, kTileVectors, true>(acc, a, a_row, a_step, b, steps, row, ahead);
  DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) DELTAOPS_UNROLL
  for (int j = 0; j < kTileVectors; ++j) {
    float *to = c + i * row + j * kLanes;
    store(to, add ? load(to) + acc[i][j] : acc[i][j]);
  }
}

/* Which of a block's keys its queries see. Rows and keys count from the block's first ones. */
struct Block {
  int64_t r0, rows, k0, keys;
  bool causal;
  int64_t P;  // keys of the axis that all see

  /* Query `i` sees keys 0 ... visible(i) - 1, a mask aside. */
  int64_t visible(int64_t i) const {
    const int64_t seen = causal ? P + r0 + i + 1 - k0 : keys;
    return seen < 0 ? 0 : least(seen, keys);
  }
  /* The first query that sees key n. */
  int64_t first(int64_t n) const {
    const int64_t before = k0 + n - P - r0;
    return causal && before > 0 ? least(before, rows) : 0;
  }
};

/* c [kTileRows][kScoreRow] = factor a b^T in the vectors that some query of the strip from i on
 * sees; a its rows. */
template <class T>
void score_strip(const Shape &s, const Block &block, int64_t i, const float *a, const float *panels,
                 float factor, float *c, TokensAhead<T> *ahead) {
  const int64_t seen = block.visible(i + kTileRows - 1);
  for (int64_t n = 0; n < seen; n += kTileColumns, panels += s.panel)
    with_rows<kTileVectors>(least(ceil_div(seen - n, kLanes), kTileVectors), [&](auto vectors) {
      score_tile<decltype(vectors)::value>(a, s.row, panels, s.D, factor, c + n, ahead);
    });
}

/* c [kTileRows][row] += a b, a the strip's scores and b the keys' rows, over the keys that it sees.
 */
template <bool add, class T>
void query_strip(const Shape &s, const Block &block, int64_t i, const float *a, const float *b,
                 float *c, TokensAhead<T> *ahead) {
  const int64_t steps = block.visible(i + kTileRows - 1);
  for (int64_t d = 0; d < s.columns; d += kTileColumns)
    sum_tile<add>(a, kScoreRow, 1, b + d, steps, s.row, c + d, ahead);
}

/* c [keys][row] = or += a^T b, b the queries' rows, over the queries that see a strip of keys. */
template <bool add, class T>
void key_block(const Shape &s, const Block &block, const float *a, const float *b, float *c,
               TokensAhead<T> *ahead) {
  for (int64_t d = 0; d < s.columns; d += kTileColumns)
    for (int64_t n = 0; n < block.keys; n += kTileRows) {
      const int64_t i = block.first(n);
      if (!add || i < block.rows)
        sum_tile<add>(a + i * kScoreRow + n, 1, kScoreRow, b + i * s.row + d, block.rows - i, s.row,
                      c + n * s.row + d, ahead);
    }
}

/* A query's row of a mask, from the first key on that a block has of the sequence; bytes NULL: it
 * sees all. */
struct MaskRow {
  const uint8_t *bytes;
  bool broadcast;  // one byte for all keys
};

template <class Args>
DELTAOPS_INLINE MaskRow mask_row(const Args &args, const Shape &s, int64_t b, int64_t h, int64_t i,
                                 int64_t k0) {
  if (args.mask == nullptr || s.Lk == 0) return {nullptr, false};
  const int64_t *at = args.mask_strides;
  return {args.mask + b * at[0] + h * at[1] + i * at[2] + most(k0 - s.P, 0) * at[3], at[3] == 0};
}

/* Adds the bias to the scores of query i with keys k0 ... k0 + visible - 1, and anything to the
 * rest of a vector: those are hidden next. */
template <class Args>
DELTAOPS_INLINE void add_bias(const Args &args, int64_t b, int64_t h, int64_t i, int64_t k0,
                              int64_t visible, float *score) {
  const int64_t first = most(args.bias_from - k0, 0);
  if (args.bias == nullptr || visible <= first) return;
  const int64_t *at = args.bias_strides;
  const float *row = args.bias + b * at[0] + h * at[1] + i * at[2];
  row += most(k0 - args.bias_from, 0) * at[3];
  const bool broadcast = at[3] == 0;
  const VecF same = splat(*row);
  score += first;
  each_vector(visible - first, [&](int64_t n, int64_t lanes) {
    store(score + n, load(score + n) + (broadcast ? same : load_lanes(row + n, lanes)));
  });
}

/* Hides scores of a row, by -infinity: where the mask has 0, and from `visible` to `width`. Scores
 * of a prefix lie before them, and `visible` is negative where those are to be hidden too. */
DELTAOPS_INLINE void hide(float *score, int64_t visible, int64_t width, MaskRow mask) {
  if (mask.bytes && mask.broadcast) {
    if (*mask.bytes == 0) visible = 0;
    mask.bytes = nullptr;
  }
  for (int64_t n = visible; n < width; ++n) score[n] = -kInfinity;
  if (mask.bytes == nullptr) return;
  typedef uint8_t VecB __attribute__((vector_size(kLanes)));
  each_vector(visible, [&](int64_t n, int64_t lanes) {
    VecB bytes = {};
    memcpy(&bytes, mask.bytes + n, static_cast<size_t>(lanes));
    // Two steps, which are an instruction each; of one GCC makes a move for each byte.
    const VecU wide = __builtin_convertvector(__builtin_convertvector(bytes, VecH), VecU);
    const VecF value = load(score + n);
    store(score + n, wide != 0u ? value : splat(-kInfinity));
  });
}

/* f over kTileRows rows of vectors, as a vector of one number for each row: the lanes of each
 * row's vector are folded side by side, once transposed. */
template <class F>
DELTAOPS_INLINE VecF fold(const VecF (&rows)[kTileRows], const F &f) {
  static_assert(kTileRows <= kLanes, "");
  VecF r[kLanes];
  DELTAOPS_UNROLL
  for (int i = 0; i < kLanes; ++i) r[i] = rows[i < kTileRows ? i : 0];
  transpose(r);
  DELTAOPS_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) DELTAOPS_UNROLL
  for (int i = 0; i < half; ++i) r[i] = f(r[i], r[i + half]);
  return r[0];
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
