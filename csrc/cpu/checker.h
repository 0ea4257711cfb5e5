/* checker.h: what the checks of every op are made of. For checks*.cpp alone: it is no ISA file's.
 *
 * A sentence says subject, expectation, fact and remedy; the first one stays. Each matrix that is
 * checked is remembered with whether it is read or written, so that disjoint() can end the checks
 * of an op: whatever is written lies apart from everything else.
 */
#ifndef DELTAOPS_CPU_CHECKER_H
#define DELTAOPS_CPU_CHECKER_H

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core.h"

namespace deltaops {

constexpr int64_t kMaxSize = int64_t{1} << 40;   // of a dimension
constexpr int64_t kMaxBytes = int64_t{1} << 56;  // from a matrix's first element to its last
constexpr int64_t kMaxWork = int64_t{1} << 56;   // multiply-adds: weeks, on any machine

inline bool aligned(const void *pointer, size_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

inline int64_t element_size(const deltaops_matrix &m) { return m.dtype == DELTAOPS_BF16 ? 2 : 4; }

/* Bytes from the first element of a dimension to one past its last; -1 beyond kMaxBytes. One
 * stride counts even where the dimension is empty: loops step over it before they end. */
inline int64_t extent(int64_t count, int64_t stride, int64_t size) {
  int64_t bytes = 0;
  if (stride == INT64_MIN ||
      __builtin_mul_overflow(count > 1 ? count : 1, std::llabs(stride), &bytes) ||
      __builtin_mul_overflow(bytes, size, &bytes))
    return -1;
  return bytes <= kMaxBytes ? bytes : -1;
}

/* The bytes of a matrix: `runs` runs of `width` bytes, the starts `stride` apart; one where they
 * leave no gap. */
struct Footprint {
  uintptr_t begin;
  int64_t runs, width, stride;
  bool written;
  char name[64];

  uintptr_t end() const { return begin + static_cast<uintptr_t>((runs - 1) * stride + width); }

  /* Whether a run meets the bytes from ... to - 1. */
  bool meets(uintptr_t from, uintptr_t to) const {
    if (to <= begin || from >= end()) return false;
    // The first run that ends after `from`: the others lie before it, or start later.
    const int64_t ahead = from > begin ? static_cast<int64_t>(from - begin) : 0;
    const int64_t run = ahead < width ? 0 : (ahead - width) / stride + 1;
    return begin + static_cast<uintptr_t>(run * stride) < to;
  }

  /* Exact, gaps included: columns of one buffer interleave without harm. */
  bool meets(const Footprint &other) const {
    if (other.runs > runs) return other.meets(*this);
    for (int64_t i = 0; i < other.runs; ++i) {
      const uintptr_t from = other.begin + static_cast<uintptr_t>(i * other.stride);
      if (meets(from, from + static_cast<uintptr_t>(other.width))) return true;
    }
    return false;
  }
};

/* One call's checks: the first sentence stays. */
class Checker {
 public:
  explicit Checker(const char *op) : op_(op) {}
  ~Checker() {
    if (seen_ != few_) std::free(seen_);
  }
  Checker(const Checker &) = delete;
  Checker &operator=(const Checker &) = delete;

  deltaops_status status() const { return status_; }

  __attribute__((format(printf, 3, 4))) void expect(bool holds, const char *format, ...) {
    if (holds || status_ != DELTAOPS_OK) return;
    char text[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (layer_ < 0)
      status_ = fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s", op_, text);
    else
      status_ = fail(DELTAOPS_INVALID_ARGUMENT, "%s: layers[%d]: %s", op_, layer_, text);
  }

  /* What follows is of layer `i` of a group; -1: of all. */
  void layer(int32_t i) { layer_ = i; }

  /* The struct itself; true where its fields may be looked at. One of another size may end before
   * they do. */
  template <class Args>
  bool header(const Args *args) {
    expect(args != nullptr, "args must not be NULL.");
    pointer("args", args, alignof(Args));
    if (status_ != DELTAOPS_OK) return false;
    expect(args->struct_size == sizeof *args,
           "struct_size must be %zu, got %u. Build against the deltaops.h of this library.",
           sizeof *args, args->struct_size);
    if (status_ != DELTAOPS_OK) return false;
    expect(args->num_threads >= 1 && args->num_threads <= kMaxThreads,
           "num_threads must be 1 to %d, got %d. Pass the number of cores to use.", kMaxThreads,
           args->num_threads);
    return status_ == DELTAOPS_OK;
  }

  void pointer(const char *name, const void *data, size_t alignment) {
    expect(aligned(data, alignment),
           "%s must be aligned to %zu bytes, got the address %p. Copy it to aligned memory.", name,
           alignment, data);
  }

  /* An array beside the matrices: `count` of T, at least one of them needed. */
  template <class T>
  void array(const char *name, const T *data, int64_t count, bool written) {
    if (status_ != DELTAOPS_OK) return;  // count may be any number
    expect(data != nullptr, "%s must point to its elements, got NULL.", name);
    pointer(name, data, sizeof(T));
    remember(name, data, 1, count * static_cast<int64_t>(sizeof(T)), 0, written);
  }

  /* Bounds the whole op: every count that a body makes of its sizes stays inside int64. */
  void work(int64_t M, int64_t N, int64_t K, int64_t R) {
    int64_t wide = 0, narrow = 0;
    if (status_ != DELTAOPS_OK) return;
    expect(!__builtin_mul_overflow(M + 1, N + R + 1, &wide) &&
               !__builtin_mul_overflow(wide, K + 1, &wide) && wide <= kMaxWork &&
               !__builtin_mul_overflow(M + 1, N + 1, &narrow) &&
               !__builtin_mul_overflow(narrow, R + 1, &narrow) && narrow <= kMaxWork,
           "the sizes must stay below 2^56 multiply-adds, got M=%" PRId64 ", N=%" PRId64
           ", K=%" PRId64 " and ranks of %" PRId64 ". Cut the batch.",
           M, N, K, R);
  }

  /* Rows of neighbouring elements: activations and their gradients. */
  void rows_of(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
               int64_t cols, int dtype) {
    rows_of(name, m, shape, rows, cols, dtype, false);
  }

  /* The same, written. */
  void output(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
              int64_t cols, int dtype) {
    rows_of(name, m, shape, rows, cols, dtype, true);
    expect(rows <= 1 || m.row_stride >= cols,
           "%s is written, so its rows must not overlap: row_stride must be at least %" PRId64
           ", got %" PRId64 ".",
           name, cols, m.row_stride);
  }

  /* Contiguous, and written. */
  void dense_output(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
                    int64_t cols, int dtype) {
    output(name, m, shape, rows, cols, dtype);
    dense(name, m, rows, cols);
  }

  void dense(const char *name, const deltaops_matrix &m, int64_t rows, int64_t cols) {
    expect(rows <= 1 || m.row_stride == cols,
           "%s must be contiguous: row_stride %" PRId64 ", got %" PRId64 ".", name, cols,
           m.row_stride);
  }

  /* Weights and adapters: rows or columns of neighbouring elements. */
  void operand(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
               int64_t cols, int dtype) {
    matrix(name, m, shape, rows, cols, dtype, false);
    expect(cols <= 1 || rows <= 1 || m.col_stride == 1 || m.row_stride == 1,
           "%s must have a unit stride, got strides (%" PRId64 ", %" PRId64
           "). Make it contiguous first.",
           name, m.row_stride, m.col_stride);
  }

  /* Memory that is read, or written, besides. */
  void remember(const char *name, const void *data, int64_t runs, int64_t width, int64_t stride,
                bool written) {
    if (status_ != DELTAOPS_OK || data == nullptr || runs <= 0 || width <= 0) return;
    if (count_ == room_ && !grow()) return;
    auto begin = reinterpret_cast<uintptr_t>(data);
    if (stride < 0) {
      begin += static_cast<uintptr_t>((runs - 1) * stride);
      stride = -stride;
    }
    if (stride <= width) width += (runs - 1) * stride, runs = 1;
    Footprint &at = seen_[count_++];
    at = {begin, runs, width, stride, written, {}};
    // Copied by hand where there is no number: snprintf takes as long as a small layer's product.
    if (layer_ < 0)
      std::memcpy(at.name, name, ::strnlen(name, sizeof at.name - 1));
    else
      std::snprintf(at.name, sizeof at.name, "layers[%d].%.*s", layer_,
                    static_cast<int>(sizeof at.name) - 22, name);
  }

  /* The last check: nothing that is written overlaps what else was seen. */
  deltaops_status disjoint() {
    if (status_ != DELTAOPS_OK) return status_;
    std::sort(seen_, seen_ + count_,
              [](const Footprint &a, const Footprint &b) { return a.begin < b.begin; });
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t j = i + 1; j < count_ && seen_[j].begin < seen_[i].end(); ++j) {
        const Footprint *one = &seen_[i], *two = &seen_[j];
        if (!one->written && !two->written) continue;
        if (!one->written) std::swap(one, two);
        expect(!one->meets(*two),
               "%s is written, so it must not overlap %s. Give it memory of its own.", one->name,
               two->name);
        if (status_ != DELTAOPS_OK) return status_;
      }
    return status_;
  }

 private:
  /* Shape, type and memory of any matrix. */
  void matrix(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
              int64_t cols, int dtype, bool written) {
    expect(m.dtype == DELTAOPS_F32 || m.dtype == DELTAOPS_BF16,
           "%s must have dtype 0 (f32) or 1 (bf16), got %d.", name, m.dtype);
    expect(dtype < 0 || m.dtype == dtype, "%s must be %s, got %s. Convert it first.", name,
           dtype == DELTAOPS_BF16 ? "bf16" : "f32", m.dtype == DELTAOPS_BF16 ? "bf16" : "f32");
    expect(m.rows == rows && m.cols == cols,
           "%s must be %s = [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "].", name,
           shape, rows, cols, m.rows, m.cols);
    expect(rows >= 0 && cols >= 0 && rows <= kMaxSize && cols <= kMaxSize,
           "%s must have sizes from 0 to 2^40, got [%" PRId64 ", %" PRId64 "].", name, rows, cols);
    expect(m.reserved == 0, "%s.reserved must be 0, got %d. Zero the struct first.", name,
           m.reserved);
    if (status_ != DELTAOPS_OK) return;
    expect(m.data != nullptr || rows == 0 || cols == 0,
           "%s must point to its elements, got NULL for [%" PRId64 ", %" PRId64 "].", name, rows,
           cols);
    const int64_t size = element_size(m);
    pointer(name, m.data, static_cast<size_t>(size));
    const int64_t down = extent(rows, m.row_stride, size),
                  across = extent(cols, m.col_stride, size);
    expect(down >= 0 && across >= 0 && down + across <= kMaxBytes,
           "%s must span at most 2^56 bytes, got [%" PRId64 ", %" PRId64 "] with strides (%" PRId64
           ", %" PRId64 ").",
           name, rows, cols, m.row_stride, m.col_stride);
    if (status_ != DELTAOPS_OK || rows == 0 || cols == 0) return;
    if (cols == 1 || m.col_stride == 1)
      remember(name, m.data, rows, cols * size, m.row_stride * size, written);
    else
      remember(name, m.data, cols, rows * size, m.col_stride * size, written);
  }

  void rows_of(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
               int64_t cols, int dtype, bool written) {
    matrix(name, m, shape, rows, cols, dtype, written);
    expect(rows == 0 || cols <= 1 || m.col_stride == 1,
           "%s must have col_stride 1, got %" PRId64 ". Make it contiguous first.", name,
           m.col_stride);
  }

  bool grow() {
    const auto bytes = static_cast<size_t>(2 * room_) * sizeof(Footprint);
    auto *more = static_cast<Footprint *>(std::malloc(bytes));
    if (more == nullptr) {
      status_ = fail(DELTAOPS_OUT_OF_MEMORY, "%s: the checks need %zu bytes, which were refused.",
                     op_, bytes);
      return false;
    }
    std::memcpy(more, seen_, static_cast<size_t>(count_) * sizeof(Footprint));
    if (seen_ != few_) std::free(seen_);
    seen_ = more;
    room_ *= 2;
    return true;
  }

  const char *op_;
  int32_t layer_ = -1;
  deltaops_status status_ = DELTAOPS_OK;
  Footprint few_[32];
  Footprint *seen_ = few_;
  int64_t count_ = 0, room_ = 32;
};

}  // namespace deltaops
#endif
