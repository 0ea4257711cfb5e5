/* hopper_gemm.cu: launches the products of hopper/gemm.h: checks them, and describes them to the
 * copy engine. */
#include <stdio.h>

#include "core.h"
#include "hopper/host.h"

namespace deltaops::hopper {

thread_local const char *who = "hopper_gemm";

/* Coordinates are 32-bit, and a tile is added. */
constexpr int64_t kMost = (int64_t{1} << 31) - 512;
constexpr int32_t kStoredRows = 64; /* of a box: what one warpgroup stores at a time */

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

namespace {

/* The matrix that lies in memory where `right` is a transposed view of it. */
Matrix transposed(const Matrix &right) {
  return {right.data, right.cols, right.rows, right.col_stride, right.row_stride, right.dtype, 0};
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
  if (args.multiprocessors < 0 || args.multiprocessors != first.multiprocessors)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: out %d must be given as many multiprocessors as out 0, or 0 for all of "
                     "them, got %d",
                     who, output, args.multiprocessors);
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

}  // namespace

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

namespace {

/* Tiles of 256 columns where S is made `aside` or they give every multiprocessor one, else of 128.
 * Two blocks a cluster where the number of rows of tiles is even, or so large that one more row
 * costs little; single blocks where something else runs beside, which may have taken either of two
 * neighbours. */
Schedule schedule_of(const deltaops_cuda_gemm_args *outputs, int32_t count, int32_t multiprocessors,
                     bool aside, Shape *shape) {
  Schedule schedule = {};
  const int64_t rows = blocks(outputs[0].out.rows, kTileRows);
  const bool alone = outputs[0].multiprocessors == 0;
  const bool room = alone && multiprocessors >= (aside ? 4 : 2); /* for a cluster of each kind */
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

/* run_on() a GPU with so many multiprocessors, which is the current one. */
deltaops_status run(const deltaops_cuda_gemm_args *outputs, int32_t count, bool outer,
                    int32_t multiprocessors,
                    const deltaops_cuda_hopper_project_gemm_args *project) {
  const MapMaker maps;
  if (maps.status() != DELTAOPS_OK) return maps.status();
  GemmArguments arguments = {};
  Shape shape = {};
  shape.outer = outer;
  arguments.schedule = schedule_of(outputs, count, multiprocessors, project != nullptr, &shape);
  const int32_t right_rows = outer ? kBoxColumns : shape.wide ? 128 : 64; /* inner: half a tile */
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

}  // namespace

deltaops_status run_on(const deltaops_cuda_gemm_args *outputs, int32_t count, bool outer,
                       const deltaops_cuda_hopper_project_gemm_args *project) {
  const OnDevice here(outputs[0].device);
  if (here.status() != DELTAOPS_OK) return here.status();
  int multiprocessors = 0;
  const deltaops_status status = multiprocessors_of(outputs[0].device, &multiprocessors);
  if (status != DELTAOPS_OK) return status;
  const int32_t given = outputs[0].multiprocessors;
  if (given > multiprocessors)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: multiprocessors must be at most the %d of GPU %d, got %d", who,
                     multiprocessors, outputs[0].device, given);
  return run(outputs, count, outer, given > 0 ? given : multiprocessors, project);
}

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
