/* hopper_gemm.cu: launches the products of hopper/gemm.h and project.h: checks them, and describes
 * them to the copy engine. */
#include <stdio.h>

#include "core.h"
#include "hopper/arguments.h"
#include "hopper/tensor_map.h"

namespace deltaops::hopper {
namespace {

thread_local const char *who = "hopper_gemm"; /* the function that was called */
constexpr int64_t kMost =
    (int64_t{1} << 31) - 512;      /* coordinates are 32-bit, and a tile is added */
constexpr int64_t kRow = 8;        /* elements of 16 bytes */
constexpr int32_t kLeastAside = 4; /* blocks that make S: fewer read x for longer than y takes */
constexpr int64_t kMostRanks = 64;
constexpr int32_t kTileRows = 128, kStoredRows = 64; /* of a tile; that one warpgroup stores */

using Matrix = deltaops_matrix;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/* How the right matrices lie; one way must hold for all of them. */
struct Layout {
  bool inner = true; /* contracted elements side by side */
  bool outer = true; /* columns of out side by side */

  void see(const Matrix &right) {
    inner = inner && (right.col_stride == 1 || right.cols <= 1);
    outer = outer && (right.row_stride == 1 || right.rows <= 1);
  }
};

/* The matrix that lies in memory where `right` is a transposed view of it. */
Matrix transposed(const Matrix &right) {
  return {right.data, right.cols, right.rows, right.col_stride, right.row_stride, right.dtype, 0};
}

/* A single row may have any stride: then one that the copy engine takes. */
Matrix with_stride(Matrix matrix) {
  if (matrix.rows <= 1) matrix.row_stride = blocks(matrix.cols, kRow) * kRow;
  return matrix;
}

deltaops_status check_shape(const char *name, const Matrix &matrix, int64_t rows, int64_t cols,
                            int32_t dtype) {
  if (matrix.rows != rows || matrix.cols != cols || matrix.dtype != dtype)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: %s must be [%lld, %lld] of dtype %d, got [%lld, %lld] of dtype %d", who,
                     name, static_cast<long long>(rows), static_cast<long long>(cols), dtype,
                     static_cast<long long>(matrix.rows), static_cast<long long>(matrix.cols),
                     matrix.dtype);
  if (rows < 0 || cols < 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s must have sizes >= 0, got [%lld, %lld]",
                     who, name, static_cast<long long>(rows), static_cast<long long>(cols));
  if (rows > kMost || cols > kMost)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: %s must have sizes up to %lld, got [%lld, %lld]",
                     who, name, static_cast<long long>(kMost), static_cast<long long>(rows),
                     static_cast<long long>(cols));
  if (matrix.data == nullptr && rows > 0 && cols > 0)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s must have data, got NULL", who, name);
  return DELTAOPS_OK;
}

/* Whether the copy engine can read it. */
deltaops_status check_rows(const char *name, const Matrix &matrix) {
  if (matrix.rows == 0 || matrix.cols == 0) return DELTAOPS_OK;
  if ((matrix.col_stride != 1 && matrix.cols > 1) ||
      (matrix.rows > 1 && matrix.row_stride < matrix.cols))
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %s must have elements side by side in rows that do not overlap, got "
                     "strides %lld and %lld; pass a contiguous tensor",
                     who, name, static_cast<long long>(matrix.row_stride),
                     static_cast<long long>(matrix.col_stride));
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0 ||
      (matrix.rows > 1 && matrix.row_stride % kRow != 0))
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %s must have rows on 16 bytes, got pointer %p and row stride %lld; pad "
                     "rows to a multiple of %lld elements, or use triton",
                     who, name, matrix.data, static_cast<long long>(matrix.row_stride),
                     static_cast<long long>(kRow));
  return DELTAOPS_OK;
}

/* A product's name in a sentence. */
struct Name {
  char text[48];
  Name(const char *side, int32_t product, int32_t output) {
    snprintf(text, sizeof text, "%s of product %d of out %d", side, product, output);
  }
};

deltaops_status check_products(const deltaops_cuda_gemm_args &args, int32_t output,
                               Layout *layout) {
  int32_t masked = 0;
  for (int32_t i = 0; i < args.num_products; ++i) {
    const deltaops_cuda_product &product = args.products[i];
    const Name left("left", i, output), right("right", i, output);
    const int64_t length = product.left.cols;
    deltaops_status status =
        check_shape(left.text, product.left, args.out.rows, length, args.out.dtype);
    if (status == DELTAOPS_OK) status = check_rows(left.text, product.left);
    if (status == DELTAOPS_OK)
      status = check_shape(right.text, product.right, args.out.cols, length, args.out.dtype);
    if (status != DELTAOPS_OK) return status;
    if (length == 0)
      return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: %s must have at least 1 column, got 0", who,
                       left.text);
    if (product.drop_threshold > 65536)
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: drop_threshold must be p * 65536, so 0 to 65536, got %u", who,
                       product.drop_threshold);
    if (product.drop_threshold > 0 && args.seed == nullptr)
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: seed must point to one 64-bit value on the GPU where something is "
                       "dropped, got NULL",
                       who);
    masked += product.drop_threshold > 0;
    layout->see(product.right);
  }
  if (masked > 1)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: one product of an output may have a mask (each takes an accumulator of "
                     "its own), got %d; use ampere_gemm or triton",
                     who, masked);
  if (masked > 0) layout->inner = false;
  return DELTAOPS_OK;
}

/* Whether the copy engine can write it, and nothing beyond the ends of its rows. */
deltaops_status check_written(const Matrix &out) {
  if (out.cols % kRow != 0)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: out must have a multiple of %lld columns, since the copy engine writes "
                     "16 bytes at a time, got %lld; use ampere_gemm or triton",
                     who, static_cast<long long>(kRow), static_cast<long long>(out.cols));
  return check_rows("out", out);
}

deltaops_status check_output(const deltaops_cuda_gemm_args &args, int32_t output,
                             const deltaops_cuda_gemm_args &first, Layout *layout) {
  if (args.struct_size != sizeof args)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: struct_size of out %d must be %zu, got %u; were caller and library "
                     "compiled from the same deltaops_cuda.h?",
                     who, output, sizeof args, args.struct_size);
  if (args.device != first.device || args.stream != first.stream)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: out %d must have the device and stream of out 0, got device %d and "
                     "stream %p",
                     who, output, args.device, args.stream);
  if (args.out.dtype != DELTAOPS_BF16 && args.out.dtype != DELTAOPS_F16)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: dtype must be bf16 (1) or f16 (2), got %d", who,
                     args.out.dtype);
  if (args.num_products < 1 || args.products == nullptr)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: out %d must have products, got %d at %p", who,
                     output, args.num_products, static_cast<const void *>(args.products));
  deltaops_status status =
      check_shape("out", args.out, first.out.rows, args.out.cols, first.out.dtype);
  if (status == DELTAOPS_OK) status = check_written(args.out);
  if (status == DELTAOPS_OK && args.bias.data != nullptr) {
    status = check_shape("bias", args.bias, 1, args.out.cols, args.out.dtype);
    if (status == DELTAOPS_OK && args.bias.col_stride != 1 && args.bias.cols > 1)
      status = cuda_fail(DELTAOPS_UNSUPPORTED, "%s: bias must have col_stride 1, got %lld", who,
                         static_cast<long long>(args.bias.col_stride));
  }
  return status == DELTAOPS_OK ? check_products(args, output, layout) : status;
}

/* Of all, and how their right matrices lie: layout->inner wherever that holds. */
deltaops_status check(const deltaops_cuda_gemm_args *outputs, int32_t count, Layout *layout) {
  if (outputs == nullptr || count < 1 || count > kMaxOutputs)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: takes 1 to %d outputs, got %d at %p", who,
                     kMaxOutputs, count, static_cast<const void *>(outputs));
  int64_t products = 0;
  for (int32_t i = 0; i < count; ++i) {
    const deltaops_status status = check_output(outputs[i], i, outputs[0], layout);
    if (status != DELTAOPS_OK) return status;
    products += outputs[i].num_products;
  }
  if (products > kMaxSegments)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: takes at most %d products together, got %lld; launch the outputs one by "
                     "one",
                     who, kMaxSegments, static_cast<long long>(products));
  if (!layout->inner && !layout->outer)
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: the right matrices must all have col_stride 1, or all row_stride 1, as "
                     "they must with a mask; pass contiguous tensors or transposed views of such",
                     who);
  for (int32_t i = 0; i < count; ++i)
    for (int32_t j = 0; j < outputs[i].num_products; ++j) {
      const Matrix &right = outputs[i].products[j].right;
      const deltaops_status status =
          check_rows(Name("right", j, i).text, layout->inner ? right : transposed(right));
      if (status != DELTAOPS_OK) return status;
    }
  return DELTAOPS_OK;
}

/* Tiles of 256 columns where S is made `aside` or they give every multiprocessor one, else of 128.
 * Two blocks a cluster where the rows of tiles are even, or so many that one more costs little. */
Schedule schedule_of(const deltaops_cuda_gemm_args *outputs, int32_t count, int32_t multiprocessors,
                     bool aside, Shape *shape) {
  Schedule schedule = {};
  const int64_t rows = blocks(outputs[0].out.rows, kTileRows);
  const bool room = multiprocessors >= (aside ? 4 : 2); /* for a cluster of each kind */
  shape->cluster = room && (rows % 2 == 0 || rows > 16) ? 2 : 1;
  schedule.rows = static_cast<int32_t>(blocks(rows, shape->cluster));
  schedule.outputs = count;
  for (const int32_t width : {256, 128}) {
    for (int32_t i = 0; i < count; ++i)
      schedule.columns[i] = static_cast<int32_t>(blocks(outputs[i].out.cols, width));
    shape->wide = width == 256;
    if (aside || schedule.tiles() * shape->cluster >= multiprocessors) break;
  }
  return schedule;
}

Mask mask_of(const deltaops_cuda_product &product, const uint64_t *seed) {
  const uint32_t threshold = product.drop_threshold;
  const float scale = threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
  return {seed, product.branch_stream, threshold, scale};
}

/* Adds output `number` to the launch, its masked product first. */
deltaops_status describe(const deltaops_cuda_gemm_args &args, const MapMaker &maps, bool outer,
                         int32_t right_rows, int32_t *segment, GemmArguments *arguments,
                         int32_t number) {
  Output *output = &arguments->output[number];
  *output = {args.bias.data, static_cast<int32_t>(args.out.cols), *segment, args.num_products, {}};
  deltaops_status status = maps.make(&arguments->out[number], with_stride(args.out), kStoredRows);
  if (status != DELTAOPS_OK) return status;
  for (const bool masked : {true, false})
    for (int32_t i = 0; i < args.num_products; ++i) {
      const deltaops_cuda_product &product = args.products[i];
      if ((product.drop_threshold > 0) != masked) continue;
      if (masked) output->mask = mask_of(product, args.seed);
      arguments->length[*segment] = static_cast<int32_t>(product.left.cols);
      status = maps.make(&arguments->left[*segment], with_stride(product.left), kTileRows);
      if (status == DELTAOPS_OK)
        status =
            maps.make(&arguments->right[*segment],
                      with_stride(outer ? transposed(product.right) : product.right), right_rows);
      if (status != DELTAOPS_OK) return status;
      ++*segment;
    }
  return DELTAOPS_OK;
}

deltaops_status attribute(int *value, cudaDeviceAttr which, int32_t device) {
  return cuda_check(cudaDeviceGetAttribute(value, which, device), "asking a GPU what it is");
}

/* Its multiprocessors, where it is a Hopper. */
deltaops_status multiprocessors_of(int32_t device, int *multiprocessors) {
  int major = 0, minor = 0;
  deltaops_status status = attribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == DELTAOPS_OK) status = attribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == DELTAOPS_OK)
    status = attribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != DELTAOPS_OK || (major == 9 && minor == 0)) return status;
  return cuda_fail(DELTAOPS_UNSUPPORTED,
                   "%s: runs on Hopper (compute capability 9.0), and GPU %d has %d.%d; use "
                   "ampere_gemm or triton",
                   who, device, major, minor);
}

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

/* The part of the launch that makes S. */
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
    return cuda_fail(
        DELTAOPS_UNSUPPORTED,
        "%s: %d blocks that make S must leave some of the %d multiprocessors of GPU %d "
        "to y; ask for fewer, or use hopper_gemm",
        who, sides->blocks, multiprocessors, args.device);
  /* the first tiles want S soonest: as few rows of tiles as one band of single blocks has */
  arguments->schedule.band = Schedule::kBand / cluster;
  return maps.make(&sides->a, with_stride(args.a), sides->width);
}

/* `project`: the S that the launch makes too, of the only output; or NULL. */
deltaops_status run(const deltaops_cuda_gemm_args *outputs, int32_t count, bool outer,
                    int32_t multiprocessors,
                    const deltaops_cuda_hopper_project_gemm_args *project) {
  const MapMaker maps;
  if (maps.status() != DELTAOPS_OK) return maps.status();
  GemmArguments arguments = {};
  Shape shape = {};
  shape.outer = outer;
  arguments.schedule = schedule_of(outputs, count, multiprocessors, project != nullptr, &shape);
  const int32_t right_rows = outer ? kBoxColumns : shape.wide ? 128 : 64; /* half a tile */
  int32_t segment = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (outputs[i].out.cols == 0) continue;
    const deltaops_status status =
        describe(outputs[i], maps, outer, right_rows, &segment, &arguments, i);
    if (status != DELTAOPS_OK) return status;
  }
  if (project != nullptr) {
    const deltaops_status status =
        describe_sides(*project, maps, shape.cluster, multiprocessors, &arguments);
    if (status != DELTAOPS_OK) return status;
  }
#if DELTAOPS_HOPPER
  if (project != nullptr) {
    const deltaops_status status =
        cuda_check(cudaMemsetAsync(project->workspace, 0,
                                   deltaops_cuda_hopper_project_gemm_workspace(project->x.rows),
                                   static_cast<cudaStream_t>(project->stream)),
                   "clearing the flags of S");
    if (status != DELTAOPS_OK) return status;
  }
  auto *launch = outputs[0].out.dtype == DELTAOPS_BF16 ? launch_hopper_bf16 : launch_hopper_f16;
  return launch(arguments, shape, multiprocessors, outputs[0].stream);
#else
  return cuda_fail(DELTAOPS_UNSUPPORTED,
                   "%s: this library was compiled for sm_%s, and it needs 90a; rebuild with it in "
                   "DELTAOPS_CUDA_ARCHS",
                   who, DELTAOPS_CUDA_ARCHS);
#endif
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
  if (status == DELTAOPS_OK) status = check_written(args.out);
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

/* Checked outputs, on their GPU. */
deltaops_status run_on(const deltaops_cuda_gemm_args *outputs, int32_t count, bool outer,
                       const deltaops_cuda_hopper_project_gemm_args *project) {
  const OnDevice here(outputs[0].device);
  if (here.status() != DELTAOPS_OK) return here.status();
  int multiprocessors = 0;
  const deltaops_status status = multiprocessors_of(outputs[0].device, &multiprocessors);
  return status == DELTAOPS_OK ? run(outputs, count, outer, multiprocessors, project) : status;
}

}  // namespace
}  // namespace deltaops::hopper

using namespace deltaops;
using namespace deltaops::hopper;

extern "C" deltaops_status deltaops_cuda_hopper_gemm(const deltaops_cuda_gemm_args *outputs,
                                                     int32_t count) {
  who = "hopper_gemm";
  Layout layout;
  deltaops_status status = check(outputs, count, &layout);
  if (status != DELTAOPS_OK) return status;
  int64_t columns = 0;
  for (int32_t i = 0; i < count; ++i) columns += outputs[i].out.cols;
  if (outputs[0].out.rows == 0 || columns == 0) return DELTAOPS_OK;
  return run_on(outputs, count, !layout.inner, nullptr);
}

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
