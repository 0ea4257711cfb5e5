// checks_heads.cpp: the arguments of rotary and attention, whose tensors have three strides.

#include <utility>

#include "checker.h"

namespace deltaops {
namespace {

// A dimension of some memory, its stride in bytes.
struct Level {
  int64_t size, stride;
};

constexpr int kMostLevels = 3;
constexpr int64_t kMostFootprints = 4096;

void by_stride(Level *levels, int count) {
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && levels[j].stride < levels[j - 1].stride; --j)
      std::swap(levels[j], levels[j - 1]);
}

// Remembers runs of `width` bytes at every sum of the levels' strides. Two levels are a footprint;
// a third that does not continue the second makes a footprint each. Past thousands of those the
// gaps between them count as touched. Addresses are numbers here: those of arguments that do not
// fit may lie outside of any memory.
void remember(Checker *c, const char *name, const void *data, const Level *given, int count,
              int64_t width, bool written) {
  if (c->status() != DELTAOPS_OK || data == nullptr || width <= 0) return;
  Level levels[kMostLevels + 1];
  int used = 0;
  auto begin = reinterpret_cast<uintptr_t>(data);
  for (int i = 0; i < count; ++i) {
    if (given[i].size <= 0) return;
    if (given[i].size == 1 || given[i].stride == 0) continue;
    const int64_t reach = (given[i].size - 1) * given[i].stride;
    if (reach < 0) begin += static_cast<uintptr_t>(reach);
    levels[used++] = {given[i].size, std::llabs(given[i].stride)};
  }
  by_stride(levels, used);
  int at = 0;
  for (; at < used && levels[at].stride <= width; ++at)
    width += (levels[at].size - 1) * levels[at].stride;
  Level runs = {1, width};
  if (at < used) runs = levels[at++];
  for (; at < used && levels[at].stride == runs.size * runs.stride; ++at)
    runs.size *= levels[at].size;
  int64_t prints = 1;
  bool many = false;
  for (int i = at; i < used; ++i)
    many = many || __builtin_mul_overflow(prints, levels[i].size, &prints);
  if (many || prints > kMostFootprints) {
    width += (runs.size - 1) * runs.stride;
    for (int i = at; i < used; ++i) width += (levels[i].size - 1) * levels[i].stride;
    return c->remember(name, reinterpret_cast<const void *>(begin), 1, width, 0, written);
  }
  for (int64_t print = 0; print < prints; ++print) {
    uintptr_t start = begin;
    int64_t rest = print;
    for (int i = at; i < used; rest /= levels[i].size, ++i)
      start += static_cast<uintptr_t>(rest % levels[i].size * levels[i].stride);
    c->remember(name, reinterpret_cast<const void *>(start), runs.size, width, runs.stride,
                written);
  }
}

// A dimension's reach must be counted in bytes without overflow before remember() may.
void reach(Checker *c, const char *name, int64_t size, int64_t stride, int64_t element) {
  c->expect(extent(size, stride, element) >= 0,
            "%s must span at most 2^56 bytes, got %" PRId64 " at a stride of %" PRId64 ".", name,
            size, stride);
}

// Sizes [B, H, L, D] of one tensor, with the strides of the first three; D elements lie side by
// side.
struct Heads {
  const char *name;
  const void *data;
  int64_t sizes[4];
  const int64_t *strides;
  int64_t element;  // bytes

  bool empty() const { return sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0; }

  void memory(Checker *c, bool written) const {
    if (c->status() != DELTAOPS_OK) return;
    c->expect(data != nullptr || empty(), "%s must point to its elements, got NULL.", name);
    c->pointer(name, data, static_cast<size_t>(element));
    Level levels[3];
    for (int i = 0; i < 3; ++i) {
      reach(c, name, sizes[i], strides[i], element);
      if (c->status() != DELTAOPS_OK) return;
      levels[i] = {sizes[i], strides[i] * element};
    }
    if (empty()) return;
    if (written)
      c->expect(apart(),
                "%s is written, so its heads must not overlap, got strides (%" PRId64 ", %" PRId64
                ", %" PRId64 ") for [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "].",
                name, strides[0], strides[1], strides[2], sizes[0], sizes[1], sizes[2], sizes[3]);
    remember(c, name, data, levels, 3, sizes[3] * element, written);
  }

  // Whether each of the three strides steps over all that the smaller ones reach.
  bool apart() const {
    Level levels[3];
    for (int i = 0; i < 3; ++i) levels[i] = {sizes[i], strides[i]};
    by_stride(levels, 3);
    int64_t end = sizes[3];
    for (const Level &level : levels) {
      if (level.size == 1) continue;
      if (level.stride < end) return false;
      end += (level.size - 1) * level.stride;
    }
    return true;
  }
};

void float_or_bf16(Checker *c, const char *name, int32_t dtype) {
  c->expect(dtype == DELTAOPS_F32 || dtype == DELTAOPS_BF16,
            "%s must be 0 (f32) or 1 (bf16), got %d.", name, dtype);
}

// The angles of B sequences of L tokens, which B of stride 0 share. They are heads too, one for
// each token; read: whether any head is turned by them.
void angles(Checker *c, const void *cos, const void *sin, const int64_t *table_strides,
            int32_t dtype, int64_t B, int64_t L, int64_t D, bool read) {
  const int64_t tables = B > 1 && table_strides[0] == 0 ? 1 : B;
  const int64_t strides[] = {table_strides[0], 0, table_strides[1]};
  const int64_t element = dtype == DELTAOPS_BF16 ? 2 : 4;
  Heads{"cos", cos, {tables, read ? 1 : 0, L, D}, strides, element}.memory(c, false);
  Heads{"sin", sin, {tables, read ? 1 : 0, L, D}, strides, element}.memory(c, false);
}

}  // namespace

// ----------------------------------------------------------------------------------------- rotary

deltaops_status check(const RotaryArgs *args) {
  Checker c("rotary");
  if (!c.header(args)) return c.status();
  c.expect(args->reserved == 0, "reserved must be 0, got %d. Zero the struct first.",
           args->reserved);
  const int64_t *sizes = args->sizes;
  const int32_t dtype = args->dtype, table_dtype = args->table_dtype;
  for (int i = 0; i < 4; ++i)
    c.expect(sizes[i] >= 0 && sizes[i] <= kMaxSize, "%c must be 0 to 2^40, got %" PRId64 ".",
             "BHLD"[i], sizes[i]);
  int64_t all = 1;
  for (int i = 0; i < 4 && c.status() == DELTAOPS_OK; ++i)
    c.expect(!__builtin_mul_overflow(all, sizes[i] + 1, &all) && all <= kMaxWork / 16,
             "the sizes must stay below 2^52 elements, got [%" PRId64 ", %" PRId64 ", %" PRId64
             ", %" PRId64 "]. Cut the batch.",
             sizes[0], sizes[1], sizes[2], sizes[3]);
  c.expect(sizes[3] >= 2 && sizes[3] % 2 == 0, "D must be even and at least 2, got %" PRId64 ".",
           sizes[3]);
  float_or_bf16(&c, "dtype", dtype);
  c.expect(table_dtype == DELTAOPS_F32 || table_dtype == dtype,
           "table_dtype must be 0 (f32) or that of x, %d, got %d. Convert cos and sin.", dtype,
           table_dtype);
  c.expect(args->backward == 0 || args->backward == 1, "backward must be 0 or 1, got %d.",
           args->backward);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t B = sizes[0], H = sizes[1], L = sizes[2], D = sizes[3];
  const int64_t element = dtype == DELTAOPS_BF16 ? 2 : 4;
  Heads{"x", args->x, {B, H, L, D}, args->x_strides, element}.memory(&c, false);
  Heads{"y", args->y, {B, H, L, D}, args->y_strides, element}.memory(&c, true);
  angles(&c, args->cos, args->sin, args->table_strides, table_dtype, B, L, D, H > 0);
  return c.disjoint();
}

// -------------------------------------------------------------------------------------- attention

namespace {

constexpr int64_t kMostScratch = int64_t{1} << 36;  // elements

// a * b, or something larger than kMostScratch where that is.
int64_t bounded(int64_t a, int64_t b) {
  int64_t product = 0;
  const bool much = __builtin_mul_overflow(a, b, &product) || product > kMostScratch;
  return much ? kMostScratch + 1 : product;
}

// What both directions take, and the tensors that both read. Args: either of the two structs.
template <class Args>
bool sizes_fit(Checker *c, const Args &args) {
  static const char *const kNames[] = {"B", "H", "Hkv", "Lq", "Lk", "D"};
  const int64_t *sizes = args.sizes, P = args.prefix_length;
  for (int i = 0; i < 6; ++i)
    c->expect(sizes[i] >= 0 && sizes[i] <= kMaxSize, "%s must be 0 to 2^40, got %" PRId64 ".",
              kNames[i], sizes[i]);
  c->expect(P >= 0 && P <= kMaxSize, "prefix_length must be 0 to 2^40, got %" PRId64 ".", P);
  if (c->status() != DELTAOPS_OK) return false;
  const int64_t H = sizes[1], Hkv = sizes[2], Lq = sizes[3], Lk = sizes[4], D = sizes[5];
  c->expect(D >= 1, "D must be at least 1, got %" PRId64 ".", D);
  c->expect(Hkv > 0 ? H % Hkv == 0 : H == 0,
            "H must be a multiple of Hkv, got H=%" PRId64 ", Hkv=%" PRId64
            ". Heads of keys are shared by equally many heads of queries.",
            H, Hkv);
  // Past this a thread's scratch memory could not be counted; it is 256 GiB then.
  const int64_t group = Hkv > 0 ? H / Hkv : 1;
  c->expect(bounded(bounded(Lq + 1, group) + P + Lk, D) <= kMostScratch,
            "(Lq H / Hkv + P + Lk) D must be at most 2^36, got Lq=%" PRId64 ", P=%" PRId64
            ", Lk=%" PRId64 ", D=%" PRId64 ". Cut the sequences.",
            Lq, P, Lk, D);
  c->expect(bounded(bounded(Hkv, P), D) <= kMostScratch,
            "Hkv P D must be at most 2^36, got Hkv=%" PRId64 ", P=%" PRId64 ", D=%" PRId64
            ". Shorten the prefix.",
            Hkv, P, D);
  int64_t all = 1;
  for (const int64_t size : {sizes[0], H, Lq, P + Lk, D})
    c->expect(c->status() != DELTAOPS_OK ||
                  (!__builtin_mul_overflow(all, size + 1, &all) && all <= kMaxWork),
              "the sizes must stay below 2^56 multiply-adds, got B=%" PRId64 ", H=%" PRId64
              ", Lq=%" PRId64 ", P + Lk=%" PRId64 ", D=%" PRId64 ". Cut the batch.",
              sizes[0], H, Lq, P + Lk, D);
  float_or_bf16(c, "dtype", args.dtype);
  float_or_bf16(c, "prefix_dtype", args.prefix_dtype);
  c->expect(args.causal == 0 || args.causal == 1, "causal must be 0 or 1, got %d.", args.causal);
  c->expect(args.causal != 1 || Lq == Lk,
            "causal needs as many queries as keys, got Lq=%" PRId64 ", Lk=%" PRId64
            ". Pass a mask that says which query sees which key.",
            Lq, Lk);
  return c->status() == DELTAOPS_OK;
}

// A prefix's keys or values, or their gradient: heads of one sequence, whatever their batch stride.
template <class Args>
void prefix(Checker *c, const char *name, const deltaops_heads &heads, const Args &args,
            bool written) {
  if (args.prefix_length == 0 || (written && heads.data == nullptr)) return;
  const int64_t strides[] = {0, heads.strides[1], heads.strides[2]};
  const int64_t element = args.prefix_dtype == DELTAOPS_BF16 ? 2 : 4;
  Heads{name, heads.data, {1, args.sizes[2], args.prefix_length, args.sizes[5]}, strides, element}
      .memory(c, written);
}

// A number for each pair of query and one of `keys`, or NULL.
void pairs(Checker *c, const char *name, const void *data, const int64_t *sizes, int64_t keys,
           const int64_t *strides, int64_t element) {
  if (c->status() != DELTAOPS_OK || data == nullptr) return;
  c->pointer(name, data, static_cast<size_t>(element));
  c->expect(strides[3] == 0 || strides[3] == 1,
            "%s must have stride 1 along the keys, or 0, got %" PRId64 ". Make it contiguous.",
            name, strides[3]);
  Level levels[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t size = sizes[i == 0 ? 0 : i == 1 ? 1 : 3];
    reach(c, name, size, strides[i], element);
    if (c->status() != DELTAOPS_OK) return;
    levels[i] = {size, strides[i] * element};
  }
  remember(c, name, data, levels, 3, element * (strides[3] == 0 && keys > 0 ? 1 : keys), false);
}

template <class Args>
void operands(Checker *c, const Args &args) {
  const int64_t B = args.sizes[0], H = args.sizes[1], Hkv = args.sizes[2], Lq = args.sizes[3],
                Lk = args.sizes[4], D = args.sizes[5];
  const int64_t element = args.dtype == DELTAOPS_BF16 ? 2 : 4;
  Heads{"q", args.q.data, {B, H, Lq, D}, args.q.strides, element}.memory(c, false);
  Heads{"k", args.k.data, {B, Hkv, Lk, D}, args.k.strides, element}.memory(c, false);
  Heads{"v", args.v.data, {B, Hkv, Lk, D}, args.v.strides, element}.memory(c, false);
  prefix(c, "prefix_k", args.prefix_k, args, false);
  prefix(c, "prefix_v", args.prefix_v, args, false);
  pairs(c, "mask", args.mask, args.sizes, Lk, args.mask_strides, 1);
  if (args.bias == nullptr) return;
  const int64_t P = args.prefix_length, from = args.bias_from;
  c->expect(from == 0 || from == P,
            "bias_from must be 0 or the prefix's length, %" PRId64 ", got %" PRId64 ".", P, from);
  pairs(c, "bias", args.bias, args.sizes, P + Lk - from, args.bias_strides, sizeof(float));
}

void statistics(Checker *c, const float *lse, const int64_t *sizes, bool written) {
  const int64_t count = sizes[0] * sizes[1] * sizes[3];
  if (count > 0 && c->status() == DELTAOPS_OK) c->array("lse", lse, count, written);
}

// What turns q and k; NULL where nothing does.
template <class Args>
bool tables_fit(Checker *c, const Args &args, const RotaryTables *tables) {
  if (tables == nullptr) return true;
  const int64_t B = args.sizes[0], H = args.sizes[1], L = args.sizes[3], D = args.sizes[5];
  c->expect(L == args.sizes[4],
            "tables need as many queries as keys, got Lq=%" PRId64 ", Lk=%" PRId64
            ". Turn both by rotary and call attention.",
            L, args.sizes[4]);
  c->expect(D % 2 == 0, "D must be even to be turned, got %" PRId64 ".", D);
  c->expect(tables->dtype == DELTAOPS_F32 || tables->dtype == args.dtype,
            "tables' dtype must be 0 (f32) or that of q, %d, got %d. Convert cos and sin.",
            args.dtype, tables->dtype);
  c->expect(tables->reserved == 0, "tables' reserved must be 0, got %d. Zero the struct first.",
            tables->reserved);
  if (c->status() == DELTAOPS_OK)
    angles(c, tables->cos, tables->sin, tables->strides, tables->dtype, B, L, D, H > 0);
  return c->status() == DELTAOPS_OK;
}

deltaops_status check_forward(Checker &c, const AttentionForwardArgs *args,
                              const RotaryTables *tables) {
  if (!c.header(args) || !sizes_fit(&c, *args) || !tables_fit(&c, *args, tables)) return c.status();
  const int64_t B = args->sizes[0], H = args->sizes[1], Lq = args->sizes[3], D = args->sizes[5];
  const int64_t element = args->dtype == DELTAOPS_BF16 ? 2 : 4;
  operands(&c, *args);
  Heads{"y", args->y.data, {B, H, Lq, D}, args->y.strides, element}.memory(&c, true);
  if (args->lse != nullptr) statistics(&c, args->lse, args->sizes, true);
  return c.disjoint();
}

deltaops_status check_backward(Checker &c, const AttentionBackwardArgs *args,
                               const RotaryTables *tables) {
  if (!c.header(args) || !sizes_fit(&c, *args) || !tables_fit(&c, *args, tables)) return c.status();
  const int64_t B = args->sizes[0], H = args->sizes[1], Hkv = args->sizes[2], Lq = args->sizes[3],
                Lk = args->sizes[4], D = args->sizes[5];
  const int64_t element = args->dtype == DELTAOPS_BF16 ? 2 : 4;
  Heads{"grad_y", args->grad_y.data, {B, H, Lq, D}, args->grad_y.strides, element}.memory(&c,
                                                                                          false);
  operands(&c, *args);
  Heads{"y", args->y.data, {B, H, Lq, D}, args->y.strides, element}.memory(&c, false);
  statistics(&c, args->lse, args->sizes, false);
  if (args->grad_q.data != nullptr)
    Heads{"grad_q", args->grad_q.data, {B, H, Lq, D}, args->grad_q.strides, element}.memory(&c,
                                                                                            true);
  if (args->grad_k.data != nullptr)
    Heads{"grad_k", args->grad_k.data, {B, Hkv, Lk, D}, args->grad_k.strides, element}.memory(&c,
                                                                                              true);
  if (args->grad_v.data != nullptr)
    Heads{"grad_v", args->grad_v.data, {B, Hkv, Lk, D}, args->grad_v.strides, element}.memory(&c,
                                                                                              true);
  prefix(&c, "grad_prefix_k", args->grad_prefix_k, *args, true);
  prefix(&c, "grad_prefix_v", args->grad_prefix_v, *args, true);
  return c.disjoint();
}

}  // namespace

deltaops_status check(const AttentionForwardArgs *args) {
  Checker c("attention_forward");
  return check_forward(c, args, nullptr);
}

deltaops_status check(const AttentionForwardArgs *args, const RotaryTables *tables) {
  Checker c("rotary_attention_forward");
  c.expect(tables != nullptr, "tables must not be NULL. Call attention_forward without any.");
  c.pointer("tables", tables, alignof(RotaryTables));
  return c.status() == DELTAOPS_OK ? check_forward(c, args, tables) : c.status();
}

deltaops_status check(const AttentionBackwardArgs *args) {
  Checker c("attention_backward");
  return check_backward(c, args, nullptr);
}

deltaops_status check(const AttentionBackwardArgs *args, const RotaryTables *tables) {
  Checker c("rotary_attention_backward");
  c.expect(tables != nullptr, "tables must not be NULL. Call attention_backward without any.");
  c.pointer("tables", tables, alignof(RotaryTables));
  return c.status() == DELTAOPS_OK ? check_backward(c, args, tables) : c.status();
}

}  // namespace deltaops
