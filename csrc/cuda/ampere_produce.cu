/* ampere_produce.cu: launches the producers of ampere/produce.h. */
#include "ampere/produce.h"

#include <stdio.h>

#include "ampere/host.h"

namespace deltaops::ampere {
namespace {

static_assert(kPassRanks * kMaxPasses == DELTAOPS_CUDA_MAX_PRODUCED, "the C ABI says the same");

/* What y is made of. */
deltaops_status check_input(const char *who, const char *name, const deltaops_matrix &m,
                            const deltaops_matrix &y) {
  return check_rows(who, name, m, y.rows, y.cols, y.dtype);
}

deltaops_status check_y(const char *who, const deltaops_matrix &y) {
  const deltaops_status status = check_half(who, "y", y);
  if (status != DELTAOPS_OK || y.cols > 0) return status;
  return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: y must have at least 1 column, got 0", who);
}

/* Adds the passes of 64 ranks of each branch. */
template <class Source>
deltaops_status add_branches(const char *who, const deltaops_cuda_branch *branches, int32_t count,
                             const deltaops_matrix &y, ProduceArguments<Source> *g) {
  if (count < 0 || (count > 0 && branches == nullptr))
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: branches must be given, got %d at %p", who,
                     count, static_cast<const void *>(branches));
  for (int32_t i = 0; i < count; ++i) {
    const deltaops_cuda_branch &branch = branches[i];
    char a[24], s[24], narrow[32];
    snprintf(a, sizeof a, "a of branch %d", i);
    snprintf(s, sizeof s, "s of branch %d", i);
    snprintf(narrow, sizeof narrow, "s_narrow of branch %d", i);
    const int64_t R = branch.a.rows;
    deltaops_status status = check_rows(who, a, branch.a, R, y.cols, y.dtype);
    if (status == DELTAOPS_OK) status = check_if_there(who, s, branch.s, y.rows, R, DELTAOPS_F32);
    if (status == DELTAOPS_OK)
      status = check_if_there(who, narrow, branch.s_narrow, y.rows, R, y.dtype);
    if (status == DELTAOPS_OK) status = check_draws(who, branch.drop_threshold, branch.seed);
    if (status != DELTAOPS_OK) return status;
    for (int64_t first = 0; first < R; first += kPassRanks) {
      if (g->count == kMaxPasses)
        return cuda_fail(DELTAOPS_UNSUPPORTED,
                         "%s: the ranks of all branches, each rounded up to %d, must be at most %d "
                         "together; project some from y",
                         who, kPassRanks, kPassRanks * kMaxPasses);
      DownPass &pass = g->passes[g->count++];
      pass.a = rows_of(branch.a);
      pass.a.data = static_cast<const uint16_t *>(branch.a.data) + first * branch.a.row_stride;
      pass.a.rows = R - first < kPassRanks ? R - first : kPassRanks;
      pass.mask = {branch.seed, branch.branch_stream, branch.drop_threshold};
      pass.scale = branch.scaling * scale_of_kept(branch.drop_threshold);
      if (branch.s.data != nullptr) pass.s = static_cast<float *>(branch.s.data) + first;
      if (branch.s_narrow.data != nullptr)
        pass.narrow = static_cast<uint16_t *>(branch.s_narrow.data) + first;
      pass.s_stride = branch.s.row_stride;
      pass.narrow_stride = branch.s_narrow.row_stride;
      g->aligned = g->aligned && pass.a.aligned;
    }
  }
  if (g->count == 0) g->count = 1; /* without ranks: writes y */
  return DELTAOPS_OK;
}

/* Bytes of shared memory that a block of the GPU may use. */
deltaops_status shared_of(int32_t device, int *bytes) {
  return cuda_check(cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                    "asking a GPU for its shared memory");
}

/* `again`: chunks that wait are read again. */
template <class Source>
deltaops_status run(const char *doing, ProduceArguments<Source> g, const deltaops_matrix &y,
                    bool again, int32_t device, void *stream) {
  const int64_t blocks = divide_up(y.rows, kGemvRows);
  if (blocks > INT32_MAX)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: y must have fewer than 2^35 rows, got %lld", doing,
                     static_cast<long long>(y.rows));
  g.y = rows_of(y);
  g.aligned = g.aligned && g.y.aligned;
  const OnDevice here(device);
  if (here.status() != DELTAOPS_OK) return here.status();
  int most = 0;
  if (again) {
    const deltaops_status status = shared_of(device, &most);
    if (status != DELTAOPS_OK) return status;
    const int64_t rounds = divide_up(y.cols, kRound), room = (most - kGemvShared) / kRoundBytes;
    g.kept = static_cast<int32_t>(rounds < room ? rounds : room);
  }
  auto *kernel = y.dtype == DELTAOPS_BF16 ? produce_kernel<__nv_bfloat16, Source>
                                          : produce_kernel<__half, Source>;
  return launch(doing, kernel, g, dim3(static_cast<unsigned>(blocks)), kGemvThreads,
                kGemvShared + g.kept * kRoundBytes, stream, most);
}

}  // namespace
}  // namespace deltaops::ampere

using namespace deltaops;
using namespace deltaops::ampere;

extern "C" {

deltaops_status deltaops_cuda_rms_norm_project(const deltaops_cuda_rms_norm_project_args *args) {
  constexpr const char *who = "rms_norm_project";
  deltaops_status status = check_args(who, args);
  if (status != DELTAOPS_OK) return status;
  const deltaops_matrix &y = args->y;
  status = check_y(who, y);
  if (status == DELTAOPS_OK) status = check_input(who, "x", args->x, y);
  if (status == DELTAOPS_OK) status = check_if_there(who, "gamma", args->gamma, 1, y.cols, y.dtype);
  if (status == DELTAOPS_OK && args->rstd.data != nullptr)
    status = check_shape(who, "rstd", args->rstd, y.rows, 1, DELTAOPS_F32);
  ProduceArguments<RmsNorm> g = {};
  g.aligned = true;
  if (status == DELTAOPS_OK) status = add_branches(who, args->branches, args->num_branches, y, &g);
  if (status != DELTAOPS_OK || y.rows == 0) return status;
  g.source.x = rows_of(args->x);
  if (args->gamma.data != nullptr) g.source.gamma = rows_of(args->gamma);
  g.source.eps = args->eps;
  g.source.rstd = static_cast<float *>(args->rstd.data);
  g.source.rstd_stride = args->rstd.row_stride;
  g.aligned =
      g.aligned && g.source.x.aligned && (args->gamma.data == nullptr || g.source.gamma.aligned);
  return run("launching rms_norm_project", g, y, true, args->device, args->stream);
}

deltaops_status deltaops_cuda_swiglu_project(const deltaops_cuda_swiglu_project_args *args) {
  constexpr const char *who = "swiglu_project";
  deltaops_status status = check_args(who, args);
  if (status != DELTAOPS_OK) return status;
  const deltaops_matrix &y = args->y;
  status = check_y(who, y);
  if (status == DELTAOPS_OK) status = check_input(who, "gate", args->gate, y);
  if (status == DELTAOPS_OK) status = check_input(who, "up", args->up, y);
  ProduceArguments<SwiGlu> g = {};
  g.aligned = true;
  if (status == DELTAOPS_OK) status = add_branches(who, args->branches, args->num_branches, y, &g);
  if (status != DELTAOPS_OK || y.rows == 0) return status;
  g.source.gate = rows_of(args->gate);
  g.source.up = rows_of(args->up);
  g.aligned = g.aligned && g.source.gate.aligned && g.source.up.aligned;
  return run("launching swiglu_project", g, y, g.count > 1, args->device, args->stream);
}
}
