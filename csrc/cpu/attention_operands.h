/* attention_operands.h: heads of queries, keys and values, packed as attention_block.h takes them.
 *
 * Tokens of a head lie a stride apart; they become rows of floats, or panels of them transposed.
 * Keys and values of a prefix are joined with those of the sequence on the way; queries and the
 * sequence's keys are turned by their positions where there are tables of angles, and gradients of
 * theirs are turned back as they are stored.
 */
#ifndef DELTAOPS_CPU_ATTENTION_OPERANDS_H
#define DELTAOPS_CPU_ATTENTION_OPERANDS_H

#include "rotary.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* The sizes of a call and what follows from them. */
struct Shape {
  int64_t B, H, Hkv, Lq, Lk, D, P;
  int64_t keys;          // of both: P + Lk
  int64_t group;         // heads of queries that share a head of keys
  int64_t columns, row;  // of D floats in scratch: whole panels, and the stride
  int64_t panel;         // floats
  bool causal;
  const RotaryTables *tables;  // NULL: nothing is turned
};

/* Args: either direction's. */
template <class Args>
Shape shape_of(const Args &args, const RotaryTables *tables) {
  const int64_t *sizes = args.sizes;
  Shape s = {};
  s.B = sizes[0], s.H = sizes[1], s.Hkv = sizes[2], s.Lq = sizes[3], s.Lk = sizes[4];
  s.D = sizes[5], s.P = args.prefix_length, s.causal = args.causal;
  s.tables = tables;
  s.keys = s.P + s.Lk;
  s.group = s.Hkv ? s.H / s.Hkv : 0;
  s.columns = round_up(s.D, kTileColumns);
  s.row = (ceil_div(s.columns, 16) | 1) * 16;
  s.panel = s.D * kTileColumns;
  return s;
}

/* One head: tokens `stride` apart. */
template <class T>
struct Tokens {
  T *data;
  int64_t stride;

  T *at(int64_t token) const { return data + token * stride; }
};

template <class T>
DELTAOPS_INLINE Tokens<T> tokens(const deltaops_heads &heads, int64_t b, int64_t h) {
  T *data = static_cast<T *>(heads.data);
  if (data) data += b * heads.strides[0] + h * heads.strides[1];  // NULL: there are no elements
  return {data, heads.strides[2]};
}

/* Tokens first ... first + count - 1 as rows of floats; then rows of zeros up to `padded`. */
template <class T>
void pack_tokens(const Shape &s, const Tokens<T> &from, int64_t first, int64_t count,
                 int64_t padded, float *to) {
  for (int64_t i = 0; i < count; ++i) pack_row(to + i * s.row, from.at(first + i), s.D, s.columns);
  if (count < padded)
    memset(to + count * s.row, 0, static_cast<size_t>((padded - count) * s.row) * sizeof(float));
}

/* Tokens of sequence b turned by their positions `first` ... `first` + count - 1, or turned back.
 */
template <bool backward, class Table, class X, class Y>
void turn_by(const Shape &s, int64_t b, int64_t first, int64_t count, const Tokens<const X> &from,
             const Tokens<Y> &to) {
  const RotaryTables &tables = *s.tables;
  const int64_t start = b * tables.strides[0] + first * tables.strides[1];
  const Table *cos = static_cast<const Table *>(tables.cos) + start;
  const Table *sin = static_cast<const Table *>(tables.sin) + start;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * tables.strides[1];
    turn_head<backward>(from.at(i), cos + at, sin + at, s.D / 2, to.at(i));
  }
}

template <bool backward, class X, class Y>
void turn_tokens(const Shape &s, int64_t b, int64_t first, int64_t count,
                 const Tokens<const X> &from, const Tokens<Y> &to) {
  s.tables->dtype == DELTAOPS_BF16 ? turn_by<backward, Bf16>(s, b, first, count, from, to)
                                   : turn_by<backward, float>(s, b, first, count, from, to);
}

/* As pack_tokens(); those of sequence b, turned where there are tables. */
template <class T>
void pack_turned(const Shape &s, int64_t b, const Tokens<const T> &from, int64_t first,
                 int64_t count, int64_t padded, float *to) {
  if (s.tables == nullptr) return pack_tokens(s, from, first, count, padded, to);
  turn_tokens<false>(s, b, first, count, Tokens<const T>{from.at(first), from.stride},
                     Tokens<float>{to, s.row});
  for (int64_t i = 0; i < count && s.D < s.columns; ++i)
    memset(to + i * s.row + s.D, 0, static_cast<size_t>(s.columns - s.D) * sizeof(float));
  pack_tokens(s, from, 0, 0, padded - count, to + count * s.row);
}

/* The same tokens transposed, in panels. */
template <class T>
void pack_transposed(const Shape &s, const Tokens<T> &from, int64_t first, int64_t count,
                     float *to) {
  for (int64_t n = 0; n < count; n += kTileColumns, to += s.panel)
    pack_panel_rows(to, kTileColumns, from.at(first + n), from.stride,
                    least(kTileColumns, count - n), s.D, s.D);
}

/* A head of keys or of values: those of a prefix, then those of a sequence. */
template <class T>
struct Joined {
  int64_t P;
  Tokens<const float> wide;   // the prefix: here, or
  Tokens<const Bf16> narrow;  // here where its dtype is bf16
  bool bf16;
  Tokens<const T> own;
  int64_t b;    // whose they are
  bool turned;  // keys, and there are tables
};

template <class T, class Args>
DELTAOPS_INLINE Joined<T> joined(const Args &args, const deltaops_heads &prefix,
                                 const deltaops_heads &own, int64_t b, int64_t kv, bool turned) {
  Joined<T> all = {args.prefix_length, {}, {}, args.prefix_dtype == DELTAOPS_BF16, {}, b, turned};
  if (all.P > 0 && all.bf16) all.narrow = tokens<const Bf16>(prefix, 0, kv);
  if (all.P > 0 && !all.bf16) all.wide = tokens<const float>(prefix, 0, kv);
  all.own = tokens<const T>(own, b, kv);
  return all;
}

/* How many of `count` keys from `first` on are a prefix's. */
DELTAOPS_INLINE int64_t of_prefix(int64_t P, int64_t first, int64_t count) {
  return P > first ? least(P - first, count) : 0;
}

/* Both as rows of floats. */
template <class T>
void pack_joined(const Shape &s, const Joined<T> &from, int64_t first, int64_t count, float *to) {
  const int64_t ahead = of_prefix(from.P, first, count), rest = count - ahead;
  if (ahead > 0 && from.bf16) pack_tokens(s, from.narrow, first, ahead, ahead, to);
  if (ahead > 0 && !from.bf16) pack_tokens(s, from.wide, first, ahead, ahead, to);
  const int64_t own = first + ahead - from.P;
  if (rest > 0 && from.turned)
    pack_turned(s, from.b, from.own, own, rest, rest, to + ahead * s.row);
  if (rest > 0 && !from.turned) pack_tokens(s, from.own, own, rest, rest, to + ahead * s.row);
}

/* Both in panels, `first` the first key of one. Panels that a prefix has a part in, or all where
 * keys are turned, are made from `rows`, which are overwritten. */
template <class T>
void pack_joined_panels(const Shape &s, const Joined<T> &from, int64_t first, int64_t count,
                        float *rows, float *to) {
  const int64_t mixed =
      from.turned ? count : least(count, round_up(of_prefix(from.P, first, count), kTileColumns));
  if (mixed > 0) {
    pack_joined(s, from, first, mixed, rows);
    pack_transposed(s, Tokens<const float>{rows, s.row}, 0, mixed, to);
    to += mixed / kTileColumns * s.panel;
  }
  if (count > mixed) pack_transposed(s, from.own, first + mixed - from.P, count - mixed, to);
}

template <class T>
void store_token(const float *from, int64_t D, float factor, T *to) {
  each_vector(D, [&](int64_t k, int64_t lanes) {
    store_lanes(to + k, load(from + k) * splat(factor), lanes);
  });
}

/* Brings what the next head will be read from, and this one written to, into L2, a few lines for
 * each slice of a tile: its tokens are short runs on as many pages, which no hardware prefetcher
 * follows, and more lines at once than a core can wait for would hold it up. */
template <class T>
class TokensAhead {
 public:
  /* What is added is asked for within `products` products of queries and keys. */
  TokensAhead(const Shape &s, int64_t products)
      : lines_(ceil_div(s.D * static_cast<int64_t>(sizeof(T)), kLine)),
        slices_(most(products * s.Lq * s.keys * s.columns / (s.causal ? 2 : 1) /
                         (kTileRows * kTileColumns * PanelAhead::kSlice),
                     1)) {}

  void add(const deltaops_heads &heads, int64_t b, int64_t h, int64_t count) {
    constexpr int64_t kMost = 1 << 10;  // lines of one tensor: several of them fill half of L2
    const Tokens<const T> from = tokens<const T>(heads, b, h);
    const int64_t some = least(count, kMost / lines_);
    if (from.data == nullptr || some <= 0) return;
    list_[used_++] = {from, some};
    total_ += some * lines_;
    each_ = ceil_div(total_, slices_);
  }

  DELTAOPS_INLINE void some() {
    for (int64_t i = 0; i < each_; ++i) {
      if (left_ == 0) {
        while (token_ == list_[at_].count) {
          token_ = 0;
          if (++at_ >= used_) {
            each_ = 0;
            return;
          }
        }
        line_ = reinterpret_cast<const char *>(list_[at_].from.at(token_++));
        left_ = lines_;
      }
      __builtin_prefetch(line_, 0, 2);
      line_ += kLine;
      --left_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  struct Run {
    Tokens<const T> from;
    int64_t count;
  };
  int64_t lines_, slices_, each_ = 0;
  const char *line_ = nullptr;
  int64_t left_ = 0, token_ = 0;
  int at_ = 0, used_ = 0;
  Run list_[8] = {};  // copied with the rest
  int64_t total_ = 0;
};

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
