// checks.cpp: every argument of the C ABI, before the first store.
//
// A sentence says subject, expectation, fact and remedy. After these checks a body may trust its
// arguments: shapes agree, one stride of a weight or adapter is 1, outputs do not overlap
// themselves.

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "core.h"

namespace deltaops {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 40;  // of a dimension: products stay far from overflow
constexpr int32_t kMaxThreads = 1024;

// One call's checks: the first sentence stays.
class Checker {
 public:
  explicit Checker(const char *op) : op_(op) {}

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

  void common(uint32_t struct_size, size_t expected, int32_t threads, const void *branches,
              int32_t num_branches) {
    expect(struct_size == expected,
           "struct_size must be %zu, got %u. Build against the deltaops.h of this library.",
           expected, struct_size);
    expect(threads >= 1 && threads <= kMaxThreads,
           "num_threads must be 1 to %d, got %d. Pass the number of cores to use.", kMaxThreads,
           threads);
    expect(num_branches >= 0 && (num_branches == 0 || branches != nullptr),
           "branches must point to num_branches branches, got num_branches=%d and %s.",
           num_branches, branches ? "a pointer" : "NULL");
  }

  // Shape, type and memory of any matrix.
  void matrix(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
              int64_t cols, int dtype) {
    expect(m.dtype == DELTAOPS_F32 || m.dtype == DELTAOPS_BF16,
           "%s must have dtype 0 (f32) or 1 (bf16), got %d.", name, m.dtype);
    expect(dtype < 0 || m.dtype == dtype, "%s must be %s, got %s. Convert it first.", name,
           dtype == DELTAOPS_BF16 ? "bf16" : "f32", m.dtype == DELTAOPS_BF16 ? "bf16" : "f32");
    expect(m.rows == rows && m.cols == cols,
           "%s must be %s = [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "].", name,
           shape, rows, cols, m.rows, m.cols);
    expect(rows >= 0 && cols >= 0 && rows <= kMaxSize && cols <= kMaxSize,
           "%s must have sizes from 0 to 2^40, got [%" PRId64 ", %" PRId64 "].", name, rows, cols);
    expect(m.data != nullptr || rows == 0 || cols == 0,
           "%s must point to its elements, got NULL for [%" PRId64 ", %" PRId64 "].", name, rows,
           cols);
    expect(m.reserved == 0, "%s.reserved must be 0, got %d. Zero the struct first.", name,
           m.reserved);
  }

  // Rows of neighbouring elements: activations and their gradients.
  void rows_of(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
               int64_t cols, int dtype) {
    matrix(name, m, shape, rows, cols, dtype);
    expect(rows == 0 || cols <= 1 || m.col_stride == 1,
           "%s must have col_stride 1, got %" PRId64 ". Make it contiguous first.", name,
           m.col_stride);
  }

  void output(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
              int64_t cols, int dtype) {
    rows_of(name, m, shape, rows, cols, dtype);
    expect(rows <= 1 || m.row_stride >= cols,
           "%s is written, so its rows must not overlap: row_stride must be at least %" PRId64
           ", got %" PRId64 ".",
           name, cols, m.row_stride);
  }

  // Weights and adapters: rows or columns of neighbouring elements.
  void operand(const char *name, const deltaops_matrix &m, const char *shape, int64_t rows,
               int64_t cols, int dtype) {
    matrix(name, m, shape, rows, cols, dtype);
    expect(cols <= 1 || rows <= 1 || m.col_stride == 1 || m.row_stride == 1,
           "%s must have a unit stride, got strides (%" PRId64 ", %" PRId64
           "). Make it contiguous first.",
           name, m.row_stride, m.col_stride);
  }

  // Returns the sum of the ranks.
  int64_t branches(const deltaops_branch *branches, int32_t count, int64_t N, int64_t K) {
    int64_t ranks = 0;
    for (int32_t i = 0; i < count && status_ == DELTAOPS_OK; ++i) {
      const deltaops_branch &branch = branches[i];
      char a[32], b[32];
      std::snprintf(a, sizeof a, "branches[%d].a", i);
      std::snprintf(b, sizeof b, "branches[%d].b", i);
      const int64_t rank = branch.a.rows;
      expect(rank >= 1, "%s must be [R, K] with R at least 1, got R=%" PRId64 ".", a, rank);
      operand(a, branch.a, "[R, K]", rank, K, -1);
      operand(b, branch.b, "[N, R] with R from a", N, rank, branch.a.dtype);
      expect(branch.drop_threshold <= 65536,
             "branches[%d].drop_threshold must be 0 to 65536 (p * 65536), got %u.", i,
             branch.drop_threshold);
      expect(branch.reserved == 0,
             "branches[%d].reserved must be 0, got %u. Zero the struct first.", i, branch.reserved);
      ranks += rank;
    }
    return ranks;
  }

 private:
  const char *op_;
  deltaops_status status_ = DELTAOPS_OK;
};

}  // namespace

deltaops_status check(const ForwardArgs *args) {
  Checker c("delta_linear_forward");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "delta_linear_forward: args must not be NULL.");
  c.common(args->struct_size, sizeof *args, args->num_threads, args->branches, args->num_branches);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->x.rows, K = args->x.cols, N = args->weight.rows;
  const int dtype = args->x.dtype;
  c.rows_of("x", args->x, "[M, K]", M, K, -1);
  c.operand("weight", args->weight, "[N, K] with K from x", N, K, dtype);
  if (args->bias.data) c.rows_of("bias", args->bias, "[1, N] with N from weight", 1, N, dtype);
  c.output("y", args->y, "[M, N]", M, N, dtype);
  const int64_t R = c.branches(args->branches, args->num_branches, N, K);
  if (args->s.data)
    c.output("s", args->s, "[M, R] with R the sum of the ranks", M, R, DELTAOPS_F32);
  return c.status();
}

deltaops_status check(const BackwardArgs *args) {
  Checker c("delta_linear_backward");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "delta_linear_backward: args must not be NULL.");
  c.common(args->struct_size, sizeof *args, args->num_threads, args->branches, args->num_branches);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->grad_y.rows, N = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.rows_of("grad_y", args->grad_y, "[M, N]", M, N, -1);

  // K comes from whoever is there.
  int64_t K = 0;
  if (args->grad_x.data)
    K = args->grad_x.cols;
  else if (args->num_branches > 0)
    K = args->branches[0].a.cols;
  const int64_t R = c.branches(args->branches, args->num_branches, N, K);

  if (args->grad_x.data) {
    c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
    c.operand("weight (needed for grad_x)", args->weight, "[N, K]", N, K, dtype);
  }
  if (args->grad_bias.data) c.output("grad_bias", args->grad_bias, "[1, N]", 1, N, -1);
  bool any_a = false, any_b = false;
  for (int32_t i = 0; i < args->num_branches && c.status() == DELTAOPS_OK; ++i) {
    char name[32];
    const int64_t rank = args->branches[i].a.rows;
    if (args->grad_a && args->grad_a[i].data) {
      std::snprintf(name, sizeof name, "grad_a[%d]", i);
      c.output(name, args->grad_a[i], "[R, K]", rank, K, -1);
      c.expect(rank <= 1 || args->grad_a[i].row_stride == K, "%s must be contiguous.", name);
      any_a = true;
    }
    if (args->grad_b && args->grad_b[i].data) {
      std::snprintf(name, sizeof name, "grad_b[%d]", i);
      c.output(name, args->grad_b[i], "[N, R]", N, rank, -1);
      c.expect(N <= 1 || args->grad_b[i].row_stride == rank, "%s must be contiguous.", name);
      any_b = true;
    }
  }
  if (any_a) c.rows_of("x (needed for grad_a)", args->x, "[M, K]", M, K, dtype);
  if (any_b)
    c.rows_of("s (needed for grad_b)", args->s, "[M, R] with R the sum of the ranks", M, R,
              DELTAOPS_F32);
  return c.status();
}

// -------------------------------------------------------------------- bottleneck and norm_bias

namespace {

void parameter(Checker *c, const char *name, const deltaops_matrix &m, const char *shape,
               int64_t rows, int64_t cols) {
  if (m.data == nullptr && rows == 1) return;  // a vector may be absent
  c->rows_of(name, m, shape, rows, cols, -1);
  c->expect(rows <= 1 || m.row_stride == cols, "%s must be contiguous, got row_stride %" PRId64 ".",
            name, m.row_stride);
}

void gradient(Checker *c, const char *name, const deltaops_matrix &m, const char *shape,
              int64_t rows, int64_t cols) {
  if (m.data) parameter(c, name, m, shape, rows, cols);
}

void norm_kind(Checker *c, int32_t norm, bool optional) {
  c->expect(
      norm >= (optional ? DELTAOPS_NO_NORM : DELTAOPS_LAYER_NORM) && norm <= DELTAOPS_RMS_NORM,
      "norm must be %s1 (LayerNorm) or 2 (RMSNorm), got %d.", optional ? "0 (none), " : "", norm);
}

void statistics(Checker *c, const deltaops_matrix &m, int64_t M) {
  c->output("stats", m, "[M, 2]", M, 2, DELTAOPS_F32);
}

void activation_kind(Checker *c, int32_t activation) {
  c->expect(activation >= DELTAOPS_IDENTITY && activation <= DELTAOPS_SILU,
            "activation must be 0 (identity) to 4 (silu), got %d.", activation);
}

}  // namespace

deltaops_status check(const BottleneckForwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "bottleneck_forward: args must not be NULL.");
  Checker c("bottleneck_forward");
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->x.rows, K = args->x.cols, R = args->down.rows;
  const int dtype = args->x.dtype;
  c.expect(K >= 1 && R >= 1, "K and R must be at least 1, got K=%" PRId64 ", R=%" PRId64 ".", K, R);
  norm_kind(&c, args->norm, true);
  activation_kind(&c, args->activation);
  c.rows_of("x", args->x, "[M, K]", M, K, -1);
  if (args->residual.data) c.rows_of("residual", args->residual, "[M, K]", M, K, dtype);
  parameter(&c, "gamma", args->gamma, "[1, K]", 1, K);
  parameter(&c, "beta", args->beta, "[1, K]", 1, K);
  c.operand("down", args->down, "[R, K]", R, K, -1);
  parameter(&c, "down_bias", args->down_bias, "[1, R]", 1, R);
  c.operand("up", args->up, "[K, R] with R from down", K, R, -1);
  parameter(&c, "up_bias", args->up_bias, "[1, K]", 1, K);
  c.output("y", args->y, "[M, K]", M, K, dtype);
  if (args->h.data) c.output("h", args->h, "[M, R]", M, R, DELTAOPS_F32);
  if (args->stats.data && args->norm != DELTAOPS_NO_NORM) statistics(&c, args->stats, M);
  return c.status();
}

deltaops_status check(const BottleneckBackwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "bottleneck_backward: args must not be NULL.");
  Checker c("bottleneck_backward");
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols, R = args->down.rows;
  const int dtype = args->grad_y.dtype;
  const bool norm = args->norm != DELTAOPS_NO_NORM;
  c.expect(K >= 1 && R >= 1, "K and R must be at least 1, got K=%" PRId64 ", R=%" PRId64 ".", K, R);
  norm_kind(&c, args->norm, true);
  activation_kind(&c, args->activation);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  const bool past_norm =
      norm && (args->grad_x.data || args->grad_gamma.data || args->grad_beta.data);
  if (args->grad_down.data || past_norm) {
    c.rows_of("x (needed for grad_down and past a norm)", args->x, "[M, K]", M, K, dtype);
    if (norm) statistics(&c, args->stats, M);
  }
  c.expect(norm || (!args->grad_gamma.data && !args->grad_beta.data),
           "grad_gamma and grad_beta must be absent without a norm.");
  c.rows_of("h", args->h, "[M, R]", M, R, DELTAOPS_F32);
  parameter(&c, "gamma", args->gamma, "[1, K]", 1, K);
  parameter(&c, "beta", args->beta, "[1, K]", 1, K);
  c.operand("down", args->down, "[R, K]", R, K, -1);
  c.operand("up", args->up, "[K, R] with R from down", K, R, -1);
  if (args->grad_x.data) c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
  gradient(&c, "grad_gamma", args->grad_gamma, "[1, K]", 1, K);
  gradient(&c, "grad_beta", args->grad_beta, "[1, K]", 1, K);
  gradient(&c, "grad_down", args->grad_down, "[R, K]", R, K);
  gradient(&c, "grad_down_bias", args->grad_down_bias, "[1, R]", 1, R);
  gradient(&c, "grad_up", args->grad_up, "[K, R]", K, R);
  gradient(&c, "grad_up_bias", args->grad_up_bias, "[1, K]", 1, K);
  return c.status();
}

deltaops_status check(const NormBiasForwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "norm_bias_forward: args must not be NULL.");
  Checker c("norm_bias_forward");
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->x.rows, K = args->x.cols;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  norm_kind(&c, args->norm, false);
  c.rows_of("x", args->x, "[M, K]", M, K, -1);
  parameter(&c, "gamma", args->gamma, "[1, K]", 1, K);
  parameter(&c, "bias", args->bias, "[1, K]", 1, K);
  c.output("y", args->y, "[M, K]", M, K, args->x.dtype);
  if (args->stats.data) statistics(&c, args->stats, M);
  return c.status();
}

deltaops_status check(const NormBiasBackwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "norm_bias_backward: args must not be NULL.");
  Checker c("norm_bias_backward");
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  norm_kind(&c, args->norm, false);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  if (args->grad_x.data || args->grad_gamma.data) {
    c.rows_of("x (needed for grad_x and grad_gamma)", args->x, "[M, K]", M, K, dtype);
    statistics(&c, args->stats, M);
  }
  parameter(&c, "gamma", args->gamma, "[1, K]", 1, K);
  if (args->grad_x.data) c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
  gradient(&c, "grad_gamma", args->grad_gamma, "[1, K]", 1, K);
  gradient(&c, "grad_bias", args->grad_bias, "[1, K]", 1, K);
  return c.status();
}

}  // namespace deltaops
