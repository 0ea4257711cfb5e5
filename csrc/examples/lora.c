/* lora.c: a LoRA layer forward and backward in C, held against plain loops.
 *
 *     cc -std=c99 lora.c $(pkg-config --cflags --libs deltaops) -lm -o lora && ./lora
 *
 * y = x W^T + bias + scaling (x A^T) B^T, and the gradients of x, A, B and bias for the output
 * gradient g. Ends with 1 where a result is off by more than rounding, or where a call fails.
 */
#include <deltaops.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { M = 37, N = 29, K = 53, R = 4 };

static float x[M][K], w[N][K], bias[N], a[R][K], b[N][R], g[M][N];
static float y[M][N], s[M][R], grad_x[M][K], grad_bias[N], grad_a[R][K], grad_b[N][R];
static const float scaling = 2.0f;

static deltaops_matrix matrix(void *data, int64_t rows, int64_t cols) {
  deltaops_matrix view = {data, rows, cols, cols, 1, DELTAOPS_F32, 0};
  return view;
}

static void fill(float *data, int count, float scale) {
  static uint32_t state = 1;
  for (int i = 0; i < count; ++i) {
    state = 1664525u * state + 1013904223u;
    data[i] = scale * ((float)(state >> 8) / 8388608.0f - 1.0f);
  }
}

static int failed(const char *call, deltaops_status status) {
  if (status != DELTAOPS_OK) fprintf(stderr, "%s: %s\n", call, deltaops_last_error());
  return status != DELTAOPS_OK;
}

static int run(void) {
  deltaops_branch branch = {0};
  branch.a = matrix(a, R, K);
  branch.b = matrix(b, N, R);
  branch.scaling = scaling;

  deltaops_delta_linear_forward_args forward = {0};
  forward.struct_size = sizeof forward;
  forward.num_threads = 2;
  forward.x = matrix(x, M, K);
  forward.weight = matrix(w, N, K);
  forward.bias = matrix(bias, 1, N);
  forward.y = matrix(y, M, N);
  forward.s = matrix(s, M, R); /* kept for the backward pass */
  forward.branches = &branch;
  forward.num_branches = 1;
  if (failed("forward", deltaops_cpu_delta_linear_forward(&forward))) return 1;

  const deltaops_matrix into_a = matrix(grad_a, R, K), into_b = matrix(grad_b, N, R);
  deltaops_delta_linear_backward_args backward = {0};
  backward.struct_size = sizeof backward;
  backward.num_threads = 2;
  backward.grad_y = matrix(g, M, N);
  backward.x = forward.x;
  backward.weight = forward.weight;
  backward.s = forward.s;
  backward.branches = &branch;
  backward.num_branches = 1;
  backward.grad_x = matrix(grad_x, M, K);
  backward.grad_bias = matrix(grad_bias, 1, N);
  backward.grad_a = &into_a;
  backward.grad_b = &into_b;
  return failed("backward", deltaops_cpu_delta_linear_backward(&backward));
}

/* Whether each of `count` results is what the loops gave, to rounding. */
static int differs(const char *name, const float *got, const double *want, int count) {
  double off = 0.0, size = 0.0;
  for (int i = 0; i < count; ++i) {
    off += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  const double error = sqrt(off / size);
  printf("%-9s relative error %.1e\n", name, error);
  return !(error < 1e-5); /* NaN is not */
}

static int check(void) {
  static double h[M][R], t[M][R]; /* x A^T; g B */
  static double want_y[M][N], want_x[M][K], want_bias[N], want_a[R][K], want_b[N][R];
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) h[m][r] += (double)x[m][k] * a[r][k];
      for (int n = 0; n < N; ++n) t[m][r] += (double)g[m][n] * b[n][r];
    }
    for (int n = 0; n < N; ++n) {
      want_y[m][n] = bias[n];
      for (int k = 0; k < K; ++k) {
        want_y[m][n] += (double)x[m][k] * w[n][k];
        want_x[m][k] += (double)g[m][n] * w[n][k];
      }
      for (int r = 0; r < R; ++r) {
        want_y[m][n] += scaling * h[m][r] * b[n][r];
        want_b[n][r] += scaling * g[m][n] * h[m][r];
      }
      want_bias[n] += g[m][n];
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) {
        want_x[m][k] += scaling * t[m][r] * a[r][k];
        want_a[r][k] += scaling * t[m][r] * x[m][k];
      }
  }
  return differs("y", y[0], want_y[0], M * N) | differs("grad_x", grad_x[0], want_x[0], M * K) |
         differs("grad_bias", grad_bias, want_bias, N) |
         differs("grad_a", grad_a[0], want_a[0], R * K) |
         differs("grad_b", grad_b[0], want_b[0], N * R);
}

int main(void) {
  if (deltaops_abi_version() != DELTAOPS_ABI_VERSION) {
    fprintf(stderr, "compiled for C ABI %u, the library has %u\n", (unsigned)DELTAOPS_ABI_VERSION,
            (unsigned)deltaops_abi_version());
    return 1;
  }
  printf("C ABI %u, %s\n", (unsigned)deltaops_abi_version(), deltaops_cpu_isa());
  fill(x[0], M * K, 1.0f);
  fill(w[0], N * K, 0.2f);
  fill(bias, N, 1.0f);
  fill(a[0], R * K, 0.2f);
  fill(b[0], N * R, 1.0f);
  fill(g[0], M * N, 1.0f);
  return run() || check() ? EXIT_FAILURE : EXIT_SUCCESS;
}
