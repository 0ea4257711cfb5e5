// checks_cross_entropy.cpp: the arguments of cross_entropy, targets included, before any store.

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "core.h"

namespace deltaops {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 40, kMaxElements = int64_t{1} << 50;
constexpr int32_t kMaxThreads = 1024;

// One call's checks: the first sentence stays.
class CrossEntropyChecker {
 public:
  explicit CrossEntropyChecker(const char *op) : op_(op) {}

  deltaops_status status() const { return status_; }

  __attribute__((format(printf, 3, 4))) void expect(bool holds, const char *format, ...) {
    if (holds || status_ != DELTAOPS_OK) return;
    char text[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    status_ = fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s", op_, text);
  }

  void pointer(const char *name, const void *data, size_t size) {
    expect(data != nullptr && reinterpret_cast<uintptr_t>(data) % size == 0,
           "%s must point to memory aligned to %zu bytes, got %p.", name, size, data);
  }

  // [rows, cols] with neighbouring elements in a row; rows that are written must not overlap.
  void matrix(const char *name, const deltaops_matrix &m, int64_t rows, int64_t cols, int32_t dtype,
              bool written) {
    expect(m.dtype == dtype, "%s must have dtype %d, got %d.", name, dtype, m.dtype);
    expect(m.reserved == 0, "%s.reserved must be 0, got %d. Zero the struct first.", name,
           m.reserved);
    expect(m.rows == rows && m.cols == cols,
           "%s must be [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "].", name, rows,
           cols, m.rows, m.cols);
    if (rows <= 0 || cols <= 0) return;
    pointer(name, m.data, dtype == DELTAOPS_BF16 ? 2 : 4);
    expect(cols == 1 || m.col_stride == 1,
           "%s must have col_stride 1, got %" PRId64 ". Make it contiguous first.", name,
           m.col_stride);
    expect(rows == 1 || !written || m.row_stride >= cols,
           "%s is written, so its rows must not overlap: row_stride must be at least %" PRId64
           ", got %" PRId64 ".",
           name, cols, m.row_stride);
    expect(
        rows == 1 || (m.row_stride <= kMaxElements / rows && m.row_stride >= -kMaxElements / rows),
        "%s must span at most 2^50 elements, got %" PRId64 " rows with row_stride %" PRId64 ".",
        name, rows, m.row_stride);
  }

  // What both directions take. Args: either of the two structs.
  template <class Args>
  void common(const Args &args) {
    expect(args.struct_size == sizeof args,
           "struct_size must be %zu, got %u. Build against the deltaops.h of this library.",
           sizeof args, args.struct_size);
    expect(args.num_threads >= 1 && args.num_threads <= kMaxThreads,
           "num_threads must be 1 to %d, got %d. Pass the number of cores to use.", kMaxThreads,
           args.num_threads);
    expect(args.reduction == DELTAOPS_SUM || args.reduction == DELTAOPS_MEAN,
           "reduction must be 0 (sum) or 1 (mean), got %d.", args.reduction);
    expect(args.reserved == 0, "reserved must be 0, got %d. Zero the struct first.", args.reserved);
    const int64_t M = args.logits.rows, V = args.logits.cols;
    expect(M >= 0 && V >= 0 && M <= kMaxSize && V <= kMaxSize && (V == 0 || M <= kMaxElements / V),
           "logits must be [M, V] with at most 2^50 elements, got [%" PRId64 ", %" PRId64 "].", M,
           V);
    expect(args.logits.dtype == DELTAOPS_F32 || args.logits.dtype == DELTAOPS_BF16,
           "logits must have dtype 0 (f32) or 1 (bf16), got %d.", args.logits.dtype);
    if (status_ != DELTAOPS_OK) return;
    matrix("logits", args.logits, M, V, args.logits.dtype, false);
    matrix("state", args.state, M, 2, DELTAOPS_F32, true);
    expect(M <= 1 || args.state.row_stride == 2,
           "state must be contiguous: row_stride 2, got %" PRId64 ".", args.state.row_stride);
    if (M > 0) pointer("target", args.target, sizeof(int64_t));
    for (int64_t m = 0; m < M && status_ == DELTAOPS_OK; ++m) {
      const int64_t target = args.target[m];
      expect((target >= 0 && target < V) || target == args.ignore_index,
             "target[%" PRId64 "] must be a class from 0 to %" PRId64 " or ignore_index=%" PRId64
             ", got %" PRId64 ". Are labels and logits of the same vocabulary?",
             m, V - 1, args.ignore_index, target);
    }
  }

 private:
  const char *op_;
  deltaops_status status_ = DELTAOPS_OK;
};

}  // namespace

deltaops_status check(const CrossEntropyForwardArgs *args) {
  CrossEntropyChecker c("cross_entropy");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "cross_entropy: args must not be NULL.");
  c.common(*args);
  if (c.status() == DELTAOPS_OK) c.pointer("loss", args->loss, sizeof(float));
  return c.status();
}

deltaops_status check(const CrossEntropyBackwardArgs *args) {
  CrossEntropyChecker c("cross_entropy_backward");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "cross_entropy_backward: args must not be NULL.");
  c.common(*args);
  if (c.status() != DELTAOPS_OK) return c.status();
  c.pointer("grad_loss", args->grad_loss, sizeof(float));
  c.matrix("grad_logits", args->grad_logits, args->logits.rows, args->logits.cols,
           args->logits.dtype, true);
  return c.status();
}

}  // namespace deltaops
