/* ampere_passes.cu: launches the passes over x and dy of ampere/{project,columns,reduce}.h. */
#include <initializer_list>

#include "ampere/columns.h"
#include "ampere/host.h"
#include "ampere/project.h"
#include "ampere/reduce.h"

namespace deltaops::ampere {
namespace {

/* Blocks that a pass is cut for where its tiles are fewer: about two for each SM of the largest
 * GPU. Not what the GPU at hand has, so that every GPU adds up in the same order. */
constexpr int64_t kBlocks = 256;
constexpr int64_t kLeastSteps = 4; /* of a piece, so that its pipeline fills */
constexpr int64_t kMostBlocksAcross = 65535;

/* How `length` is cut: `count` pieces of `size`, a multiple of `step`; none where it is empty. */
struct Pieces {
  int64_t count, size;

  Pieces(int64_t length, int64_t step, int64_t tiles) {
    const int64_t steps = divide_up(length, step);
    int64_t most = divide_up(steps, kLeastSteps);
    if (most > divide_up(kBlocks, tiles)) most = divide_up(kBlocks, tiles);
    size = most > 0 ? divide_up(steps, most) * step : step;
    count = divide_up(length, size);
  }
};

/* Tiles that a pass has anyway: at least one, so that nothing is divided by 0. Without ranks there
 * are the totals. */
int64_t tiles_of(int64_t length, int64_t step, int64_t ranks) {
  const int64_t tiles = divide_up(length, step) * (ranks > 0 ? divide_up(ranks, kLanes) : 1);
  return tiles > 0 ? tiles : 1;
}

Pieces project_pieces(int64_t M, int64_t K, int64_t R) {
  return Pieces(K, kProjectStep, tiles_of(M, kProjectRows, R));
}

Pieces row_pieces(int64_t M, int64_t columns, int64_t R) {
  return Pieces(M, kStripRows, tiles_of(columns, kStripColumns, R));
}

/* Where the partial sums of grad_up lie in its workspace, in floats. */
struct GradUpSpace {
  int64_t product, totals, through, floats;

  GradUpSpace(int64_t M, int64_t N, int64_t R) {
    const int64_t pieces = row_pieces(M, N, R).count;
    product = 0;
    totals = product + pieces * N * R;
    through = totals + pieces * N;
    floats = through + divide_up(N, kStripColumns) * M * R;
  }
};

/* A gradient: of the dtype of activations, or f32. */
deltaops_status check_gradient(const char *who, const char *name, const deltaops_matrix &m,
                               int64_t rows, int64_t cols, int32_t dtype) {
  return check_if_there(who, name, m, rows, cols, m.dtype == DELTAOPS_F32 ? DELTAOPS_F32 : dtype);
}

deltaops_status check_workspace(const char *who, const void *workspace, uint64_t bytes,
                                uint64_t wanted) {
  if (wanted == 0 ||
      (workspace != nullptr && bytes >= wanted && reinterpret_cast<uintptr_t>(workspace) % 16 == 0))
    return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                   "%s: workspace must have %llu bytes on 16 (%s_workspace says so), got %llu at "
                   "%p",
                   who, static_cast<unsigned long long>(wanted), who,
                   static_cast<unsigned long long>(bytes), workspace);
}

deltaops_status check_grid(const char *who, int64_t x, int64_t y, int64_t z) {
  if (x <= INT32_MAX && y <= kMostBlocksAcross && z <= kMostBlocksAcross) return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: too large for a grid: (%lld, %lld, %lld) blocks", who,
                   static_cast<long long>(x), static_cast<long long>(y), static_cast<long long>(z));
}

dim3 grid_of(int64_t x, int64_t y, int64_t z) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

/* partial [parts, rows, cols] added up into `outs`, of which one may be f32 and one narrow. */
template <typename T>
deltaops_status reduce(const char *doing, const float *partial, int64_t parts, int64_t rows,
                       int64_t cols, float scale,
                       std::initializer_list<const deltaops_matrix *> outs, void *stream) {
  ReduceArguments g = {};
  for (const deltaops_matrix *out : outs) {
    if (out->data == nullptr) continue;
    if (out->dtype == DELTAOPS_F32) {
      g.wide = static_cast<float *>(out->data);
      g.wide_stride = out->row_stride;
    } else {
      g.narrow = out->data;
      g.narrow_stride = out->row_stride;
    }
  }
  if (rows == 0 || cols == 0 || (g.wide == nullptr && g.narrow == nullptr)) return DELTAOPS_OK;
  g.partial = partial;
  g.parts = parts;
  g.rows = rows;
  g.cols = cols;
  g.scale = scale;
  const int64_t blocks = divide_up(rows * cols, kReduceThreads);
  return launch(doing, reduce_kernel<T>, g, grid_of(blocks < 8192 ? blocks : 8192, 1, 1),
                kReduceThreads, 0, stream);
}

template <typename T>
deltaops_status project(const deltaops_cuda_project_args &args) {
  const int64_t M = args.x.rows, K = args.x.cols, R = args.a.rows;
  const Pieces pieces = project_pieces(M, K, R);
  const float scale = args.scaling * scale_of_kept(args.drop_threshold);
  const bool direct = pieces.count == 1;
  ProjectArguments g = {};
  g.x = rows_of(args.x);
  g.a = rows_of(args.a);
  g.mask = {args.seed, args.branch_stream, args.drop_threshold};
  g.ranks = static_cast<int32_t>(R);
  g.piece = static_cast<int32_t>(pieces.size);
  g.scale = direct ? scale : 1.0f;
  if (direct) {
    g.s = static_cast<float *>(args.s.data);
    g.narrow = args.s_narrow.data;
    g.s_stride = args.s.row_stride;
    g.narrow_stride = args.s_narrow.row_stride;
  } else {
    g.partial = static_cast<float *>(args.workspace);
  }
  if (pieces.count > 0) {
    const int64_t down = divide_up(M, kProjectRows), across = divide_up(R, kLanes);
    deltaops_status status = check_grid("project", down, across, pieces.count);
    if (status == DELTAOPS_OK)
      status =
          launch("launching project", project_kernel<T>, g, grid_of(down, across, pieces.count),
                 kProjectThreads, kProjectShared, args.stream);
    if (status != DELTAOPS_OK || direct) return status;
  }
  return reduce<T>("adding up S", g.partial, pieces.count, M, R, scale, {&args.s, &args.s_narrow},
                   args.stream);
}

/* Launches columns_kernel where there is anything to sum. */
template <typename T>
deltaops_status sum_columns(const char *who, ColumnsArguments g, const Pieces &pieces,
                            void *stream) {
  const int64_t strips = divide_up(g.tall.cols, kStripColumns);
  const int64_t across = g.ranks > 0 ? divide_up(g.ranks, kLanes) : 1; /* none: the totals alone */
  if (pieces.count == 0 || strips == 0) return DELTAOPS_OK;
  const deltaops_status status = check_grid(who, strips, across, pieces.count);
  if (status != DELTAOPS_OK) return status;
  g.piece = pieces.size;
  return launch(who, columns_kernel<T>, g, grid_of(strips, across, pieces.count), kStripThreads,
                kStripShared, stream);
}

template <typename T>
deltaops_status grad_up(const deltaops_cuda_grad_up_args &args, int64_t R) {
  const int64_t M = args.grad_y.rows, N = args.grad_y.cols;
  const Pieces pieces = row_pieces(M, N, R);
  const GradUpSpace space(M, N, R);
  auto *floats = static_cast<float *>(args.workspace);
  float *product = args.grad_b.data && R > 0 ? floats + space.product : nullptr;
  float *totals = args.grad_bias.data ? floats + space.totals : nullptr;
  float *through =
      (args.grad_s.data || args.grad_s_narrow.data) && R > 0 ? floats + space.through : nullptr;
  ColumnsArguments g = {};
  g.tall = rows_of(args.grad_y);
  g.side = rows_of(args.s_narrow);
  g.up = rows_of(args.b);
  g.product = product;
  g.col_step = R;
  g.rank_step = 1;
  g.totals = totals;
  g.through = through;
  g.ranks = static_cast<int32_t>(R);
  void *stream = args.stream;
  deltaops_status status = sum_columns<T>("launching grad_up", g, pieces, stream);
  if (status == DELTAOPS_OK)
    status = reduce<T>("adding up dS", through, divide_up(N, kStripColumns), M, R, args.scaling,
                       {&args.grad_s, &args.grad_s_narrow}, stream);
  if (status == DELTAOPS_OK)
    status = reduce<T>("adding up dB", product, pieces.count, N, R, 1.0f, {&args.grad_b}, stream);
  if (status == DELTAOPS_OK)
    status = reduce<T>("adding up db", totals, pieces.count, 1, N, 1.0f, {&args.grad_bias}, stream);
  return status;
}

template <typename T>
deltaops_status grad_down(const deltaops_cuda_grad_down_args &args) {
  const int64_t M = args.x.rows, K = args.x.cols, R = args.grad_a.rows;
  const Pieces pieces = row_pieces(M, K, R);
  ColumnsArguments g = {};
  g.tall = rows_of(args.x);
  g.side = rows_of(args.grad_s_narrow);
  g.mask = {args.seed, args.branch_stream, args.drop_threshold};
  g.product = static_cast<float *>(args.workspace);
  g.col_step = 1;
  g.rank_step = K;
  g.ranks = static_cast<int32_t>(R);
  const deltaops_status status =
      R > 0 ? sum_columns<T>("launching grad_down", g, pieces, args.stream) : DELTAOPS_OK;
  if (status != DELTAOPS_OK) return status;
  return reduce<T>("adding up dA", g.product, pieces.count, R, K,
                   scale_of_kept(args.drop_threshold), {&args.grad_a}, args.stream);
}

}  // namespace
}  // namespace deltaops::ampere

using namespace deltaops;
using namespace deltaops::ampere;

extern "C" {

uint64_t deltaops_cuda_project_workspace(int64_t M, int64_t K, int64_t R) {
  const int64_t pieces = project_pieces(M, K, R).count;
  return pieces > 1 ? sizeof(float) * static_cast<uint64_t>(pieces * M * R) : 0;
}

uint64_t deltaops_cuda_grad_up_workspace(int64_t M, int64_t N, int64_t R) {
  return sizeof(float) * static_cast<uint64_t>(GradUpSpace(M, N, R).floats);
}

uint64_t deltaops_cuda_grad_down_workspace(int64_t M, int64_t K, int64_t R) {
  return sizeof(float) * static_cast<uint64_t>(row_pieces(M, K, R).count * R * K);
}

deltaops_status deltaops_cuda_project(const deltaops_cuda_project_args *args) {
  constexpr const char *who = "project";
  deltaops_status status = check_args(who, args);
  if (status != DELTAOPS_OK) return status;
  const int64_t M = args->x.rows, K = args->x.cols, R = args->a.rows;
  const int32_t dtype = args->x.dtype;
  if (status == DELTAOPS_OK) status = check_half(who, "x", args->x);
  if (status == DELTAOPS_OK) status = check_rows(who, "a", args->a, R, K, dtype);
  if (status == DELTAOPS_OK) status = check_if_there(who, "s", args->s, M, R, DELTAOPS_F32);
  if (status == DELTAOPS_OK) status = check_if_there(who, "s_narrow", args->s_narrow, M, R, dtype);
  if (status == DELTAOPS_OK) status = check_draws(who, args->drop_threshold, args->seed);
  if (status == DELTAOPS_OK)
    status = check_workspace(who, args->workspace, args->workspace_bytes,
                             deltaops_cuda_project_workspace(M, K, R));
  if (status != DELTAOPS_OK || M == 0 || R == 0) return status;
  const OnDevice here(args->device);
  if (here.status() != DELTAOPS_OK) return here.status();
  return dtype == DELTAOPS_BF16 ? project<__nv_bfloat16>(*args) : project<__half>(*args);
}

deltaops_status deltaops_cuda_grad_up(const deltaops_cuda_grad_up_args *args) {
  constexpr const char *who = "grad_up";
  deltaops_status status = check_args(who, args);
  if (status != DELTAOPS_OK) return status;
  const int64_t M = args->grad_y.rows, N = args->grad_y.cols;
  const int32_t dtype = args->grad_y.dtype;
  const bool want_s = args->grad_s.data != nullptr || args->grad_s_narrow.data != nullptr;
  const bool want_b = args->grad_b.data != nullptr;
  const int64_t R = want_s ? args->b.cols : want_b ? args->grad_b.cols : 0;
  if (status == DELTAOPS_OK) status = check_half(who, "grad_y", args->grad_y);
  if (status == DELTAOPS_OK && want_s) status = check_rows(who, "b", args->b, N, R, dtype);
  if (status == DELTAOPS_OK && want_b)
    status = check_rows(who, "s_narrow", args->s_narrow, M, R, dtype);
  if (status == DELTAOPS_OK)
    status = check_if_there(who, "grad_s", args->grad_s, M, R, DELTAOPS_F32);
  if (status == DELTAOPS_OK)
    status = check_if_there(who, "grad_s_narrow", args->grad_s_narrow, M, R, dtype);
  if (status == DELTAOPS_OK) status = check_gradient(who, "grad_b", args->grad_b, N, R, dtype);
  if (status == DELTAOPS_OK)
    status = check_gradient(who, "grad_bias", args->grad_bias, 1, N, dtype);
  if (status == DELTAOPS_OK)
    status = check_workspace(who, args->workspace, args->workspace_bytes,
                             deltaops_cuda_grad_up_workspace(M, N, R));
  if (status != DELTAOPS_OK) return status;
  const OnDevice here(args->device);
  if (here.status() != DELTAOPS_OK) return here.status();
  return dtype == DELTAOPS_BF16 ? grad_up<__nv_bfloat16>(*args, R) : grad_up<__half>(*args, R);
}

deltaops_status deltaops_cuda_grad_down(const deltaops_cuda_grad_down_args *args) {
  constexpr const char *who = "grad_down";
  deltaops_status status = check_args(who, args);
  if (status != DELTAOPS_OK) return status;
  const int64_t M = args->x.rows, K = args->x.cols, R = args->grad_a.rows;
  const int32_t dtype = args->x.dtype;
  const int32_t out = args->grad_a.dtype == DELTAOPS_F32 ? DELTAOPS_F32 : dtype;
  if (status == DELTAOPS_OK) status = check_half(who, "x", args->x);
  if (status == DELTAOPS_OK)
    status = check_rows(who, "grad_s_narrow", args->grad_s_narrow, M, R, dtype);
  if (status == DELTAOPS_OK) status = check_rows(who, "grad_a", args->grad_a, R, K, out);
  if (status == DELTAOPS_OK) status = check_draws(who, args->drop_threshold, args->seed);
  if (status == DELTAOPS_OK)
    status = check_workspace(who, args->workspace, args->workspace_bytes,
                             deltaops_cuda_grad_down_workspace(M, K, R));
  if (status != DELTAOPS_OK) return status;
  const OnDevice here(args->device);
  if (here.status() != DELTAOPS_OK) return here.status();
  return dtype == DELTAOPS_BF16 ? grad_down<__nv_bfloat16>(*args) : grad_down<__half>(*args);
}
}
