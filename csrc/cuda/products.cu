/* products.cu: the C door to delta_linear's products: checks, the workspace, and who computes them.
 *
 * Both calls become a list of products left right that are summed, one list for each output; an f32
 * S is rounded to the type of x first, M R elements read and written.
 */
#include <initializer_list>

#include "core.h"
#include "hopper/arguments.h"
#include "hopper/tensor_map.h"
#include "primitives/element.h"

namespace deltaops {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;                           /* elements of 16 bytes */
constexpr int64_t kMost = (int64_t{1} << 31) - 512; /* coordinates are 32-bit; a tile is added */
constexpr int kTileRows = 128;

using Matrix = deltaops_matrix;

int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
/* Left out, and not merely empty: torch gives an empty matrix no data either. */
bool absent(const Matrix &matrix) {
  return matrix.data == nullptr && matrix.rows == 0 && matrix.cols == 0;
}

/* One product of a list: left [M, length], right [columns, length], or [length, columns] of a
 * gradient. */
struct Product {
  Matrix left, right;
};

/* What a call asks for, whichever it is. */
struct Work {
  const char *who;
  bool gradient;
  int32_t outputs;
  Matrix out[kMaxOutputs];
  Matrix bias[kMaxOutputs];
  int32_t products[kMaxOutputs]; /* of each output */
  Product product[kMaxSegments]; /* all, one output after the other */
  Mask mask;
};

/* ---- the rounded copy of an f32 S */

template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_rows_kernel(const float *from, int64_t from_stride, T *to, int64_t to_stride,
                      int64_t rows, int64_t columns) {
  const int64_t all = rows * to_stride;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    const int64_t row = i / to_stride, column = i % to_stride;
    to[i] = from_float<T>(column < columns ? from[row * from_stride + column] : 0.0f);
  }
}

/* Its row stride and bytes. */
int64_t copy_stride(const Matrix &s) { return rounded_up(s.cols, kGroup); }
int64_t copy_bytes(const Matrix &s) { return rounded_up(s.rows * copy_stride(s) * 2, 128); }

template <typename T>
deltaops_status round_rows(const Matrix &from, const Matrix &to, void *stream) {
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t blocks = rounded_up(to.rows * to.row_stride, kThreads) / kThreads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cuda_check(
      cudaLaunchKernelEx(&config, round_rows_kernel<T>, static_cast<const float *>(from.data),
                         from.row_stride, static_cast<T *>(to.data), to.row_stride, from.rows,
                         from.cols),
      "launching round_rows");
}

/* ---- checks */

struct Named {
  const char *name;
  const Matrix &matrix;
  int64_t rows, cols; /* what they must be */
};

/* Whether it has the shape, and lies as the copy engine takes it. */
deltaops_status check_matrix(const char *who, const Named &is, int32_t dtype, bool may_be_f32) {
  const Matrix &matrix = is.matrix;
  if (matrix.rows != is.rows || matrix.cols != is.cols)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s must be [%lld, %lld], got [%lld, %lld]",
                     who, is.name, static_cast<long long>(is.rows), static_cast<long long>(is.cols),
                     static_cast<long long>(matrix.rows), static_cast<long long>(matrix.cols));
  const bool wide = may_be_f32 && matrix.dtype == DELTAOPS_F32;
  if (matrix.dtype != dtype && !wide)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: %s must have the first matrix's dtype %d%s, got %d", who, is.name, dtype,
                     may_be_f32 ? " or f32 (0)" : "", matrix.dtype);
  if (matrix.rows == 0 || matrix.cols == 0) return DELTAOPS_OK;
  if (matrix.data == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s must have data, got NULL", who, is.name);
  if (matrix.col_stride != 1 || (matrix.rows > 1 && matrix.row_stride < matrix.cols))
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %s must have col_stride 1 and rows that do not overlap, got strides "
                     "(%lld, %lld); pass it contiguous, or use another backend",
                     who, is.name, static_cast<long long>(matrix.row_stride),
                     static_cast<long long>(matrix.col_stride));
  if (!wide && (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0 ||
                (matrix.rows > 1 && matrix.row_stride % kGroup != 0)))
    return cuda_fail(DELTAOPS_UNSUPPORTED,
                     "%s: %s must have rows on 16 bytes, for the copy engine, got pointer %p and "
                     "row stride %lld; pad its rows to a multiple of 8 elements",
                     who, is.name, matrix.data, static_cast<long long>(matrix.row_stride));
  return DELTAOPS_OK;
}

deltaops_status check_sizes(const char *who, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0 || size > kMost)
      return cuda_fail(size < 0 ? DELTAOPS_INVALID_ARGUMENT : DELTAOPS_UNSUPPORTED,
                       "%s: sizes must be from 0 to %lld, got %lld", who,
                       static_cast<long long>(kMost), static_cast<long long>(size));
  return DELTAOPS_OK;
}

/* Layers must be there and of the caller's and library's one size. */
template <typename Args>
deltaops_status check_structs(const char *who, const Args *layers, int32_t count) {
  if (layers == nullptr || count < 1 || count > DELTAOPS_CUDA_MAX_GROUP)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: count must be 1 to %d layers, got %d%s", who,
                     DELTAOPS_CUDA_MAX_GROUP, count, layers == nullptr ? " and NULL" : "");
  for (int32_t i = 0; i < count; ++i)
    if (layers[i].struct_size != sizeof(Args))
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: struct_size of layer %d must be %zu, got %u; were caller and library "
                       "compiled from the same deltaops_cuda.h?",
                       who, i, sizeof(Args), layers[i].struct_size);
  return DELTAOPS_OK;
}

#define DELTAOPS_TRY(expression)                \
  do {                                          \
    const deltaops_status tried = (expression); \
    if (tried != DELTAOPS_OK) return tried;     \
  } while (0)

deltaops_status check_dtype(const char *who, int32_t dtype) {
  if (dtype == DELTAOPS_BF16 || dtype == DELTAOPS_F16) return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: dtype must be bf16 (1) or f16 (2), got %d", who,
                   dtype);
}

/* Both or neither of a rank part's two matrices. */
deltaops_status check_pair(const char *who, const char *left, const Matrix &one, const char *right,
                           const Matrix &other) {
  if (absent(one) == absent(other)) return DELTAOPS_OK;
  return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: %s and %s must both be there or both be absent",
                   who, left, right);
}

void add_product(Work *work, int32_t output, const Matrix &left, const Matrix &right) {
  if (left.cols == 0) return;
  int32_t at = 0;
  for (int32_t i = 0; i <= output; ++i) at += work->products[i];
  work->product[at] = {left, right};
  ++work->products[output];
}

deltaops_status read_outputs(const deltaops_cuda_outputs_args *layers, int32_t count, Work *work) {
  constexpr const char *who = "outputs";
  DELTAOPS_TRY(check_structs(who, layers, count));
  const Matrix &x = layers[0].x;
  const int32_t dtype = x.dtype;
  DELTAOPS_TRY(check_dtype(who, dtype));
  *work = {};
  work->who = who;
  work->outputs = count;
  for (int32_t i = 0; i < count; ++i) {
    const deltaops_cuda_outputs_args &layer = layers[i];
    const int64_t m = x.rows, k = x.cols, n = layer.weight.rows, r = layer.s.cols;
    DELTAOPS_TRY(check_sizes(who, {m, k, n}));
    if (layer.x.data != x.data || layer.x.row_stride != x.row_stride)
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "%s: x of layer %d must be that of the first",
                       who, i);
    DELTAOPS_TRY(check_matrix(who, {"x", layer.x, m, k}, dtype, false));
    DELTAOPS_TRY(check_matrix(who, {"weight", layer.weight, n, k}, dtype, false));
    DELTAOPS_TRY(check_matrix(who, {"y", layer.y, m, n}, dtype, false));
    if (!absent(layer.bias))
      DELTAOPS_TRY(check_matrix(who, {"bias", layer.bias, 1, n}, dtype, false));
    DELTAOPS_TRY(check_pair(who, "s", layer.s, "b", layer.b));
    if (!absent(layer.s)) {
      DELTAOPS_TRY(check_sizes(who, {r}));
      DELTAOPS_TRY(check_matrix(who, {"s", layer.s, m, r}, dtype, true));
      DELTAOPS_TRY(check_matrix(who, {"b", layer.b, n, r}, dtype, false));
    }
    work->out[i] = layer.y;
    work->bias[i] = layer.bias;
    add_product(work, i, layer.x, layer.weight);
    add_product(work, i, layer.s, layer.b);
    if (work->products[i] == 0 && m > 0 && n > 0)
      return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: K must be at least 1, got 0", who);
  }
  return DELTAOPS_OK;
}

deltaops_status read_grad_input(const deltaops_cuda_grad_input_args *layers, int32_t count,
                                Work *work) {
  constexpr const char *who = "grad_input";
  DELTAOPS_TRY(check_structs(who, layers, count));
  const Matrix &grad_x = layers[0].grad_x;
  const int64_t m = grad_x.rows, k = grad_x.cols;
  const int32_t dtype = grad_x.dtype;
  DELTAOPS_TRY(check_dtype(who, dtype));
  DELTAOPS_TRY(check_sizes(who, {m, k}));
  DELTAOPS_TRY(check_matrix(who, {"grad_x", grad_x, m, k}, dtype, false));
  *work = {};
  work->who = who;
  work->gradient = true;
  work->outputs = 1;
  work->out[0] = grad_x;
  for (int32_t i = 0; i < count; ++i) { /* first the rank parts: a mask acts on the first */
    const deltaops_cuda_grad_input_args &layer = layers[i];
    const int64_t n = layer.weight.rows, r = layer.grad_s.cols;
    DELTAOPS_TRY(check_sizes(who, {n}));
    if (i > 0 && !absent(layer.grad_x))
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: grad_x is the first layer's, and must be absent in layer %d", who, i);
    DELTAOPS_TRY(check_matrix(who, {"grad_y", layer.grad_y, m, n}, dtype, false));
    DELTAOPS_TRY(check_matrix(who, {"weight", layer.weight, n, k}, dtype, false));
    DELTAOPS_TRY(check_pair(who, "grad_s", layer.grad_s, "a", layer.a));
    if (!absent(layer.grad_s)) {
      DELTAOPS_TRY(check_sizes(who, {r}));
      DELTAOPS_TRY(check_matrix(who, {"grad_s", layer.grad_s, m, r}, dtype, true));
      DELTAOPS_TRY(check_matrix(who, {"a", layer.a, r, k}, dtype, false));
    }
    if (layer.drop_threshold > 65536)
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: drop_threshold must be p * 65536, so 0 to 65536, got %u", who,
                       layer.drop_threshold);
    if (layer.drop_threshold > 0 && layer.seed == nullptr)
      return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                       "%s: seed must point to one 64-bit value on the GPU, got NULL", who);
    if (layer.drop_threshold > 0 && count > 1)
      return cuda_fail(DELTAOPS_UNSUPPORTED,
                       "%s: dropout needs an accumulator of its own for each layer, so it is taken "
                       "for one layer alone, got %d; call it layer by layer, or another backend",
                       who, count);
    add_product(work, 0, layer.grad_s, layer.a);
  }
  const deltaops_cuda_grad_input_args &first = layers[0];
  if (first.drop_threshold > 0 && work->products[0] > 0)
    work->mask = {first.seed, first.stream, first.drop_threshold,
                  first.drop_threshold < 65536
                      ? 65536.0f / static_cast<float>(65536 - first.drop_threshold)
                      : 0.0f};
  for (int32_t i = 0; i < count; ++i) add_product(work, 0, layers[i].grad_y, layers[i].weight);
  if (work->products[0] == 0 && m > 0 && k > 0)
    return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: N must be at least 1, got 0", who);
  return DELTAOPS_OK;
}

int64_t workspace_bytes(const Work &work) {
  int64_t bytes = 0;
  for (const Product &product : work.product)
    if (!absent(product.left) && product.left.dtype == DELTAOPS_F32)
      bytes += copy_bytes(product.left);
  return bytes;
}

/* ---- running */

/* With every f32 S rounded into the workspace. */
deltaops_status round_all(Work *work, int32_t dtype, void *workspace, void *stream) {
  auto *at = static_cast<uint8_t *>(workspace);
  for (Product &product : work->product) {
    const Matrix wide = product.left;
    if (absent(wide) || wide.dtype != DELTAOPS_F32) continue;
    product.left = {at, wide.rows, wide.cols, copy_stride(wide), 1, dtype, 0};
    at += copy_bytes(wide);
    DELTAOPS_TRY(dtype == DELTAOPS_BF16 ? round_rows<__nv_bfloat16>(wide, product.left, stream)
                                        : round_rows<__half>(wide, product.left, stream));
  }
  return DELTAOPS_OK;
}

/* A single row may have any stride: then one that the copy engine takes. */
Matrix as_described(Matrix matrix) {
  if (matrix.rows == 1) matrix.row_stride = rounded_up(matrix.cols, kGroup);
  return matrix;
}

/* Tiles of 256 columns where they keep all multiprocessors busy, else of 128. */
Schedule schedule_of(const Work &work, int32_t multiprocessors, bool *wide) {
  Schedule schedule = {};
  schedule.rows = static_cast<int32_t>((work.out[0].rows + kTileRows - 1) / kTileRows);
  schedule.outputs = work.outputs;
  for (const int32_t width : {256, 128}) {
    for (int32_t i = 0; i < work.outputs; ++i)
      schedule.columns[i] = static_cast<int32_t>((work.out[i].cols + width - 1) / width);
    *wide = width == 256;
    if (schedule.tiles() >= multiprocessors) break;
  }
  return schedule;
}

deltaops_status run(Work *work, int32_t device, void *workspace, int64_t bytes, void *stream) {
  const int64_t needed = workspace_bytes(*work);
  if (needed > 0 &&
      (workspace == nullptr || bytes < needed || reinterpret_cast<uintptr_t>(workspace) % 16 != 0))
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "%s: the workspace must have %lld bytes on 16 bytes, got %lld at %p",
                     work->who, static_cast<long long>(needed), static_cast<long long>(bytes),
                     workspace);
  int64_t elements = 0;
  for (int32_t i = 0; i < work->outputs; ++i) elements += work->out[i].rows * work->out[i].cols;
  if (elements == 0) return DELTAOPS_OK;
  const OnDevice here(device);
  DELTAOPS_TRY(here.status());
  int major = 0, minor = 0, multiprocessors = 0;
  DELTAOPS_TRY(cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                          "asking a GPU"));
  DELTAOPS_TRY(cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                          "asking a GPU"));
  DELTAOPS_TRY(
      cuda_check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                 "asking a GPU"));
  if (major != 9 || minor != 0)
    return cuda_fail(
        DELTAOPS_UNSUPPORTED,
        "%s: runs on Hopper (compute capability 9.0), GPU %d has %d.%d; use the Triton "
        "backend",
        work->who, device, major, minor);
#if DELTAOPS_HOPPER
  const int32_t dtype = work->out[0].dtype;
  const MapMaker maps;
  DELTAOPS_TRY(maps.status());
  GemmArguments arguments = {};
  Shape shape = {};
  shape.gradient = work->gradient;
  arguments.schedule = schedule_of(*work, multiprocessors, &shape.wide);
  arguments.rows = static_cast<int32_t>(work->out[0].rows);
  arguments.mask = work->mask;
  DELTAOPS_TRY(round_all(work, dtype, workspace, stream));
  const int32_t right_rows = work->gradient ? kBoxColumns : shape.wide ? 256 : 128;
  int32_t segment = 0;
  for (int32_t i = 0; i < work->outputs; ++i) {
    const Matrix &out = work->out[i];
    arguments.output[i] = {
        out.data, work->bias[i].data, as_described(out).row_stride, static_cast<int32_t>(out.cols),
        segment,  work->products[i]};
    for (int32_t j = 0; j < work->products[i]; ++j, ++segment) {
      const Product &product = work->product[segment];
      arguments.length[segment] = static_cast<int32_t>(product.left.cols);
      DELTAOPS_TRY(maps.make(&arguments.left[segment], as_described(product.left), kTileRows));
      DELTAOPS_TRY(maps.make(&arguments.right[segment], as_described(product.right), right_rows));
    }
  }
  return dtype == DELTAOPS_BF16 ? launch_hopper_bf16(arguments, shape, multiprocessors, stream)
                                : launch_hopper_f16(arguments, shape, multiprocessors, stream);
#else
  return cuda_fail(DELTAOPS_UNSUPPORTED,
                   "%s: this library was compiled for sm_%s, and Hopper needs 90a; rebuild with it "
                   "in DELTAOPS_CUDA_ARCHS",
                   work->who, DELTAOPS_CUDA_ARCHS);
#endif
}

}  // namespace
}  // namespace deltaops

using namespace deltaops;

extern "C" {

deltaops_status deltaops_cuda_outputs_workspace(const deltaops_cuda_outputs_args *layers,
                                                int32_t count, int64_t *bytes) {
  Work work;
  const deltaops_status status = read_outputs(layers, count, &work);
  if (status == DELTAOPS_OK) *bytes = workspace_bytes(work);
  return status;
}

deltaops_status deltaops_cuda_outputs(int32_t device, const deltaops_cuda_outputs_args *layers,
                                      int32_t count, void *workspace, int64_t bytes, void *stream) {
  Work work;
  const deltaops_status status = read_outputs(layers, count, &work);
  return status == DELTAOPS_OK ? run(&work, device, workspace, bytes, stream) : status;
}

deltaops_status deltaops_cuda_grad_input_workspace(const deltaops_cuda_grad_input_args *layers,
                                                   int32_t count, int64_t *bytes) {
  Work work;
  const deltaops_status status = read_grad_input(layers, count, &work);
  if (status == DELTAOPS_OK) *bytes = workspace_bytes(work);
  return status;
}

deltaops_status deltaops_cuda_grad_input(int32_t device,
                                         const deltaops_cuda_grad_input_args *layers, int32_t count,
                                         void *workspace, int64_t bytes, void *stream) {
  Work work;
  const deltaops_status status = read_grad_input(layers, count, &work);
  return status == DELTAOPS_OK ? run(&work, device, workspace, bytes, stream) : status;
}
}
