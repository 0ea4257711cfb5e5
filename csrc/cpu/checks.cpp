// checks.cpp: every argument of the C ABI, before the first store; checker.h says how.
//
// After these checks a body may trust its arguments: shapes agree, one stride of a weight or
// adapter is 1, pointers are aligned, outputs overlap neither themselves nor anything else, and no
// size or address that an op derives from them leaves int64.

#include <algorithm>
#include <charconv>
#include <cstring>
#include <utility>

#include "checker.h"

namespace deltaops {
namespace {

constexpr int32_t kMaxBranches = 1 << 16;

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

// What only delta_linear takes.
class DeltaLinearChecker : public Checker {
 public:
  using Checker::Checker;

  // The list itself; true where it may be looked at.
  bool branch_list(const deltaops_branch *branches, int32_t count, int32_t reserved) {
    expect(count >= 0 && count <= kMaxBranches,
           "num_branches must be 0 to %d, got %d. Zero the struct first.", kMaxBranches, count);
    expect(count <= 0 || branches != nullptr,
           "branches must point to num_branches branches, got num_branches=%d and NULL.", count);
    pointer("branches", branches, alignof(deltaops_branch));
    expect(reserved == 0, "reserved must be 0, got %d. Zero the struct first.", reserved);
    return status() == DELTAOPS_OK;
  }

  // A packed weight [rows, cols], as this instruction set packs it.
  void packed(const char *name, const void *memory, int64_t bytes, int64_t rows, int64_t cols,
              int32_t dtype, const Kernels &kernels) {
    if (status() != DELTAOPS_OK) return;
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
    if (status() == DELTAOPS_OK)
      expect(std::memcmp(memory, &wanted, sizeof wanted) == 0,
             "%s was packed for another weight or instruction set than [%" PRId64 ", %" PRId64
             "] on %s. Pack it again.",
             name, rows, cols, kernels.name);
    remember(name, memory, 1, bytes, 0, false);
  }

  // "branches[i]" and the part, at most 31 characters; without snprintf, as in remember().
  static void name_branch(char (&name)[32], int32_t i, const char *part) {
    char *end = std::copy_n("branches[", 9, name);
    end = std::to_chars(end, end + 11, i).ptr;
    *end++ = ']';
    std::memcpy(end, part, std::strlen(part) + 1);
  }

  // Each row's branch, where rows have one each.
  void adapters(const int32_t *adapter, int64_t M, int32_t count) {
    if (adapter == nullptr || M == 0) return;
    array("adapter", adapter, M, false);
    for (int64_t m = 0; m < M && status() == DELTAOPS_OK; ++m)
      expect(adapter[m] >= -1 && adapter[m] < count,
             "adapter[%" PRId64 "] must be the number of one of %d branches, or -1, got %d.", m,
             count, adapter[m]);
  }

  // Returns the sum of the ranks.
  int64_t branches(const deltaops_branch *branches, int32_t count, int64_t N, int64_t K) {
    int64_t ranks = 0;
    for (int32_t i = 0; i < count && status() == DELTAOPS_OK; ++i) {
      const deltaops_branch &branch = branches[i];
      char a[32], b[32];
      name_branch(a, i, ".a");
      name_branch(b, i, ".b");
      const int64_t rank = branch.a.rows;
      expect(rank >= 1, "%s must be [R, K] with R at least 1, got R=%" PRId64 ".", a, rank);
      operand(a, branch.a, "[R, K]", rank, K, -1);
      operand(b, branch.b, "[N, R] with R from a", N, rank, branch.a.dtype);
      expect(branch.drop_threshold <= 65536,
             "branches[%d].drop_threshold must be 0 to 65536 (p * 65536), got %u.", i,
             branch.drop_threshold);
      if (branch.bias.data) {
        char bias[32];
        name_branch(bias, i, ".bias");
        rows_of(bias, branch.bias, "[1, R] with R from a", 1, rank, branch.a.dtype);
      }
      expect(branch.activation >= DELTAOPS_IDENTITY && branch.activation <= DELTAOPS_SILU,
             "branches[%d].activation must be 0 (identity) to 4 (silu), got %d.", i,
             branch.activation);
      if (status() != DELTAOPS_OK) break;  // this rank may be any number
      ranks += rank;
      expect(ranks <= kMaxSize, "the ranks must add up to at most 2^40, got %" PRId64 ".", ranks);
    }
    return ranks;
  }
};

}  // namespace

namespace {

// All but disjointness.
void examine(DeltaLinearChecker *checker, const ForwardArgs *args, const Kernels &kernels) {
  DeltaLinearChecker &c = *checker;
  if (!c.header(args) || !c.branch_list(args->branches, args->num_branches, args->reserved)) return;
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
  c.adapters(args->adapter, M, args->num_branches);
  c.packed("packed_weight", args->packed_weight, args->packed_bytes, N, K, dtype, kernels);
}

// grad_x: the layer's own, or that of the group, which is an output of its first layer alone.
void examine(DeltaLinearChecker *checker, const BackwardArgs *args, const deltaops_matrix &grad_x,
             const Kernels &kernels) {
  DeltaLinearChecker &c = *checker;
  if (!c.header(args) || !c.branch_list(args->branches, args->num_branches, args->reserved)) return;
  const int64_t M = args->grad_y.rows, N = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.rows_of("grad_y", args->grad_y, "[M, N]", M, N, -1);

  c.pointer("grad_a", args->grad_a, alignof(deltaops_matrix));
  c.pointer("grad_b", args->grad_b, alignof(deltaops_matrix));
  c.pointer("grad_branch_bias", args->grad_branch_bias, alignof(deltaops_matrix));
  if (c.status() != DELTAOPS_OK) return;

  // K comes from whoever is there.
  int64_t K = 0;
  if (grad_x.data)
    K = grad_x.cols;
  else if (args->num_branches > 0)
    K = args->branches[0].a.cols;
  const int64_t R = c.branches(args->branches, args->num_branches, N, K);

  if (args->grad_x.data) c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
  if (grad_x.data) c.operand("weight (needed for grad_x)", args->weight, "[N, K]", N, K, dtype);
  if (args->grad_bias.data) c.output("grad_bias", args->grad_bias, "[1, N]", 1, N, -1);
  bool any_a = false, any_b = false, any_branch_bias = false, activated = false;
  for (int32_t i = 0; i < args->num_branches && c.status() == DELTAOPS_OK; ++i) {
    char name[32];
    activated = activated || args->branches[i].activation != DELTAOPS_IDENTITY;
    const int64_t rank = args->branches[i].a.rows;
    if (args->grad_a && args->grad_a[i].data) {
      std::snprintf(name, sizeof name, "grad_a[%d]", i);
      c.dense_output(name, args->grad_a[i], "[R, K]", rank, K, -1);
      any_a = true;
    }
    if (args->grad_b && args->grad_b[i].data) {
      std::snprintf(name, sizeof name, "grad_b[%d]", i);
      c.dense_output(name, args->grad_b[i], "[N, R]", N, rank, -1);
      any_b = true;
    }
    if (args->grad_branch_bias && args->grad_branch_bias[i].data) {
      std::snprintf(name, sizeof name, "grad_branch_bias[%d]", i);
      c.output(name, args->grad_branch_bias[i], "[1, R]", 1, rank, -1);
      any_branch_bias = true;
    }
  }
  if (any_a) c.rows_of("x (needed for grad_a)", args->x, "[M, K]", M, K, dtype);
  const bool inner = any_a || any_branch_bias || grad_x.data;
  const bool s_read = any_b || (activated && inner);
  if (s_read)
    c.rows_of("s (needed for grad_b, and past an activation)", args->s,
              "[M, R] with R the sum of the ranks", M, R, DELTAOPS_F32);
  c.work(M, N, K, R);
  c.adapters(args->adapter, M, args->num_branches);
  if (grad_x.data)
    c.packed("packed_weight", args->packed_weight, args->packed_bytes, K, N, dtype, kernels);
}

void group_list(Checker *c, const void *layers, int32_t count, size_t alignment) {
  c->expect(layers != nullptr, "layers must not be NULL.");
  c->pointer("layers", layers, alignment);
  c->expect(count >= 1 && count <= DELTAOPS_MAX_GROUP, "count must be 1 to %d, got %d.",
            DELTAOPS_MAX_GROUP, count);
}

// What the layers of a group must have alike.
void same_x(Checker *c, const deltaops_matrix &x, const deltaops_matrix &first) {
  c->expect(x.data == first.data && x.rows == first.rows && x.cols == first.cols &&
                x.row_stride == first.row_stride && x.dtype == first.dtype,
            "x must be that of the layers before, got another matrix. Run the layer on its own.");
}

void same_threads(Checker *c, int32_t threads, int32_t first) {
  c->expect(threads == first, "num_threads must be %d, as in layers[0], got %d.", first, threads);
}

}  // namespace

deltaops_status check(const ForwardArgs *args, const Kernels &kernels) {
  DeltaLinearChecker c("delta_linear_forward");
  examine(&c, args, kernels);
  return c.disjoint();
}

deltaops_status check(const BackwardArgs *args, const Kernels &kernels) {
  DeltaLinearChecker c("delta_linear_backward");
  if (c.header(args)) examine(&c, args, args->grad_x, kernels);
  return c.disjoint();
}

deltaops_status check_group(const ForwardArgs *layers, int32_t count, const Kernels &kernels) {
  DeltaLinearChecker c("delta_linear_group_forward");
  group_list(&c, layers, count, alignof(ForwardArgs));
  for (int32_t i = 0; c.status() == DELTAOPS_OK && i < count; ++i) {
    c.layer(i);
    examine(&c, layers + i, kernels);
    if (c.status() != DELTAOPS_OK) break;
    same_x(&c, layers[i].x, layers[0].x);
    same_threads(&c, layers[i].num_threads, layers[0].num_threads);
  }
  c.layer(-1);
  return c.disjoint();
}

deltaops_status check_group(const BackwardArgs *layers, int32_t count, const Kernels &kernels) {
  DeltaLinearChecker c("delta_linear_group_backward");
  group_list(&c, layers, count, alignof(BackwardArgs));
  const deltaops_matrix *x = nullptr;  // of the first layer that has it
  for (int32_t i = 0; c.status() == DELTAOPS_OK && i < count; ++i) {
    c.layer(i);
    examine(&c, layers + i, layers[0].grad_x, kernels);
    if (c.status() != DELTAOPS_OK) break;
    const deltaops_matrix &dy = layers[i].grad_y, &first = layers[0].grad_y;
    c.expect(dy.rows == first.rows && dy.dtype == first.dtype,
             "grad_y must have the rows and dtype of layers[0].grad_y: %" PRId64
             " rows, got %" PRId64 ".",
             first.rows, dy.rows);
    c.expect(i == 0 || layers[i].grad_x.data == nullptr,
             "grad_x must be absent: the sum goes to layers[0].grad_x.");
    same_threads(&c, layers[i].num_threads, layers[0].num_threads);
    if (layers[i].x.data == nullptr) continue;
    if (x == nullptr) x = &layers[i].x;
    same_x(&c, layers[i].x, *x);
  }
  c.layer(-1);
  return c.disjoint();
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

// A vector of parameters, which may be absent.
void parameter(Checker *c, const char *name, const deltaops_matrix &m, const char *shape,
               int64_t cols) {
  if (m.data) c->rows_of(name, m, shape, 1, cols, -1);
}

void gradient(Checker *c, const char *name, const deltaops_matrix &m, const char *shape,
              int64_t rows, int64_t cols) {
  if (m.data) c->dense_output(name, m, shape, rows, cols, -1);
}

void norm_kind(Checker *c, int32_t norm) {
  c->expect(norm >= DELTAOPS_NO_NORM && norm <= DELTAOPS_RMS_NORM,
            "norm must be 0 (none), 1 (LayerNorm) or 2 (RMSNorm), got %d.", norm);
}

void activation_kind(Checker *c, int32_t activation) {
  c->expect(activation >= DELTAOPS_IDENTITY && activation <= DELTAOPS_SILU,
            "activation must be 0 (identity) to 4 (silu), got %d.", activation);
}

}  // namespace

deltaops_status check(const BottleneckForwardArgs *args) {
  Checker c("bottleneck_forward");
  if (!c.header(args)) return c.status();
  const int64_t M = args->x.rows, K = args->x.cols, R = args->down.rows;
  const int dtype = args->x.dtype;
  c.expect(K >= 1 && R >= 1, "K and R must be at least 1, got K=%" PRId64 ", R=%" PRId64 ".", K, R);
  norm_kind(&c, args->norm);
  activation_kind(&c, args->activation);
  c.rows_of("x", args->x, "[M, K]", M, K, -1);
  if (args->residual.data) c.rows_of("residual", args->residual, "[M, K]", M, K, dtype);
  parameter(&c, "gamma", args->gamma, "[1, K]", K);
  parameter(&c, "beta", args->beta, "[1, K]", K);
  c.operand("down", args->down, "[R, K]", R, K, -1);
  parameter(&c, "down_bias", args->down_bias, "[1, R]", R);
  c.operand("up", args->up, "[K, R] with R from down", K, R, -1);
  parameter(&c, "up_bias", args->up_bias, "[1, K]", K);
  c.output("y", args->y, "[M, K]", M, K, dtype);
  if (args->h.data) c.output("h", args->h, "[M, R]", M, R, DELTAOPS_F32);
  if (args->stats.data && args->norm != DELTAOPS_NO_NORM)
    c.output("stats", args->stats, "[M, 2]", M, 2, DELTAOPS_F32);
  c.work(M, 0, K, R);
  return c.disjoint();
}

deltaops_status check(const BottleneckBackwardArgs *args) {
  Checker c("bottleneck_backward");
  if (!c.header(args)) return c.status();
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols, R = args->down.rows;
  const int dtype = args->grad_y.dtype;
  const bool norm = args->norm != DELTAOPS_NO_NORM;
  c.expect(K >= 1 && R >= 1, "K and R must be at least 1, got K=%" PRId64 ", R=%" PRId64 ".", K, R);
  norm_kind(&c, args->norm);
  activation_kind(&c, args->activation);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  c.expect(args->residual_is_x == 0 || args->residual_is_x == 1,
           "residual_is_x must be 0 or 1, got %d.", args->residual_is_x);
  const bool past_norm =
      norm && (args->grad_x.data || args->grad_gamma.data || args->grad_beta.data);
  if (args->grad_down.data || past_norm) {
    c.rows_of("x (needed for grad_down and past a norm)", args->x, "[M, K]", M, K, dtype);
    if (norm) c.rows_of("stats", args->stats, "[M, 2]", M, 2, DELTAOPS_F32);
  }
  c.expect(norm || (!args->grad_gamma.data && !args->grad_beta.data),
           "grad_gamma and grad_beta must be absent without a norm.");
  c.rows_of("h", args->h, "[M, R]", M, R, DELTAOPS_F32);
  parameter(&c, "gamma", args->gamma, "[1, K]", K);
  parameter(&c, "beta", args->beta, "[1, K]", K);
  c.operand("down", args->down, "[R, K]", R, K, -1);
  c.operand("up", args->up, "[K, R] with R from down", K, R, -1);
  if (args->grad_x.data) c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
  gradient(&c, "grad_gamma", args->grad_gamma, "[1, K]", 1, K);
  gradient(&c, "grad_beta", args->grad_beta, "[1, K]", 1, K);
  gradient(&c, "grad_down", args->grad_down, "[R, K]", R, K);
  gradient(&c, "grad_down_bias", args->grad_down_bias, "[1, R]", 1, R);
  gradient(&c, "grad_up", args->grad_up, "[K, R]", K, R);
  gradient(&c, "grad_up_bias", args->grad_up_bias, "[1, K]", 1, K);
  c.work(M, 0, K, R);
  return c.disjoint();
}

deltaops_status check(const NormBiasForwardArgs *args) {
  Checker c("norm_bias_forward");
  if (!c.header(args)) return c.status();
  const int64_t M = args->x.rows, K = args->x.cols;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  norm_kind(&c, args->norm);
  c.rows_of("x", args->x, "[M, K]", M, K, -1);
  parameter(&c, "gamma", args->gamma, "[1, K]", K);
  parameter(&c, "bias", args->bias, "[1, K]", K);
  c.output("y", args->y, "[M, K]", M, K, args->x.dtype);
  if (args->stats.data && args->norm != DELTAOPS_NO_NORM)
    c.output("stats", args->stats, "[M, 2]", M, 2, DELTAOPS_F32);
  c.work(M, 0, K, 0);
  return c.disjoint();
}

deltaops_status check(const NormBiasBackwardArgs *args) {
  Checker c("norm_bias_backward");
  if (!c.header(args)) return c.status();
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  c.expect(args->reserved == 0, "reserved must be 0, got %d. Zero the struct first.",
           args->reserved);
  norm_kind(&c, args->norm);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  const bool norm = args->norm != DELTAOPS_NO_NORM;
  if (args->grad_gamma.data || (norm && args->grad_x.data)) {
    c.rows_of("x (needed for grad_gamma, and for grad_x past a norm)", args->x, "[M, K]", M, K,
              dtype);
    if (norm) c.rows_of("stats", args->stats, "[M, 2]", M, 2, DELTAOPS_F32);
  }
  parameter(&c, "gamma", args->gamma, "[1, K]", K);
  if (args->grad_x.data) c.output("grad_x", args->grad_x, "[M, K]", M, K, dtype);
  gradient(&c, "grad_gamma", args->grad_gamma, "[1, K]", 1, K);
  gradient(&c, "grad_bias", args->grad_bias, "[1, K]", 1, K);
  c.work(M, 0, K, 0);
  return c.disjoint();
}

// ------------------------------------------------------------------------------------------ gated

namespace {

// One of some size and no data was meant to be there: without it another op would run.
bool given(const deltaops_matrix &m) { return m.data || m.rows || m.cols; }

}  // namespace

deltaops_status check(const GatedForwardArgs *args) {
  Checker c("gated_forward");
  if (!c.header(args)) return c.status();
  c.expect(args->reserved == 0, "reserved must be 0, got %d. Zero the struct first.",
           args->reserved);
  const int64_t M = args->gate.rows, K = args->gate.cols;
  const int dtype = args->gate.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  activation_kind(&c, args->activation);
  c.rows_of("gate", args->gate, "[M, K]", M, K, -1);
  if (given(args->up)) c.rows_of("up", args->up, "[M, K] with M and K from gate", M, K, dtype);
  c.output("y", args->y, "[M, K] with M and K from gate", M, K, dtype);
  c.work(M, 0, K, 0);
  return c.disjoint();
}

deltaops_status check(const GatedBackwardArgs *args) {
  Checker c("gated_backward");
  if (!c.header(args)) return c.status();
  c.expect(args->reserved == 0, "reserved must be 0, got %d. Zero the struct first.",
           args->reserved);
  const int64_t M = args->grad_y.rows, K = args->grad_y.cols;
  const int dtype = args->grad_y.dtype;
  c.expect(K >= 1, "K must be at least 1, got %" PRId64 ".", K);
  activation_kind(&c, args->activation);
  c.rows_of("grad_y", args->grad_y, "[M, K]", M, K, -1);
  c.rows_of("gate", args->gate, "[M, K] with M and K from grad_y", M, K, dtype);
  if (args->grad_gate.data) {
    if (given(args->up) || args->grad_up.data)  // with neither it is the activation alone
      c.rows_of("up (needed for grad_gate)", args->up, "[M, K] with M and K from grad_y", M, K,
                dtype);
    c.output("grad_gate", args->grad_gate, "[M, K] with M and K from grad_y", M, K, dtype);
  }
  if (args->grad_up.data)
    c.output("grad_up", args->grad_up, "[M, K] with M and K from grad_y", M, K, dtype);
  c.work(M, 0, K, 0);
  return c.disjoint();
}

}  // namespace deltaops
