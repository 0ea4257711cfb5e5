/* attention_forward.h: the op (deltaops.h has its mathematics).
 *
 *     S = scale Q K^T,  P = exp(S - max),  y = P V / sum P
 *
 * over blocks of keys, with the maximum and the sum carried along (Milakov and Gimelshein 2018).
 * A block of queries belongs to one thread. How they are cut and the order in a block depend on the
 * sizes alone: the same bits for any team.
 */
#ifndef DELTAOPS_CPU_ATTENTION_FORWARD_H
#define DELTAOPS_CPU_ATTENTION_FORWARD_H

#include "attention_block.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* The softmax of a block's queries so far. */
struct Running {
  float maximum[kQueries + kLanes], sum[kQueries + kLanes];  // whole vectors from any strip's start
};

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

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
