/* every_launch.c: each launch of the CUDA library once, on ragged shapes, for compute-sanitizer.
 *
 *     every_launch [ROWS...]      of x; 1, 7 and 300 where none are named
 *
 * What comes out is not looked at here: test_on_gpu.py does that. Ends with 1 where a call fails.
 */
#include <cuda_runtime_api.h>
#include <deltaops_cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICE = 0, STREAM = 3, THRESHOLD = 13107, MOST = 4096 };

static void *held[MOST];
static int holds;
static int32_t dtype;
static const uint64_t *seed;

static void must(const char *call, deltaops_status status) {
  if (status == DELTAOPS_OK) return;
  fprintf(stderr, "%s: %s\n", call, deltaops_cuda_last_error());
  exit(EXIT_FAILURE);
}
static void must_run(const char *call, cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  exit(EXIT_FAILURE);
}

/* Small numbers in any type: each byte is 0x3C. */
static void *on_gpu(uint64_t bytes) {
  void *data = NULL;
  if (holds == MOST) exit(EXIT_FAILURE);
  must_run("cudaMalloc", cudaMalloc(&data, bytes ? bytes : 1));
  must_run("cudaMemset", cudaMemset(data, 0x3C, bytes));
  return held[holds++] = data;
}
static void give_back(void) {
  must_run("a launch", cudaDeviceSynchronize());
  while (holds > 1) must_run("cudaFree", cudaFree(held[--holds])); /* the seed stays */
}

static deltaops_matrix of(int32_t kind, int64_t rows, int64_t cols) {
  const uint64_t bytes = (uint64_t)(rows * cols) * (kind == DELTAOPS_F32 ? 4 : 2);
  deltaops_matrix m = {on_gpu(bytes), rows, cols, cols, 1, kind, 0};
  return m;
}
static deltaops_matrix matrix(int64_t rows, int64_t cols) { return of(dtype, rows, cols); }
static deltaops_matrix across(deltaops_matrix m) {
  deltaops_matrix t = {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype, 0};
  return t;
}

typedef deltaops_status launch_gemm(const deltaops_cuda_gemm_args *);

static deltaops_status one_hopper(const deltaops_cuda_gemm_args *args) {
  return deltaops_cuda_hopper_gemm(args, 1);
}

static deltaops_cuda_gemm_args gemm(const deltaops_cuda_product *products, deltaops_matrix out) {
  deltaops_cuda_gemm_args args = {0};
  args.struct_size = sizeof args;
  args.device = DEVICE;
  args.products = products;
  args.num_products = 2;
  args.out = out;
  args.seed = seed;
  return args;
}

/* y and dx of a layer, with and without a mask. */
static void products(const char *call, launch_gemm *launch, int64_t M, int64_t N, int64_t K,
                     int64_t R) {
  const deltaops_matrix x = matrix(M, K), w = matrix(N, K), s = matrix(M, R), b = matrix(N, R),
                        g = matrix(M, N), a = matrix(R, K);
  const deltaops_cuda_product there[2] = {{x, w, 0, 0}, {s, b, 0, 0}};
  deltaops_cuda_gemm_args args = gemm(there, matrix(M, N));
  args.bias = matrix(1, N);
  must(call, launch(&args));
  for (uint32_t threshold = 0; threshold <= THRESHOLD; threshold += THRESHOLD) {
    const deltaops_cuda_product back[2] = {{g, across(w), 0, 0}, {s, across(a), threshold, STREAM}};
    args = gemm(back, matrix(M, K));
    must(call, launch(&args));
  }
}

/* S and y of a layer in a launch. */
static void together(int64_t M, int64_t N, int64_t K, int64_t R) {
  deltaops_cuda_hopper_project_gemm_args args = {0};
  args.struct_size = sizeof args;
  args.device = DEVICE;
  args.x = matrix(M, K);
  args.weight = matrix(N, K);
  args.a = matrix(R, K);
  args.b = matrix(N, R);
  args.bias = matrix(1, N);
  args.s = of(DELTAOPS_F32, M, R);
  args.s_narrow = matrix(M, R);
  args.out = matrix(M, N);
  args.scaling = 2.0f;
  args.workspace_bytes = deltaops_cuda_hopper_project_gemm_workspace(M);
  args.workspace = on_gpu(args.workspace_bytes);
  must("hopper_project_gemm", deltaops_cuda_hopper_project_gemm(&args));
}

/* Two layers of one x in a launch. */
static void group(int64_t M, int64_t N, int64_t K, int64_t R) {
  const deltaops_matrix x = matrix(M, K), s = matrix(M, R);
  const deltaops_cuda_product one[2] = {{x, matrix(N, K), 0, 0}, {s, matrix(N, R), 0, 0}};
  const deltaops_cuda_product two[2] = {{x, matrix(8, K), 0, 0}, {s, matrix(8, R), 0, 0}};
  const deltaops_cuda_gemm_args both[2] = {gemm(one, matrix(M, N)), gemm(two, matrix(M, 8))};
  must("a group", deltaops_cuda_hopper_gemm(both, 2));
}

static void passes(int64_t M, int64_t N, int64_t K, int64_t R, uint32_t threshold) {
  const deltaops_matrix x = matrix(M, K), s = matrix(M, R), g = matrix(M, N);
  deltaops_cuda_project_args project = {0};
  project.struct_size = sizeof project;
  project.x = x;
  project.a = matrix(R, K);
  project.s = of(DELTAOPS_F32, M, R);
  project.s_narrow = matrix(M, R);
  project.scaling = 2.0f;
  project.drop_threshold = threshold;
  project.branch_stream = STREAM;
  project.seed = seed;
  project.workspace_bytes = deltaops_cuda_project_workspace(M, K, R);
  project.workspace = on_gpu(project.workspace_bytes);
  must("project", deltaops_cuda_project(&project));

  deltaops_cuda_grad_up_args up = {0};
  up.struct_size = sizeof up;
  up.grad_y = g;
  up.b = matrix(N, R);
  up.s_narrow = s;
  up.grad_s = of(DELTAOPS_F32, M, R);
  up.grad_s_narrow = matrix(M, R);
  up.grad_b = matrix(N, R);
  up.grad_bias = matrix(1, N);
  up.scaling = 2.0f;
  up.workspace_bytes = deltaops_cuda_grad_up_workspace(M, N, R);
  up.workspace = on_gpu(up.workspace_bytes);
  must("grad_up", deltaops_cuda_grad_up(&up));

  deltaops_cuda_grad_down_args down = {0};
  down.struct_size = sizeof down;
  down.grad_s_narrow = s;
  down.x = x;
  down.grad_a = matrix(R, K);
  down.drop_threshold = threshold;
  down.branch_stream = STREAM;
  down.seed = seed;
  down.workspace_bytes = deltaops_cuda_grad_down_workspace(M, K, R);
  down.workspace = on_gpu(down.workspace_bytes);
  must("grad_down", deltaops_cuda_grad_down(&down));
}

static void producers(int64_t M, int64_t K, uint32_t threshold) {
  deltaops_cuda_branch branches[2];
  memset(branches, 0, sizeof branches);
  for (int i = 0; i < 2; ++i) {
    const int64_t R = i ? 72 : 16;
    branches[i].a = matrix(R, K);
    branches[i].s = of(DELTAOPS_F32, M, R);
    branches[i].s_narrow = matrix(M, R);
    branches[i].scaling = 2.0f;
    branches[i].drop_threshold = threshold;
    branches[i].branch_stream = STREAM;
    branches[i].seed = seed;
  }
  deltaops_cuda_rms_norm_project_args norm = {0};
  norm.struct_size = sizeof norm;
  norm.x = matrix(M, K);
  norm.gamma = matrix(1, K);
  norm.y = matrix(M, K);
  norm.rstd = of(DELTAOPS_F32, M, 1);
  norm.eps = 1e-5f;
  norm.num_branches = 2;
  norm.branches = branches;
  must("rms_norm_project", deltaops_cuda_rms_norm_project(&norm));

  deltaops_cuda_swiglu_project_args swiglu = {0};
  swiglu.struct_size = sizeof swiglu;
  swiglu.gate = matrix(M, K);
  swiglu.up = matrix(M, K);
  swiglu.y = matrix(M, K);
  swiglu.num_branches = 2;
  swiglu.branches = branches;
  must("swiglu_project", deltaops_cuda_swiglu_project(&swiglu));
}

static void decoding(int64_t M, int64_t N, int64_t K, int64_t R) {
  for (int32_t kind = DELTAOPS_CUDA_INT8; kind <= DELTAOPS_CUDA_NF4; ++kind) {
    const deltaops_cuda_product rank = {matrix(M, R), matrix(N, R), 0, 0};
    deltaops_cuda_quantized_gemv_args args = {0};
    args.struct_size = sizeof args;
    args.x = matrix(M, K);
    args.weight.codes = on_gpu((uint64_t)(N * K));
    args.weight.scales = on_gpu(4 * (uint64_t)(N * K)); /* of either kind */
    args.weight.rows = N;
    args.weight.cols = K;
    args.weight.block = 64;
    args.weight.kind = kind;
    args.rest = gemm(&rank, matrix(M, N));
    args.rest.num_products = 1;
    must("quantized_gemv", deltaops_cuda_ampere_quantized_gemv(&args));
  }
}

static void dropout(int64_t M, int64_t K) {
  const deltaops_matrix x = matrix(M, K), y = matrix(M, K);
  uint8_t *keep = on_gpu((uint64_t)(M * K));
  must("dropout_mask",
       deltaops_cuda_dropout_mask(DEVICE, keep, K, M, K, seed, STREAM, THRESHOLD, NULL));
  if (dtype != DELTAOPS_F16) /* not taken */
    must("dropout_apply",
         deltaops_cuda_dropout_apply(DEVICE, &x, &y, seed, STREAM, THRESHOLD, NULL));
}

#ifdef DELTAOPS_EMULATED /* by tests/cuda/programs.py: the grid of csrc/cuda/emulation */
void deltaops_emulation_configure(int32_t capability, int32_t multiprocessors, int32_t order,
                                  uint64_t random_seed);
#endif

int main(int count, char **arguments) {
#ifdef DELTAOPS_EMULATED
  deltaops_emulation_configure(90, 4, 0, 1); /* else it plays an older GPU */
#endif
  deltaops_cuda_device_info info = {0};
  info.struct_size = sizeof info;
  must("describe", deltaops_cuda_describe(DEVICE, &info));
  must_run("cudaSetDevice", cudaSetDevice(DEVICE));
  seed = on_gpu(sizeof *seed);
  static const char *const usual[] = {"1", "7", "300"};
  const char *const *const rows = count > 1 ? (const char *const *)(arguments + 1) : usual;
  const int many = count > 1 ? count - 1 : (int)(sizeof usual / sizeof usual[0]);
  for (dtype = DELTAOPS_BF16; dtype <= DELTAOPS_F16; ++dtype)
    for (int i = 0; i < many; ++i) {
      const int64_t M = atoll(rows[i]);
      products("ampere_gemm", deltaops_cuda_ampere_gemm, M, 133, 325, 20);
      if (info.capability == 90) {
        products("hopper_gemm", one_hopper, M, 136, 328, 24);
        group(M, 136, 328, 24);
        together(M, 136, 328, 24);
      }
      passes(M, 133, 325, 20, 0);
      passes(M, 136, 328, 24, THRESHOLD);
      producers(M, 325, 0);
      producers(M, 1032, THRESHOLD);
      if (M <= DELTAOPS_CUDA_MAX_DECODED) {
        decoding(M, 133, 325, 20);
        decoding(M, 136, 512, 16);
      }
      dropout(M, 325);
      give_back();
    }
  printf("every launch ran on %s of capability %d\n", info.name, info.capability);
  return EXIT_SUCCESS;
}
