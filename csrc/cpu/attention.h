/* attention.h: the op, forward and backward (deltaops.h has its mathematics).
 *
 *     forward    S = scale Q K^T,  P = exp(S - max),  y = P V / sum P     over blocks of keys, with
 *                the maximum and the sum carried along (Milakov and Gimelshein 2018)
 *     backward   P = exp(S - lse),  dP = dY V^T,  dS = scale P (dP - rowsum(dY y))
 *                dQ = dS K,  dK = dS^T Q,  dV = P^T dY       (Dao et al. 2022, algorithm 4)
 *
 * Two products forward and five backward, each of kQueries queries and kKeys keys, run on the
 * micro-kernel of tile.h with operands that stay in L2: keys (and values, backward) transposed into
 * panels for the products that make a score, everything else as rows of floats whose stride is an
 * odd number of cache lines, so that a column of them spreads over all sets. P never leaves a
 * block. What causality hides is left out tile by tile: nearly half of the work.
 * A strip of queries, as many as a tile has rows, makes its scores, softmax and sums in one go,
 * which all stay in L1.
 *
 * The keys of a prefix come before those of the sequence: keys 0 ... P - 1 of an axis of P + Lk,
 * joined while they are packed, so that one softmax runs over both. No mask and no causality
 * reaches them. Without a prefix P is 0.
 *
 * Forward a block of queries belongs to one thread, backward a head of keys with all its heads of
 * queries. How they are cut and the order in a block depend on the sizes alone: the same bits for
 * any team. So too for the gradients of a prefix, sums over the batch: of a few runs of sequences
 * each, then of the runs.
 */
#ifndef DELTAOPS_CPU_ATTENTION_H
#define DELTAOPS_CPU_ATTENTION_H

#include "attention_prefix.h"
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

/* ------------------------------------------------------------------------------------- forward */

/* The softmax of a block's queries so far. */
struct Running {
  float maximum[kQueries + kLanes], sum[kQueries + kLanes];  // whole vectors from any strip's start
};

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

/* scores -> exp(score - maximum) for kTileRows queries, `width` of them whole vectors. Together,
 * since one row alone is a chain of latencies. Returns for each row what its sums so far must be
 * multiplied by, the new maximum being the larger one. */
inline VecF softmax_strip(float *score, int64_t width, float *maximum, float *sums) {
  VecF top[kTileRows], total[kTileRows] = {}, off[kTileRows];
  DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) top[i] = splat(-kInfinity);
  for (int64_t n = 0; n < width; n += kLanes) DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) top[i] = larger(load(score + i * kScoreRow + n), top[i]);
  const VecF before = load(maximum);
  const VecF after = larger(before, fold(top, [](VecF a, VecF b) { return larger(a, b); }));
  // Whatever is taken off scores of -infinity alone: they add nothing, as long as it is finite.
  const VecF finite = after == splat(-kInfinity) ? VecF{} : after;
  DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) off[i] = splat(finite[i]);
  for (int64_t n = 0; n < width; n += kLanes) DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    const VecF p = exp_down(load(score + i * kScoreRow + n) - off[i]);
    total[i] += p;
    store(score + i * kScoreRow + n, p);
  }
  const VecF factor = exp_down(before - finite);
  const VecF sum = fold(total, [](VecF a, VecF b) { return a + b; });
  // Only the strip's own rows: the next strip's are in the lanes behind.
  const VecF sum_after = load(sums) * factor + sum;
  memcpy(maximum, &after, kTileRows * sizeof(float));
  memcpy(sums, &sum_after, kTileRows * sizeof(float));
  return factor;
}

struct ForwardScratch {
  float *keys;    // [panels][D][kTileColumns]
  float *values;  // [P + Lk][row]
  float *q;       // [kQueries][row]
  float *scores;  // [kTileRows][kScoreRow]
  float *y;       // [kQueries][row]
};

inline ForwardScratch forward_scratch(const Shape &s, Arena *arena) {
  ForwardScratch at;
  at.keys = arena->take<float>(ceil_div(s.keys, kTileColumns) * s.panel);
  at.values = arena->take<float>(s.keys * s.row);
  at.q = arena->take<float>(kQueries * s.row);
  at.scores = arena->take<float>(kTileRows * kScoreRow);
  at.y = arena->take<float>(kQueries * s.row);
  return at;
}

/* Queries first ... first + count - 1 are done: y from its sums, and lse. */
template <class T>
void finish_queries(const AttentionForwardArgs &args, const Shape &s, int64_t b, int64_t h,
                    int64_t first, int64_t count, const float *maximum, const float *sum,
                    const float *sums) {
  const Tokens<T> y = tokens<T>(args.y, b, h);
  for (int64_t i = 0; i < count; ++i) {
    const bool blind = sum[i] == 0.0f;
    if (blind)
      memset(y.at(first + i), 0, static_cast<size_t>(s.D) * sizeof(T));
    else
      store_token(sums + i * s.row, s.D, 1.0f / sum[i], y.at(first + i));
    if (args.lse)
      args.lse[(b * s.H + h) * s.Lq + first + i] =
          blind ? kInfinity : maximum[i] + __builtin_logf(sum[i]);
  }
}

/* Queries r0 ... r0 + rows - 1 of one head, against keys and values that are packed. A strip goes
 * through a block of keys while its scores are in L1; so are its queries and sums where that block
 * is the only one. */
template <class T>
void forward_block(const AttentionForwardArgs &args, const Shape &s, const ForwardScratch &at,
                   int64_t b, int64_t h, int64_t r0, int64_t rows, TokensAhead<T> *ahead) {
  Running run;
  for (float &maximum : run.maximum) maximum = -kInfinity;
  for (float &sum : run.sum) sum = 0.0f;
  const int64_t seen = s.causal ? s.P + r0 + rows : s.keys;
  if (seen == 0) finish_queries<T>(args, s, b, h, r0, rows, run.maximum, run.sum, at.y);
  for (int64_t k0 = 0; k0 < seen; k0 += kKeys) {
    const Block block = {r0, rows, k0, least(kKeys, seen - k0), s.causal, s.P};
    const int64_t free = of_prefix(s.P, k0, block.keys);  // of any mask
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t visible = block.visible(i + kTileRows - 1);
      if (visible == 0) continue;
      const int64_t count = least(kTileRows, rows - i), slot = seen <= kKeys ? 0 : i * s.row;
      float *q = at.q + slot, *sums = at.y + slot;
      if (k0 == 0) pack_turned(s, b, tokens<const T>(args.q, b, h), r0 + i, count, kTileRows, q);
      score_strip(s, block, i, q, at.keys + k0 / kTileColumns * s.panel, args.scale, at.scores,
                  ahead);
      const int64_t width = round_up(visible, kLanes);
      for (int64_t j = 0; j < count; ++j) {
        float *row = at.scores + j * kScoreRow;
        add_bias(args, b, h, r0 + i + j, k0, block.visible(i + j), row);
        hide(row + free, block.visible(i + j) - free, width - free,
             mask_row(args, s, b, h, r0 + i + j, k0));
      }
      const VecF factor = softmax_strip(at.scores, width, run.maximum + i, run.sum + i);
      for (int j = 0; k0 > 0 && j < kTileRows; ++j) {
        if (factor[j] == 1.0f) continue;
        float *sum = sums + j * s.row;
        for (int64_t d = 0; d < s.columns; d += kLanes)
          store(sum + d, load(sum + d) * splat(factor[j]));
      }
      const float *values = at.values + k0 * s.row;
      k0 == 0 ? query_strip<false>(s, block, i, at.scores, values, sums, ahead)
              : query_strip<true>(s, block, i, at.scores, values, sums, ahead);
      if (k0 + kKeys >= (s.causal ? least(seen, s.P + r0 + i + kTileRows) : seen))
        finish_queries<T>(args, s, b, h, r0 + i, count, run.maximum + i, run.sum + i, sums);
    }
  }
}

template <class T>
deltaops_status attention_forward_as(const AttentionForwardArgs &args, const RotaryTables *tables) {
  const Shape s = shape_of(args, tables);
  if (s.B == 0 || s.H == 0 || s.Lq == 0) return DELTAOPS_OK;
  const int64_t most = round_up(ceil_div(s.Lq, ceil_div(s.Lq, kQueries)), kTileRows);
  const int64_t blocks = ceil_div(s.Lq, most), items = s.B * s.H * blocks;
  int threads = useful_threads(static_cast<int>(least(args.num_threads, items)),
                               2 * s.B * s.H * s.Lq * (s.keys + 1) * s.D);
  for (;;) {
    Arena size(nullptr);
    for (int i = 0; i < threads; ++i) forward_scratch(s, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("attention_forward", size.used());
    const size_t each = size.used() / static_cast<size_t>(threads);
    const int given = team(threads, [&](int self) {
      Arena arena(static_cast<char *>(memory) + each * static_cast<size_t>(self));
      const ForwardScratch at = forward_scratch(s, &arena);
      const Range mine = share(items, self, threads);
      TokensAhead<T> ahead(s, 2);
      int64_t packed = -1, entered = -1;
      for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t head = item / blocks, b = head / s.H, h = head % s.H;
        if (const int64_t owner = head / s.group; owner != packed) {
          const int64_t kv = h / s.group;
          pack_joined_panels(s, joined<T>(args, args.prefix_k, args.k, b, kv, s.tables != nullptr),
                             0, s.keys, at.values, at.keys);
          pack_joined(s, joined<T>(args, args.prefix_v, args.v, b, kv, false), 0, s.keys,
                      at.values);
          packed = owner;
        }
        if (head != entered) {
          ahead = TokensAhead<T>(s, 2);
          ahead.add(args.y, b, h, s.Lq);
          if (const int64_t next = head + 1; next * blocks < mine.end) {
            ahead.add(args.q, next / s.H, next % s.H, s.Lq);
            if (next % s.group == 0) {
              ahead.add(args.k, next / s.H, next % s.H / s.group, s.Lk);
              ahead.add(args.v, next / s.H, next % s.H / s.group, s.Lk);
            }
          }
          entered = head;
        }
        // First, last, second, last but one: any run of them has its share of causal work.
        const int64_t turn = item % blocks;
        const int64_t index = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
        forward_block<T>(args, s, at, b, h, index * most, least(most, s.Lq - index * most), &ahead);
      }
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status attention_forward(const AttentionForwardArgs &args, const RotaryTables *tables) {
  return args.dtype == DELTAOPS_BF16 ? attention_forward_as<Bf16>(args, tables)
                                     : attention_forward_as<float>(args, tables);
}

/* ------------------------------------------------------------------------------------ backward */

struct BackwardScratch {
  float *keys, *values;  // [panels of kKeys][D][kTileColumns]
  float *key_rows;       // [kKeys][row]
  float *q, *dy;         // [kQueries][row]
  float *p, *ds;         // [kQueries][kScoreRow]
  float *dk, *dv;        // [kKeys and a strip][row]
  float *dq;             // [group][Lq and a strip][row]
  float *delta;          // [group][Lq]
};

inline BackwardScratch backward_scratch(const Shape &s, Arena *arena) {
  BackwardScratch at;
  at.keys = arena->take<float>(kKeys / kTileColumns * s.panel);
  at.values = arena->take<float>(kKeys / kTileColumns * s.panel);
  at.key_rows = arena->take<float>(kKeys * s.row);
  at.q = arena->take<float>(kQueries * s.row);
  at.dy = arena->take<float>(kQueries * s.row);
  at.p = arena->take<float>(kQueries * kScoreRow);
  at.ds = arena->take<float>(kQueries * kScoreRow);
  at.dk = arena->take<float>((kKeys + kTileRows) * s.row);
  at.dv = arena->take<float>((kKeys + kTileRows) * s.row);
  at.dq = arena->take<float>(s.group * (s.Lq + kTileRows) * s.row);
  at.delta = arena->take<float>(s.group * s.Lq);
  return at;
}

/* scores and dp -> p and ds for kTileRows queries, `width` of them whole vectors. With all keys in
 * this block rowsum(dY y) is taken as rowsum(P dP), from which it differs by rounding alone: then
 * the two parts of ds are rounded alike, and what must cancel does. Else it is `delta`. */
template <bool all_keys>
void slope_strip(float *score, float *dp, int64_t width, const float *lse, const float *delta,
                 float scale) {
  VecF off[kTileRows], total[kTileRows] = {};
  DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) off[i] = splat(lse[i]);
  if constexpr (all_keys) {
    for (int64_t n = 0; n < width; n += kLanes) DELTAOPS_UNROLL
    for (int i = 0; i < kTileRows; ++i) {
      float *at = score + i * kScoreRow + n;
      const VecF p = exp_down(load(at) - off[i]), slope = load(dp + i * kScoreRow + n);
      total[i] += p == VecF{} ? VecF{} : p * slope;
      store(at, p);
    }
    const VecF sums = fold(total, [](VecF a, VecF b) { return a + b; });
    DELTAOPS_UNROLL
    for (int i = 0; i < kTileRows; ++i) total[i] = splat(sums[i]);
  } else {
    DELTAOPS_UNROLL
    for (int i = 0; i < kTileRows; ++i) total[i] = splat(delta[i]);
  }
  for (int64_t n = 0; n < width; n += kLanes) DELTAOPS_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    float *at = score + i * kScoreRow + n, *to = dp + i * kScoreRow + n;
    VecF p = load(at);
    if constexpr (!all_keys) {
      p = exp_down(p - off[i]);
      store(at, p);
    }
    const VecF ds = p * (load(to) - total[i]) * splat(scale);
    store(to, p == VecF{} ? VecF{} : ds);  // a NaN that is hidden stays so
  }
}

/* rowsum(dY y) of a head. */
template <class T>
void deltas(const Shape &s, const Tokens<const T> &dy, const Tokens<const T> &y, float *delta) {
  for (int64_t i = 0; i < s.Lq; ++i) {
    const T *a = dy.at(i), *b = y.at(i);
    VecF total = {};
    each_vector(s.D, [&](int64_t k, int64_t lanes) {
      total += load_lanes(a + k, lanes) * load_lanes(b + k, lanes);
    });
    delta[i] = sum(total);
  }
}

/* Rows of sums to the tokens of a gradient, where it is wanted; turned back where what it is of was
 * turned. */
template <class T>
void store_gradient(const Shape &s, const deltaops_heads &grad, bool turned, int64_t b, int64_t h,
                    int64_t first, int64_t count, const float *sums) {
  if (grad.data == nullptr) return;
  const Tokens<T> to = tokens<T>(grad, b, h);
  if (turned)
    return turn_tokens<true>(s, b, first, count, Tokens<const float>{sums, s.row},
                             Tokens<T>{to.at(first), to.stride});
  for (int64_t i = 0; i < count; ++i) store_token(sums + i * s.row, s.D, 1.0f, to.at(first + i));
}

/* What queries r0 ... r0 + rows - 1 of head h give to keys k0 ... k0 + keys - 1, and get. first:
 * these keys have been given nothing so far. */
template <class T>
void backward_block(const AttentionBackwardArgs &args, const Shape &s, const BackwardScratch &at,
                    int64_t b, int64_t h, const Block &block, bool first, TokensAhead<T> *ahead) {
  const int64_t member = h % s.group, r0 = block.r0, rows = block.rows;
  const int64_t padded = round_up(rows, kTileRows);
  pack_turned(s, b, tokens<const T>(args.q, b, h), r0, rows, padded, at.q);
  pack_tokens(s, tokens<const T>(args.grad_y, b, h), r0, rows, padded, at.dy);
  const float *lse = args.lse + (b * s.H + h) * s.Lq + r0;
  const float *delta = at.delta + member * s.Lq + r0;
  const bool all_keys = s.keys <= kKeys;
  const int64_t free = of_prefix(s.P, block.k0, block.keys);
  for (int64_t i = 0; i < rows; i += kTileRows) {
    float *p = at.p + i * kScoreRow, *ds = at.ds + i * kScoreRow;
    score_strip(s, block, i, at.q + i * s.row, at.keys, args.scale, p, ahead);
    score_strip(s, block, i, at.dy + i * s.row, at.values, 1.0f, ds, ahead);
    // What a strip of keys sees of these queries ends at most that far behind the last of them.
    const int64_t last = block.visible(i + kTileRows - 1);
    const int64_t width = round_up(last + kTileRows - 1, kLanes);
    float row_lse[kTileRows] = {}, row_delta[kTileRows] = {};
    for (int64_t j = 0; j < kTileRows; ++j) {
      const bool valid = i + j < rows;
      const int64_t visible = valid ? block.visible(i + j) : 0;
      float *row = p + j * kScoreRow;
      if (valid) add_bias(args, b, h, r0 + i + j, block.k0, visible, row);
      hide(row + free, visible - free, width - free,
           valid ? mask_row(args, s, b, h, r0 + i + j, block.k0) : MaskRow{nullptr, false});
      // Tiles that no query sees were left out: where lse is NaN so is p, and the sign of NaN times
      // NaN must not come from an earlier call's scratch.
      for (int64_t n = visible; n < width; ++n) ds[j * kScoreRow + n] = 0.0f;
      if (!valid) continue;
      row_lse[j] = lse[i + j];
      if (!all_keys) row_delta[j] = delta[i + j];
    }
    all_keys ? slope_strip<true>(p, ds, width, row_lse, row_delta, args.scale)
             : slope_strip<false>(p, ds, width, row_lse, row_delta, args.scale);
    if (args.grad_q.data == nullptr) continue;
    if (all_keys) {
      query_strip<false>(s, block, i, ds, at.key_rows, at.dq, ahead);
      store_gradient<T>(s, args.grad_q, s.tables, b, h, r0 + i, least(kTileRows, rows - i), at.dq);
    } else {
      float *dq = at.dq + (member * (s.Lq + kTileRows) + r0 + i) * s.row;
      block.k0 == 0 ? query_strip<false>(s, block, i, ds, at.key_rows, dq, ahead)
                    : query_strip<true>(s, block, i, ds, at.key_rows, dq, ahead);
    }
  }
  const bool prefix = block.k0 < s.P;
  if (args.grad_v.data || (prefix && args.grad_prefix_v.data))
    first ? key_block<false>(s, block, at.p, at.dy, at.dv, ahead)
          : key_block<true>(s, block, at.p, at.dy, at.dv, ahead);
  if (args.grad_k.data || (prefix && args.grad_prefix_k.data))
    first ? key_block<false>(s, block, at.ds, at.q, at.dk, ahead)
          : key_block<true>(s, block, at.ds, at.q, at.dk, ahead);
}

/* Everything that one head of keys has a part in. */
template <class T>
void backward_head(const AttentionBackwardArgs &args, const Shape &s, const BackwardScratch &at,
                   const PrefixSums &sums, const HeadWalk &walk, TokensAhead<T> *ahead) {
  const int64_t b = walk.b, kv = walk.kv;
  const int64_t h0 = kv * s.group, member = (s.Lq + kTileRows) * s.row;
  for (int64_t g = 0; g < s.group && s.keys > kKeys; ++g)
    deltas(s, tokens<const T>(args.grad_y, b, h0 + g), tokens<const T>(args.y, b, h0 + g),
           at.delta + g * s.Lq);
  const Joined<T> k = joined<T>(args, args.prefix_k, args.k, b, kv, s.tables != nullptr);
  const Joined<T> v = joined<T>(args, args.prefix_v, args.v, b, kv, false);
  const bool prefix_alone = !args.grad_q.data && !args.grad_k.data && !args.grad_v.data;
  const int64_t end = prefix_alone ? s.P : s.keys;
  for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
    const int64_t keys = least(kKeys, s.keys - k0);
    pack_joined_panels(s, v, k0, keys, at.key_rows, at.values);
    pack_joined(s, k, k0, keys, at.key_rows);
    pack_transposed(s, Tokens<const float>{at.key_rows, s.row}, 0, keys, at.keys);
    const int64_t begin = s.causal ? most(k0 - s.P, 0) / kQueries * kQueries : 0;
    if (s.Lq == 0) {
      memset(at.dk, 0, static_cast<size_t>(keys * s.row) * sizeof(float));
      memset(at.dv, 0, static_cast<size_t>(keys * s.row) * sizeof(float));
    }
    for (int64_t g = 0; g < s.group; ++g)
      for (int64_t r0 = begin; r0 < s.Lq; r0 += kQueries)
        backward_block<T>(args, s, at, b, h0 + g,
                          {r0, least(kQueries, s.Lq - r0), k0, keys, s.causal, s.P},
                          g == 0 && r0 == begin, ahead);
    const int64_t shared = of_prefix(s.P, k0, keys);
    if (shared > 0) {
      float *dk = sums.at(s, sums.dk, walk.run, kv), *dv = sums.at(s, sums.dv, walk.run, kv);
      const bool add = !walk.first_of_run();
      gather(at.dk, shared * s.row, add, dk ? dk + k0 * s.row : nullptr);
      gather(at.dv, shared * s.row, add, dv ? dv + k0 * s.row : nullptr);
    }
    const int64_t first = k0 + shared - s.P, rest = keys - shared;
    store_gradient<T>(s, args.grad_k, s.tables, b, kv, first, rest, at.dk + shared * s.row);
    store_gradient<T>(s, args.grad_v, false, b, kv, first, rest, at.dv + shared * s.row);
  }
  if (s.keys == 0) memset(at.dq, 0, static_cast<size_t>(s.group * member) * sizeof(float));
  for (int64_t g = 0; g < s.group && (s.keys == 0 || s.keys > kKeys); ++g)
    store_gradient<T>(s, args.grad_q, s.tables, b, h0 + g, 0, s.Lq, at.dq + g * member);
}

template <class T>
deltaops_status attention_backward_as(const AttentionBackwardArgs &args,
                                      const RotaryTables *tables) {
  const Shape s = shape_of(args, tables);
  if (s.Hkv == 0) return DELTAOPS_OK;
  Arena none(nullptr);
  const int64_t items = prefix_sums(args, s, &none).runs * s.Hkv;
  if (items == 0 && none.used() == 0) return DELTAOPS_OK;
  int threads = useful_threads(static_cast<int>(least(args.num_threads, most(items, 1))),
                               5 * s.B * s.H * s.Lq * (s.keys + 1) * s.D);
  for (;;) {
    Arena size(nullptr);
    for (int i = 0; i < threads; ++i) backward_scratch(s, &size);
    const size_t each = size.used() / static_cast<size_t>(threads);
    prefix_sums(args, s, &size);
    void *memory = workspace(size.used());
    if (memory == nullptr) return no_memory("attention_backward", size.used());
    const int given = team(threads, [&](int self) {
      Arena arena(static_cast<char *>(memory) + each * static_cast<size_t>(self));
      const BackwardScratch at = backward_scratch(s, &arena);
      Arena last(static_cast<char *>(memory) + each * static_cast<size_t>(threads));
      const PrefixSums sums = prefix_sums(args, s, &last);
      HeadWalk walk(s, sums.runs, share(items, self, threads));
      while (!walk.done()) {
        const HeadWalk now = walk;
        walk.next();
        TokensAhead<T> ahead(s, 5 * s.group);
        ahead.add(args.grad_k, now.b, now.kv, s.Lk);
        ahead.add(args.grad_v, now.b, now.kv, s.Lk);
        ahead.add(args.grad_q, now.b, now.kv * s.group, s.Lq);
        if (!walk.done()) {
          const int64_t b = walk.b, kv = walk.kv;
          ahead.add(args.k, b, kv, s.Lk);
          ahead.add(args.v, b, kv, s.Lk);
          ahead.add(args.grad_y, b, kv * s.group, s.Lq);
          if (s.keys > kKeys) ahead.add(args.y, b, kv * s.group, s.Lq);
          ahead.add(args.q, b, kv * s.group, s.Lq);
        }
        backward_head<T>(args, s, at, sums, now, &ahead);
      }
      if (sums.dk == nullptr && sums.dv == nullptr) return;
      barrier();
      store_prefix(args, s, sums, share(s.Hkv * s.P, self, threads));
    });
    if (given == threads) return DELTAOPS_OK;
    threads = given;
  }
}

deltaops_status attention_backward(const AttentionBackwardArgs &args, const RotaryTables *tables) {
  return args.dtype == DELTAOPS_BF16 ? attention_backward_as<Bf16>(args, tables)
                                     : attention_backward_as<float>(args, tables);
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
