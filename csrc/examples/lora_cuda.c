/* lora_cuda.c: a LoRA layer forward and backward on a GPU from C, held against plain loops.
 *
 *     cc -std=c99 lora_cuda.c $(pkg-config --cflags --libs deltaops) -ldeltaops_cuda \
 *         -I"$CUDA_HOME/include" -L"$CUDA_HOME/lib64" -lcudart -lm -o lora_cuda && ./lora_cuda
 *
 * bf16 on any GPU from sm_80 on. y = x W^T + bias + S B^T with S = scaling x A^T, and the gradients
 * of x, A, B and bias for the output gradient g. Ends with 1 where a result is off by more than
 * rounding, where a call fails, and where there is no GPU.
 */
#include <cuda_runtime_api.h>
#include <deltaops_cuda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 37, N = 29, K = 53, R = 4, DEVICE = 0, MOST = 32 };

static const float scaling = 2.0f;

/* ---- matrices of bf16 on the GPU, and their values here ---- */

typedef struct {
  deltaops_matrix view; /* on the GPU, rows side by side */
  uint16_t *here;
} array;

static void *held[MOST];
static int holds;

static void fail(const char *call, const char *why) {
  fprintf(stderr, "%s: %s\n", call, why);
  exit(EXIT_FAILURE);
}
static void must(const char *call, deltaops_status status) {
  if (status != DELTAOPS_OK) fail(call, deltaops_cuda_last_error());
}
static void must_run(const char *call, cudaError_t error) {
  if (error != cudaSuccess) fail(call, cudaGetErrorString(error));
}

static float widen(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}
static uint16_t narrow(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return (uint16_t)((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);
}

static void *on_gpu(size_t bytes) {
  void *data = NULL;
  if (holds == MOST) fail("on_gpu", "MOST is too small");
  must_run("cudaMalloc", cudaMalloc(&data, bytes ? bytes : 1));
  return held[holds++] = data;
}

static size_t bytes_of(const array *a) {
  return (size_t)(a->view.rows * a->view.cols) * sizeof *a->here;
}

/* Random numbers within `scale`; zeros on the GPU too where that is 0. */
static array make(int64_t rows, int64_t cols, float scale) {
  static uint32_t state = 1;
  array a = {{NULL, rows, cols, cols, 1, DELTAOPS_BF16, 0}, NULL};
  a.here = malloc(bytes_of(&a));
  if (a.here == NULL) fail("malloc", "no memory");
  for (int64_t i = 0; i < rows * cols; ++i) {
    state = 1664525u * state + 1013904223u;
    a.here[i] = narrow(scale * ((float)(state >> 8) / 8388608.0f - 1.0f));
  }
  a.view.data = on_gpu(bytes_of(&a));
  must_run("cudaMemcpy", cudaMemcpy(a.view.data, a.here, bytes_of(&a), cudaMemcpyHostToDevice));
  return a;
}

/* The transposed view. */
static deltaops_matrix across(const array *a) {
  deltaops_matrix view = a->view;
  view.rows = a->view.cols;
  view.cols = a->view.rows;
  view.row_stride = 1;
  view.col_stride = a->view.row_stride;
  return view;
}

/* ---- the layer ---- */

static array x, w, bias, a, b, g, y, s, grad_x, grad_s, grad_bias, grad_a, grad_b;

/* out = l1 r1^T + l2 r2^T + bias in one accumulator. */
static void products(const char *call, deltaops_matrix l1, deltaops_matrix r1, deltaops_matrix l2,
                     deltaops_matrix r2, const array *add, const array *out) {
  deltaops_cuda_product two[2] = {{l1, r1, 0, 0}, {l2, r2, 0, 0}};
  deltaops_cuda_gemm_args args = {0};
  args.struct_size = sizeof args;
  args.device = DEVICE;
  args.products = two;
  args.num_products = 2;
  if (add != NULL) args.bias = add->view;
  args.out = out->view;
  must(call, deltaops_cuda_ampere_gemm(&args));
}

static void forward(void) {
  deltaops_cuda_project_args project = {0};
  project.struct_size = sizeof project;
  project.device = DEVICE;
  project.x = x.view;
  project.a = a.view;
  project.s_narrow = s.view; /* kept for the backward pass */
  project.scaling = scaling;
  project.workspace_bytes = deltaops_cuda_project_workspace(M, K, R);
  project.workspace = on_gpu(project.workspace_bytes);
  must("project", deltaops_cuda_project(&project));
  products("y", x.view, w.view, s.view, b.view, &bias, &y);
}

static void backward(void) {
  deltaops_cuda_grad_up_args up = {0};
  up.struct_size = sizeof up;
  up.device = DEVICE;
  up.grad_y = g.view;
  up.b = b.view;
  up.s_narrow = s.view;
  up.grad_s_narrow = grad_s.view;
  up.grad_b = grad_b.view;
  up.grad_bias = grad_bias.view;
  up.scaling = scaling;
  up.workspace_bytes = deltaops_cuda_grad_up_workspace(M, N, R);
  up.workspace = on_gpu(up.workspace_bytes);
  must("grad_up", deltaops_cuda_grad_up(&up));

  products("grad_x", g.view, across(&w), grad_s.view, across(&a), NULL, &grad_x);

  deltaops_cuda_grad_down_args down = {0};
  down.struct_size = sizeof down;
  down.device = DEVICE;
  down.grad_s_narrow = grad_s.view;
  down.x = x.view;
  down.grad_a = grad_a.view;
  down.workspace_bytes = deltaops_cuda_grad_down_workspace(M, K, R);
  down.workspace = on_gpu(down.workspace_bytes);
  must("grad_down", deltaops_cuda_grad_down(&down));
}

/* ---- the same by plain loops ---- */

/* Whether the result is what the loops gave, to the rounding of bf16. */
static int differs(const char *name, const array *got, const double *want) {
  double off = 0.0, size = 0.0;
  must_run("cudaMemcpy",
           cudaMemcpy(got->here, got->view.data, bytes_of(got), cudaMemcpyDeviceToHost));
  for (int64_t i = 0; i < got->view.rows * got->view.cols; ++i) {
    const double error = widen(got->here[i]) - want[i];
    off += error * error;
    size += want[i] * want[i];
  }
  const double error = sqrt(off / size);
  printf("%-9s relative error %.1e\n", name, error);
  return !(error < 5e-3); /* NaN is not */
}

static double at(const array *of, int row, int col) {
  return widen(of->here[row * of->view.cols + col]);
}

static int check(void) {
  static double h[M][R], t[M][R]; /* x A^T; g B */
  static double want_y[M][N], want_x[M][K], want_bias[N], want_a[R][K], want_b[N][R];
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) h[m][r] += at(&x, m, k) * at(&a, r, k);
      for (int n = 0; n < N; ++n) t[m][r] += at(&g, m, n) * at(&b, n, r);
    }
    for (int n = 0; n < N; ++n) {
      want_y[m][n] = at(&bias, 0, n);
      for (int k = 0; k < K; ++k) {
        want_y[m][n] += at(&x, m, k) * at(&w, n, k);
        want_x[m][k] += at(&g, m, n) * at(&w, n, k);
      }
      for (int r = 0; r < R; ++r) {
        want_y[m][n] += scaling * h[m][r] * at(&b, n, r);
        want_b[n][r] += scaling * at(&g, m, n) * h[m][r];
      }
      want_bias[n] += at(&g, m, n);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) {
        want_x[m][k] += scaling * t[m][r] * at(&a, r, k);
        want_a[r][k] += scaling * t[m][r] * at(&x, m, k);
      }
  }
  return differs("y", &y, want_y[0]) | differs("grad_x", &grad_x, want_x[0]) |
         differs("grad_bias", &grad_bias, want_bias) | differs("grad_a", &grad_a, want_a[0]) |
         differs("grad_b", &grad_b, want_b[0]);
}

int main(void) {
  deltaops_cuda_device_info info = {0};
  info.struct_size = sizeof info;
  if (deltaops_cuda_abi_version() != DELTAOPS_CUDA_ABI_VERSION)
    fail("lora_cuda", "compiled for another version of the C ABI than the library has");
  must("describe", deltaops_cuda_describe(DEVICE, &info));
  printf("C ABI %u for CUDA, %s\n", (unsigned)deltaops_cuda_abi_version(), info.name);
  must_run("cudaSetDevice", cudaSetDevice(DEVICE));
  array *const all[] = {&x, &w,      &bias,   &a,         &b,      &g,     &y,
                        &s, &grad_x, &grad_s, &grad_bias, &grad_a, &grad_b};
  x = make(M, K, 1.0f), w = make(N, K, 0.2f), bias = make(1, N, 1.0f);
  a = make(R, K, 0.2f), b = make(N, R, 1.0f), g = make(M, N, 1.0f);
  y = make(M, N, 0.0f), s = make(M, R, 0.0f), grad_x = make(M, K, 0.0f);
  grad_s = make(M, R, 0.0f), grad_bias = make(1, N, 0.0f);
  grad_a = make(R, K, 0.0f), grad_b = make(N, R, 0.0f);
  forward();
  backward();
  const int off = check(); /* a copy to the host waits for the GPU */
  for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i) free(all[i]->here);
  while (holds > 0) must_run("cudaFree", cudaFree(held[--holds]));
  return off ? EXIT_FAILURE : EXIT_SUCCESS;
}
