// checks.cpp: every argument of the C ABI, before the first store.
//
// A sentence says subject, expectation, fact and remedy. After these checks a body may trust its
// arguments: shapes agree, one stride of a weight or adapter is 1, pointers are aligned, outputs do
// not overlap themselves, and no size or address that an op derives from them leaves int64.

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "core.h"

namespace deltaops {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 40;   // of a dimension
constexpr int64_t kMaxBytes = int64_t{1} << 56;  // from a matrix's first element to its last
constexpr int64_t kMaxWork = int64_t{1} << 56;   // multiply-adds: weeks, on any machine
constexpr int32_t kMaxBranches = 1 << 16;

bool aligned(const void *pointer, size_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

int64_t element_size(const deltaops_matrix &m) { return m.dtype == DELTAOPS_BF16 ? 2 : 4; }

bool empty(const deltaops_matrix &m) { return m.data == nullptr || m.rows == 0 || m.cols == 0; }

// Bytes from the first element of a dimension to one past its last; -1 beyond kMaxBytes. One stride
// counts even where the dimension is empty: loops step over it before they end.
int64_t extent(int64_t count, int64_t stride, int64_t size) {
  int64_t bytes = 0;
  if (stride == INT64_MIN ||
      __builtin_mul_overflow(count > 1 ? count : 1, std::llabs(stride), &bytes) ||
      __builtin_mul_overflow(bytes, size, &bytes))
    return -1;
  return bytes <= kMaxBytes ? bytes : -1;
}

PackedHeader header_for(int64_t rows, int64_t cols, int32_t dtype, const Kernels &kernels) {
  return {kPackedMagic,
          rows,
          cols,
          dtype,
          dtype == DELTAOPS_BF16 ? kernels.unit_k_bf16 : kernels.unit_k_f32,
          kernels.panel_columns,
          {}};
}

int64_t packed_size(const PackedHeader &header) {
  const int64_t panels = (header.rows + header.panel_columns - 1) / header.panel_columns;
  const int64_t steps = (header.cols + header.unit_k - 1) / header.unit_k;
  return static_cast<int64_t>(sizeof header) + panels * steps * header.panel_columns * 4;
}

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

  void common(uint32_t struct_size, size_t expected, int32_t threads,
              const deltaops_branch *branches, int32_t num_branches, int32_t reserved) {
    expect(struct_size == expected,
           "struct_size must be %zu, got %u. Build against the deltaops.h of this library.",
           expected, struct_size);
    expect(threads >= 1 && threads <= kMaxThreads,
           "num_threads must be 1 to %d, got %d. Pass the number of cores to use.", kMaxThreads,
           threads);
    expect(num_branches >= 0 && num_branches <= kMaxBranches,
           "num_branches must be 0 to %d, got %d. Zero the struct first.", kMaxBranches,
           num_branches);
    expect(num_branches <= 0 || branches != nullptr,
           "branches must point to num_branches branches, got num_branches=%d and NULL.",
           num_branches);
    pointer("branches", branches, alignof(deltaops_branch));
    expect(reserved == 0, "reserved must be 0, got %d. Zero the struct first.", reserved);
  }

  void pointer(const char *name, const void *data, size_t alignment) {
    expect(aligned(data, alignment),
           "%s must be aligned to %zu bytes, got the address %p. Copy it to aligned memory.", name,
           alignment, data);
  }

  // Bounds the whole op: every count that a body makes of its sizes stays inside int64.
  void work(int64_t M, int64_t N, int64_t K, int64_t R) {
    int64_t all = 0;
    if (status_ != DELTAOPS_OK) return;
    expect(!__builtin_mul_overflow(M + 1, N + R + 1, &all) &&
               !__builtin_mul_overflow(all, K + 1, &all) && all <= kMaxWork,
           "the sizes must stay below 2^56 multiply-adds, got M=%" PRId64 ", N=%" PRId64
           ", K=%" PRId64 " and ranks of %" PRId64 ". Cut the batch.",
           M, N, K, R);
  }

  // An output that starts inside another matrix, or around its start. Found where both have dense
  // rows; columns of one buffer interleave without harm, and are let through.
  void apart(const char *name, const deltaops_matrix &m, const char *other_name,
             const deltaops_matrix &other) {
    if (status_ != DELTAOPS_OK || empty(m) || empty(other)) return;
    expect(!(dense(m) && dense(other) && overlap(m, other)),
           "%s is written, so it must not overlap %s. Give it memory of its own.", name,
           other_name);
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
    expect(m.reserved == 0, "%s.reserved must be 0, got %d. Zero the struct first.", name,
           m.reserved);
    if (status_ != DELTAOPS_OK) return;
    expect(m.data != nullptr || rows == 0 || cols == 0,
           "%s must point to its elements, got NULL for [%" PRId64 ", %" PRId64 "].", name, rows,
           cols);
    pointer(name, m.data, static_cast<size_t>(element_size(m)));
    const int64_t down = extent(rows, m.row_stride, element_size(m));
    const int64_t across = extent(cols, m.col_stride, element_size(m));
    expect(down >= 0 && across >= 0 && down + across <= kMaxBytes,
           "%s must span at most 2^56 bytes, got [%" PRId64 ", %" PRId64 "] with strides (%" PRId64
           ", %" PRId64 ").",
           name, rows, cols, m.row_stride, m.col_stride);
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

  // A packed weight [rows, cols], as this instruction set packs it.
  void packed(const char *name, const void *memory, int64_t bytes, int64_t rows, int64_t cols,
              int32_t dtype, const Kernels &kernels) {
    if (status_ != DELTAOPS_OK) return;
    expect(memory != nullptr || bytes == 0,
           "%s must not be NULL with packed_bytes=%" PRId64 ". Pass 0 for no packed weight.", name,
           bytes);
    if (memory == nullptr) return;
    pointer(name, memory, alignof(float));
    const PackedHeader wanted = header_for(rows, cols, dtype, kernels);
    expect(bytes == packed_size(wanted),
           "%s must be the %" PRId64 " bytes that deltaops_cpu_pack_weight wrote for [%" PRId64
           ", %" PRId64 "], got %" PRId64 ". Pack the weight again.",
           name, packed_size(wanted), rows, cols, bytes);
    if (status_ == DELTAOPS_OK)
      expect(std::memcmp(memory, &wanted, sizeof wanted) == 0,
             "%s was packed for another weight or instruction set than [%" PRId64 ", %" PRId64
             "] on %s. Pack it again.",
             name, rows, cols, kernels.name);
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
      if (branch.bias.data) {
        char bias[32];
        std::snprintf(bias, sizeof bias, "branches[%d].bias", i);
        rows_of(bias, branch.bias, "[1, R] with R from a", 1, rank, branch.a.dtype);
      }
      expect(branch.activation >= DELTAOPS_IDENTITY && branch.activation <= DELTAOPS_SILU,
             "branches[%d].activation must be 0 (identity) to 4 (silu), got %d.", i,
             branch.activation);
      if (status_ != DELTAOPS_OK) break;  // this rank may be any number
      ranks += rank;
      expect(ranks <= kMaxSize, "the ranks must add up to at most 2^40, got %" PRId64 ".", ranks);
    }
    return ranks;
  }

 private:
  static bool dense(const deltaops_matrix &m) {
    return (m.cols == 1 || m.col_stride == 1) && (m.rows == 1 || m.row_stride == m.cols);
  }

  static bool overlap(const deltaops_matrix &m, const deltaops_matrix &n) {
    const auto a = reinterpret_cast<uintptr_t>(m.data), b = reinterpret_cast<uintptr_t>(n.data);
    return a < b + static_cast<uintptr_t>(n.rows * n.cols * element_size(n)) &&
           b < a + static_cast<uintptr_t>(m.rows * m.cols * element_size(m));
  }

  const char *op_;
  deltaops_status status_ = DELTAOPS_OK;
};

}  // namespace

deltaops_status check(const ForwardArgs *args, const Kernels &kernels) {
  Checker c("delta_linear_forward");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "delta_linear_forward: args must not be NULL.");
  c.pointer("args", args, alignof(ForwardArgs));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, args->branches, args->num_branches,
           args->reserved);
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
  c.work(M, N, K, R);  // before the packed weight, whose size is a product of the others
  c.packed("packed_weight", args->packed_weight, args->packed_bytes, N, K, dtype, kernels);
  c.apart("y", args->y, "x", args->x);
  c.apart("y", args->y, "weight", args->weight);
  c.apart("y", args->y, "bias", args->bias);
  c.apart("y", args->y, "s", args->s);
  c.apart("s", args->s, "x", args->x);
  c.apart("s", args->s, "weight", args->weight);
  return c.status();
}

deltaops_status check(const BackwardArgs *args, const Kernels &kernels) {
  Checker c("delta_linear_backward");
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "delta_linear_backward: args must not be NULL.");
  c.pointer("args", args, alignof(BackwardArgs));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, args->branches, args->num_branches,
           args->reserved);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->grad_y.rows, N = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.rows_of("grad_y", args->grad_y, "[M, N]", M, N, -1);

  c.pointer("grad_a", args->grad_a, alignof(deltaops_matrix));
  c.pointer("grad_b", args->grad_b, alignof(deltaops_matrix));
  c.pointer("grad_branch_bias", args->grad_branch_bias, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();

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
  bool any_a = false, any_b = false, any_branch_bias = false, activated = false;
  for (int32_t i = 0; i < args->num_branches && c.status() == DELTAOPS_OK; ++i) {
    char name[32];
    activated = activated || args->branches[i].activation != DELTAOPS_IDENTITY;
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
    if (args->grad_branch_bias && args->grad_branch_bias[i].data) {
      std::snprintf(name, sizeof name, "grad_branch_bias[%d]", i);
      c.output(name, args->grad_branch_bias[i], "[1, R]", 1, rank, -1);
      any_branch_bias = true;
    }
  }
  if (any_a) c.rows_of("x (needed for grad_a)", args->x, "[M, K]", M, K, dtype);
  const bool inner = any_a || any_branch_bias || args->grad_x.data;
  const bool s_read = any_b || (activated && inner);
  if (s_read)
    c.rows_of("s (needed for grad_b, and past an activation)", args->s,
              "[M, R] with R the sum of the ranks", M, R, DELTAOPS_F32);
  c.work(M, N, K, R);
  if (args->grad_x.data)
    c.packed("packed_weight", args->packed_weight, args->packed_bytes, K, N, dtype, kernels);
  c.apart("grad_x", args->grad_x, "grad_y", args->grad_y);
  if (any_a) c.apart("grad_x", args->grad_x, "x", args->x);
  if (s_read) c.apart("grad_x", args->grad_x, "s", args->s);
  if (args->grad_x.data) c.apart("grad_x", args->grad_x, "weight", args->weight);
  c.apart("grad_bias", args->grad_bias, "grad_y", args->grad_y);
  return c.status();
}

deltaops_status check_packing(const deltaops_matrix *weight, const Kernels &kernels,
                              int64_t *bytes) {
  Checker c("pack_weight");
  if (weight == nullptr || bytes == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "pack_weight: weight and bytes must not be NULL.");
  c.operand("weight", *weight, "[rows, cols]", weight->rows, weight->cols, -1);
  c.work(1, weight->rows, weight->cols, 0);
  if (c.status() == DELTAOPS_OK)
    *bytes = packed_size(header_for(weight->rows, weight->cols, weight->dtype, kernels));
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
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, 0);
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
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, 0);
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
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, 0);
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
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, 0);
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

// ------------------------------------------------------------------------------------------ gated

deltaops_status check(const GatedForwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "gated_forward: args must not be NULL.");
  Checker c("gated_forward");
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, args->reserved);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->gate.rows, K = args->gate.cols;
  const int dtype = args->gate.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  activation_kind(&c, args->activation);
  c.rows_of("gate", args->gate, "[M, K]", M, K, -1);
  c.rows_of("up", args->up, "[M, K] with M and K from gate", M, K, dtype);
  c.output("y", args->y, "[M, K] with M and K from gate", M, K, dtype);
  c.apart("y", args->y, "gate", args->gate);
  c.apart("y", args->y, "up", args->up);
  return c.status();
}

deltaops_status check(const GatedBackwardArgs *args) {
  if (args == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "gated_backward: args must not be NULL.");
  Checker c("gated_backward");
  c.pointer("args", args, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, args->reserved);
  if (c.status() != DELTAOPS_OK) return c.status();
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  activation_kind(&c, args->activation);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  c.rows_of("gate", args->gate, "[M, K] with M and K from grad_y", M, K, dtype);
  if (args->grad_gate.data) {
    c.rows_of("up (needed for grad_gate)", args->up, "[M, K] with M and K from grad_y", M, K,
              dtype);
    c.output("grad_gate", args->grad_gate, "[M, K] with M and K from grad_y", M, K, dtype);
    c.apart("grad_gate", args->grad_gate, "grad_y", args->grad_y);
    c.apart("grad_gate", args->grad_gate, "gate", args->gate);
    c.apart("grad_gate", args->grad_gate, "up", args->up);
  }
  if (args->grad_up.data) {
    c.output("grad_up", args->grad_up, "[M, K] with M and K from grad_y", M, K, dtype);
    c.apart("grad_up", args->grad_up, "grad_y", args->grad_y);
    c.apart("grad_up", args->grad_up, "gate", args->gate);
    if (args->grad_gate.data) {
      c.apart("grad_up", args->grad_up, "up", args->up);
      c.apart("grad_up", args->grad_up, "grad_gate", args->grad_gate);
    }
  }
  return c.status();
}

// ----------------------------------------------------------------------------------------- rotary

namespace {

// B, H and L of a rotary's x or y, with their strides; D elements lie side by side.
struct Heads {
  const char *name;
  const void *data;
  const int64_t *sizes, *strides;
  int64_t element;  // bytes

  bool empty() const { return sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0; }

  // Bytes from the lowest address to one past the highest, after memory() has passed.
  void span(uintptr_t *begin, uintptr_t *end) const {
    *begin = *end = reinterpret_cast<uintptr_t>(data);
    for (int i = 0; i < 3; ++i) {
      const int64_t reach = (sizes[i] - 1) * strides[i] * element;
      *(reach < 0 ? begin : end) += static_cast<uintptr_t>(reach);
    }
    *end += static_cast<uintptr_t>(sizes[3] * element);
  }

  void memory(Checker *c) const {
    if (c->status() != DELTAOPS_OK) return;
    c->expect(data != nullptr || empty(), "%s must point to its elements, got NULL.", name);
    c->pointer(name, data, static_cast<size_t>(element));
    for (int i = 0; i < 3; ++i)
      c->expect(extent(sizes[i], strides[i], element) >= 0,
                "%s must span at most 2^56 bytes, got %" PRId64 " at a stride of %" PRId64 ".",
                name, sizes[i], strides[i]);
  }

  // Whether each of the three strides steps over all that the smaller ones reach.
  bool apart() const {
    int order[3] = {0, 1, 2};
    const auto sort = [&](int a, int b) {
      if (strides[order[a]] > strides[order[b]]) std::swap(order[a], order[b]);
    };
    sort(0, 1), sort(1, 2), sort(0, 1);
    int64_t reach = sizes[3];
    for (const int i : order) {
      if (sizes[i] == 1) continue;
      if (strides[i] < reach) return false;
      reach += (sizes[i] - 1) * strides[i];
    }
    return true;
  }

  bool dense() const {
    uintptr_t begin = 0, end = 0;
    span(&begin, &end);
    return end - begin ==
           static_cast<uintptr_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3] * element);
  }
};

bool overlap(const Heads &a, const Heads &b) {
  uintptr_t a_begin = 0, a_end = 0, b_begin = 0, b_end = 0;
  a.span(&a_begin, &a_end);
  b.span(&b_begin, &b_end);
  return a_begin < b_end && b_begin < a_end;
}

}  // namespace

deltaops_status check(const RotaryArgs *args) {
  if (args == nullptr) return fail(DELTAOPS_INVALID_ARGUMENT, "rotary: args must not be NULL.");
  Checker c("rotary");
  c.pointer("args", args, alignof(RotaryArgs));
  if (c.status() != DELTAOPS_OK) return c.status();
  c.common(args->struct_size, sizeof *args, args->num_threads, nullptr, 0, args->reserved);
  if (c.status() != DELTAOPS_OK) return c.status();
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
  c.expect(dtype == DELTAOPS_F32 || dtype == DELTAOPS_BF16,
           "dtype must be 0 (f32) or 1 (bf16), got %d.", dtype);
  c.expect(table_dtype == DELTAOPS_F32 || table_dtype == dtype,
           "table_dtype must be 0 (f32) or that of x, %d, got %d. Convert cos and sin.", dtype,
           table_dtype);
  c.expect(args->backward == 0 || args->backward == 1, "backward must be 0 or 1, got %d.",
           args->backward);
  const int64_t element = dtype == DELTAOPS_BF16 ? 2 : 4;
  const Heads x = {"x", args->x, sizes, args->x_strides, element};
  const Heads y = {"y", args->y, sizes, args->y_strides, element};
  x.memory(&c);
  y.memory(&c);
  // The tables are heads too: one for each token, in one sequence where the batch shares them.
  const bool shared = sizes[0] > 1 && args->table_strides[0] == 0;
  const int64_t table[] = {shared ? 1 : sizes[0], 1, sizes[2], sizes[3]};
  const int64_t strides[] = {args->table_strides[0], 0, args->table_strides[1]};
  const int64_t table_element = table_dtype == DELTAOPS_BF16 ? 2 : 4;
  const Heads cos = {"cos", args->cos, table, strides, table_element};
  const Heads sin = {"sin", args->sin, table, strides, table_element};
  cos.memory(&c);
  sin.memory(&c);
  if (c.status() != DELTAOPS_OK || x.empty()) return c.status();
  c.expect(y.apart(),
           "y is written, so its heads must not overlap, got strides (%" PRId64 ", %" PRId64
           ", %" PRId64 ") for [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "].",
           args->y_strides[0], args->y_strides[1], args->y_strides[2], sizes[0], sizes[1], sizes[2],
           sizes[3]);
  for (const Heads *other : {&x, &cos, &sin})
    c.expect(!(y.dense() && other->dense() && overlap(y, *other)),
             "y is written, so it must not overlap %s. Give it memory of its own.", other->name);
  return c.status();
}

}  // namespace deltaops
