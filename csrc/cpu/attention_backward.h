/* attention_backward.h: the gradients of attention_forward.h.
 *
 *     P = exp(S - lse),  dP = dY V^T,  dS = scale P (dP - rowsum(dY y))
 *     dQ = dS K,  dK = dS^T Q,  dV = P^T dY       (Dao et al. 2022, algorithm 4)
 *
 * A head of keys with all its heads of queries belongs to one thread. How it is cut and the order
 * in a block depend on the sizes alone: the same bits for any team. So too for the gradients of a
 * prefix, sums over the batch: of a few runs of sequences each, then of the runs.
 */
#ifndef DELTAOPS_CPU_ATTENTION_BACKWARD_H
#define DELTAOPS_CPU_ATTENTION_BACKWARD_H

#include "attention_block.h"
#include "attention_prefix.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

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
