/* hopper_project.cu: launches a LoRA layer's forward as hopper/project.h has it: checks it, and
 * describes the blocks that make S. */
#include "hopper/host.h"

namespace deltaops::hopper {
namespace {

constexpr int32_t kLeastAside = 4; /* fewer blocks read x for longer than the others make y */
constexpr int64_t kMostRanks = 64;

/* How many blocks make S: as many as are asked for, or as the rounds of the others leave over;
 * whole clusters, and no more than there are rows of tiles. */
int32_t blocks_aside(int32_t asked, const Schedule &schedule, int32_t cluster,
                     int32_t multiprocessors) {
  const int64_t most = multiprocessors / cluster, tiles = schedule.tiles();
  const int64_t needed = blocks(tiles, blocks(tiles, most)); /* for as many rounds */
  int64_t wanted = asked > 0 ? asked : (most - needed) * cluster;
  if (wanted < kLeastAside && asked == 0) wanted = kLeastAside;
  wanted = blocks(wanted, cluster) * cluster;
  const int64_t rows = int64_t{schedule.rows} * cluster;
  return static_cast<int32_t>(wanted < rows ? wanted : rows);
}

/* Of what is not in the products: A, S, its place for the products, and the flags. */
deltaops_status check_project(const deltaops_cuda_hopper_project_gemm_args &args) {
  const int64_t M = args.x.rows, K = args.x.cols, N = args.weight.rows, R = args.a.rows;
  const int32_t dtype = args.x.dtype;
  deltaops_status status = check_shape("weight", args.weight, N, K, dtype);
  if (status == DELTAOPS_OK) status = check_shape("a", args.a, R, K, dtype);
  if (status == DELTAOPS_OK) status = check_shape("b", args.b, N, R, dtype);
  if (status == DELTAOPS_OK) status = check_shape("s_narrow", args.s_narrow, M, R, dtype);
  if (status == DELTAOPS_OK) status = check_shape("out", args.out, M, N, dtype);
  if (status == DELTAOPS_OK && args.s.data != nullptr)
    status = check_shape("s", args.s, M, R, DELTAOPS_F32);
  if (status != DELTAOPS_OK) return status;
  if (R < 1 || R > kMostRanks || N < 1 || K < 1)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: takes 1 to %lld ranks and at least one row and column of the weight, got "
                     "%lld of [%lld, %lld]; use project and hopper_gemm",
                     who, static_cast<long long>(kMostRanks), static_cast<long long>(R),
                     static_cast<long long>(N), static_cast<long long>(K));
  if (args.s.data != nullptr && args.s.col_stride != 1 && R > 1)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: s must have col_stride 1, got %lld", who,
                     static_cast<long long>(args.s.col_stride));
  status = check_rows("x", args.x);
  if (status == DELTAOPS_OK) status = check_rows("weight", args.weight);
  if (status == DELTAOPS_OK) status = check_rows("a", args.a);
  if (status == DELTAOPS_OK) status = check_rows("b", args.b);
  if (status == DELTAOPS_OK) status = check_rows("s_narrow", args.s_narrow);
  if (status != DELTAOPS_OK) return status;
  const uint64_t bytes = deltaops_cuda_hopper_project_gemm_workspace(M);
  if (args.workspace_bytes < bytes || (args.workspace == nullptr && bytes > 0) ||
      reinterpret_cast<uintptr_t>(args.workspace) % 16 != 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: workspace must have %llu bytes on 16 bytes, got %llu at %p; see "
                     "deltaops_cuda_hopper_project_gemm_workspace",
                     who, static_cast<unsigned long long>(bytes),
                     static_cast<unsigned long long>(args.workspace_bytes), args.workspace);
  if (args.blocks < 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: blocks must be 0 or how many make S, got %d",
                     who, args.blocks);
  return DELTAOPS_OK;
}

}  // namespace

deltaops_status describe_sides(const deltaops_cuda_hopper_project_gemm_args &args,
                               const MapMaker &maps, int32_t cluster, int32_t multiprocessors,
                               GemmArguments *arguments) {
  Sides *sides = &arguments->sides;
  sides->s = static_cast<float *>(args.s.data);
  sides->s_stride = args.s.row_stride;
  sides->narrow = args.s_narrow.data;
  sides->narrow_stride = args.s_narrow.row_stride;
  sides->flags = static_cast<uint32_t *>(args.workspace);
  sides->rows = static_cast<int32_t>(args.x.rows);
  sides->ranks = static_cast<int32_t>(args.a.rows);
  sides->width = sides->ranks <= 16 ? 16 : sides->ranks <= 32 ? 32 : 64;
  sides->scaling = args.scaling;
  sides->blocks = blocks_aside(args.blocks, arguments->schedule, cluster, multiprocessors);
  if (multiprocessors - sides->blocks < cluster)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %d blocks that make S must leave %d of the %d multiprocessors of GPU %d "
                     "to y; ask for fewer, or use project and hopper_gemm",
                     who, sides->blocks, cluster, multiprocessors, args.device);
  /* the schedule counts clusters: a band has as many rows of tiles as one of single blocks, so that
   * the first tiles wait for S of no more rows */
  arguments->schedule.band = Schedule::kBand / cluster;
  return maps.make(&sides->a, with_stride(args.a), sides->width);
}

}  // namespace deltaops::hopper

using namespace deltaops;
using namespace deltaops::hopper;

extern "C" uint64_t deltaops_cuda_hopper_project_gemm_workspace(int64_t M) {
  return M > 0 ? static_cast<uint64_t>(blocks(M, kTileRows)) * sizeof(uint32_t) : 0;
}

extern "C" deltaops_status deltaops_cuda_hopper_project_gemm(
    const deltaops_cuda_hopper_project_gemm_args *args) {
  who = "hopper_project_gemm";
  if (args == nullptr || args->struct_size != sizeof *args)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: struct_size must be %zu, got %u; were caller and library compiled from "
                     "the same deltaops_cuda.h?",
                     who, sizeof *args, args == nullptr ? 0 : args->struct_size);
  const deltaops_cuda_product products[2] = {{args->x, args->weight, 0, 0},
                                             {args->s_narrow, args->b, 0, 0}};
  deltaops_cuda_gemm_args output = {};
  output.struct_size = sizeof output;
  output.device = args->device;
  output.products = products;
  output.num_products = 2;
  output.bias = args->bias;
  output.out = args->out;
  output.stream = args->stream;
  Layout layout;
  deltaops_status status = check_project(*args);
  if (status == DELTAOPS_OK) status = check(&output, 1, &layout);
  if (status != DELTAOPS_OK || args->x.rows == 0) return status;
  return run_on(&output, 1, false, args);
}
