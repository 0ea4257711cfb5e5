/* deltaops_cuda.h: the C ABI of the CUDA library (libdeltaops_cuda.so).
 *
 * What CUDA finds here; the dropout stream of csrc/include/philox.h on a GPU, which the other
 * backends are held against; and the parts of delta_linear (deltaops.h), a launch or two each.
 *
 * The library loads on a machine without a driver; each call then returns DELTAOPS_UNSUPPORTED and
 * says what is missing. Pointers named "device" lie in the memory of GPU number `device`; `stream`
 * is a cudaStream_t of that GPU (NULL: its default stream). Calls return when the work is queued.
 * Strides are counted in elements; offsets are 64-bit. Statuses are those of deltaops.h, the
 * sentence of an error is in deltaops_cuda_last_error(), per thread.
 */
#ifndef DELTAOPS_CUDA_H
#define DELTAOPS_CUDA_H

#include "deltaops.h"

#define DELTAOPS_CUDA_ABI_VERSION 5

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  uint32_t struct_size;    /* sizeof this struct, set by the caller, for ABI growth */
  int32_t capability;      /* 10 * major + minor: 90 for Hopper */
  int32_t multiprocessors; /* SMs */
  int32_t shared_memory;   /* bytes that a block can opt in to */
  uint64_t memory;         /* bytes on the device */
  char name[256];
} deltaops_cuda_device_info;

DELTAOPS_API uint32_t deltaops_cuda_abi_version(void);
DELTAOPS_API const char *deltaops_cuda_last_error(void);
/* The architectures this library was compiled for: "80;90a;100". The ampere_ products and the
 * passes have machine code for the oldest alone, and PTX, which newer GPUs translate at its first
 * use. */
DELTAOPS_API const char *deltaops_cuda_archs(void);

/* How many GPUs there are. UNSUPPORTED without a driver, or with one too old for this library. */
DELTAOPS_API deltaops_status deltaops_cuda_device_count(int32_t *count);
DELTAOPS_API deltaops_status deltaops_cuda_describe(int32_t device,
                                                    deltaops_cuda_device_info *info);

/* keep[m * keep_stride + k] = 1 where the draw at (k, m, branch_stream) keeps the element, else 0.
 * keep (device): [M, K] bytes. seed (device): one value, read when the kernel runs, so that no
 * copy to the host waits for the GPU. drop_threshold: p * 65536, 0 to 65536. */
DELTAOPS_API deltaops_status deltaops_cuda_dropout_mask(int32_t device, uint8_t *keep,
                                                        int64_t keep_stride, int64_t M, int64_t K,
                                                        const uint64_t *seed,
                                                        uint32_t branch_stream,
                                                        uint32_t drop_threshold, void *stream);

/* y = drop(x): x where kept, times 65536 / (65536 - drop_threshold), rounded once; 0 where dropped.
 * x, y (device): [M, K] of one dtype with col_stride 1; y may be x itself. */
DELTAOPS_API deltaops_status deltaops_cuda_dropout_apply(int32_t device, const deltaops_matrix *x,
                                                         const deltaops_matrix *y,
                                                         const uint64_t *seed,
                                                         uint32_t branch_stream,
                                                         uint32_t drop_threshold, void *stream);

/* ---- the products of delta_linear on any GPU from sm_80 on (mma.sync, cp.async)
 *
 *     out = sum_i mask_i * (left_i right_i^T) + bias          one accumulator, one rounding
 *
 * Forward: left x and S_i, right W [N, K] and B_i [N, R_i]. Gradient of x: left dy and dS_i, right
 * the views W^T [K, N] and A_i^T [K, R_i], with the masks of dropout. S and dS are those that
 * project and grad_up round to the dtype of x. Products with several dy and W give the gradient of
 * a group of layers. At most 16 rows go straight from global memory, as decoding wants it. */
typedef struct {
  deltaops_matrix left;    /* [M, L] bf16 or f16, col_stride 1 */
  deltaops_matrix right;   /* [N, L] of that dtype; one stride is 1, the same in all products */
  uint32_t drop_threshold; /* p * 65536 of the mask, which includes its scale; 0: no mask */
  uint32_t branch_stream;
} deltaops_cuda_product;

#define DELTAOPS_CUDA_MAX_PRODUCTS 16

typedef struct {
  uint32_t struct_size;
  int32_t device;
  const deltaops_cuda_product *products; /* on the host */
  int32_t num_products;
  int32_t multiprocessors; /* of hopper_gemm: how many it may use; 0: all */
  deltaops_matrix bias;    /* [1, N] of the same dtype, or absent */
  deltaops_matrix out;     /* [M, N] of the same dtype, col_stride 1 */
  const uint64_t *seed;    /* device; one value; NULL where nothing is masked */
  void *stream;
} deltaops_cuda_gemm_args;

DELTAOPS_API deltaops_status deltaops_cuda_ampere_gemm(const deltaops_cuda_gemm_args *args);

/* The same, with x W^T of a quantised W before the sum, for at most DELTAOPS_CUDA_MAX_DECODED rows
 * and products without masks, whose right matrices have col_stride 1:
 *
 *     int8   W[n, k] = codes[n, k] * scales[n]
 *     NF4    W.flat[i] = value of code i * scales[i div block];  two codes a byte, the first in the
 *            upper half, as bitsandbytes has them
 *
 * Each element is rounded to the dtype of x, as one that was made ahead would be. Fastest where
 * codes begin on 16 bytes and K (of NF4 the block too) is a multiple of 16 (of NF4 32). */
#define DELTAOPS_CUDA_MAX_DECODED 16
#define DELTAOPS_CUDA_INT8 1
#define DELTAOPS_CUDA_NF4 2

typedef struct {
  const void *codes;   /* device; int8 [N, K], or of NF4 [(N K + 1) div 2] bytes */
  const float *scales; /* device; [N], or of NF4 one for each block */
  int64_t rows;        /* N */
  int64_t cols;        /* K */
  int64_t block;       /* elements that share a scale, of NF4; at least 1 */
  int32_t kind;        /* DELTAOPS_CUDA_INT8 or DELTAOPS_CUDA_NF4 */
  int32_t reserved;
} deltaops_cuda_quantized;

typedef struct {
  uint32_t struct_size;
  uint32_t reserved;
  deltaops_matrix x; /* [M, K] of the dtype of out, col_stride 1 */
  deltaops_cuda_quantized weight;
  deltaops_cuda_gemm_args rest; /* products (S and B), bias, out and where; seed is not read */
} deltaops_cuda_quantized_gemv_args;

DELTAOPS_API deltaops_status
deltaops_cuda_ampere_quantized_gemv(const deltaops_cuda_quantized_gemv_args *args);

/* The same on Hopper (compute capability 9.0) by its copy engine and warpgroup products, of up to
 * DELTAOPS_CUDA_MAX_OUTPUTS outputs in one launch: q, k and v; gate and up. Their outs have the
 * same rows, dtype, device and stream, and their products together are at most
 * DELTAOPS_CUDA_MAX_HOPPER. Rows begin on 16 bytes, data and strides both; out has a multiple of 8
 * columns, lengths are at least 1, and sizes at most 2^31 - 512. One product of an output may have
 * a mask, with right matrices of row_stride 1. All outputs are given the same number of
 * multiprocessors: the others are free for what runs beside. */
#define DELTAOPS_CUDA_MAX_OUTPUTS 4
#define DELTAOPS_CUDA_MAX_HOPPER 8
DELTAOPS_API deltaops_status deltaops_cuda_hopper_gemm(const deltaops_cuda_gemm_args *outputs,
                                                       int32_t count);

/* A LoRA layer's forward on Hopper, in one launch:
 *
 *     S = scaling * x A^T,   out = x W^T + S B^T + bias       of S as rounded to the dtype of x
 *
 * Some blocks make S while the others begin with x W^T. R is 1 to 64; rows of x, weight, a, b,
 * s_narrow and out begin on 16 bytes, data and strides both, and out has a multiple of 8 columns.
 * The launch is cooperative, one block a multiprocessor: where this process may not have all of
 * them (a share of MPS, a green context), it is an error. */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix x;        /* [M, K] bf16 or f16 */
  deltaops_matrix weight;   /* [N, K] of that dtype, as all but s */
  deltaops_matrix a;        /* [R, K] */
  deltaops_matrix b;        /* [N, R] */
  deltaops_matrix bias;     /* [1, N], or absent */
  deltaops_matrix s;        /* [M, R] f32, written; or absent */
  deltaops_matrix s_narrow; /* [M, R], written */
  deltaops_matrix out;      /* [M, N], written */
  float scaling;
  int32_t blocks;  /* that make S; 0: what the rounds of the others leave over, at least 4 */
  void *workspace; /* device, on 16 bytes; see the passes below */
  uint64_t workspace_bytes;
  void *stream;
} deltaops_cuda_hopper_project_gemm_args;

DELTAOPS_API uint64_t deltaops_cuda_hopper_project_gemm_workspace(int64_t M);
DELTAOPS_API deltaops_status
deltaops_cuda_hopper_project_gemm(const deltaops_cuda_hopper_project_gemm_args *args);

/* ---- the passes of delta_linear on any GPU from sm_80 on, for one branch
 *
 * x and dy are bf16 or f16; A, B and the *_narrow matrices have their dtype; matrices have
 * col_stride 1. Sums are fp32, in an order that depends on shapes alone. The workspace (device, on
 * 16 bytes) belongs to the caller, who may use it again once the call's work is done; where 0 bytes
 * are asked for it may be NULL. Matrices with data == NULL are absent. */

/* S = scaling * drop(x) A^T. */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix x;        /* [M, K] */
  deltaops_matrix a;        /* [R, K] */
  deltaops_matrix s;        /* [M, R] f32, written; or absent */
  deltaops_matrix s_narrow; /* [M, R], written; or absent */
  float scaling;
  uint32_t drop_threshold; /* p * 65536 */
  uint32_t branch_stream;
  uint32_t reserved;
  const uint64_t *seed; /* device; NULL where nothing is dropped */
  void *workspace;
  uint64_t workspace_bytes;
  void *stream;
} deltaops_cuda_project_args;

/* dS = scaling * dy B,  dB = dy^T S,  db = sum of the rows of dy: those that are wanted. */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix grad_y;        /* [M, N] */
  deltaops_matrix b;             /* [N, R]; may be absent where dS is not wanted */
  deltaops_matrix s_narrow;      /* [M, R]; may be absent where dB is not wanted */
  deltaops_matrix grad_s;        /* [M, R] f32, written; or absent */
  deltaops_matrix grad_s_narrow; /* [M, R], written; or absent */
  deltaops_matrix grad_b;        /* [N, R] of dy's dtype or f32, written; or absent */
  deltaops_matrix grad_bias;     /* [1, N] of dy's dtype or f32, written; or absent */
  float scaling;
  uint32_t reserved;
  void *workspace;
  uint64_t workspace_bytes;
  void *stream;
} deltaops_cuda_grad_up_args;

/* dA = dS^T drop(x). */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix grad_s_narrow; /* [M, R] */
  deltaops_matrix x;             /* [M, K] */
  deltaops_matrix grad_a;        /* [R, K] of x's dtype or f32, written */
  uint32_t drop_threshold;
  uint32_t branch_stream;
  const uint64_t *seed; /* device; NULL where nothing is dropped */
  void *workspace;
  uint64_t workspace_bytes;
  void *stream;
} deltaops_cuda_grad_down_args;

/* Bytes of workspace that the call wants. */
DELTAOPS_API uint64_t deltaops_cuda_project_workspace(int64_t M, int64_t K, int64_t R);
DELTAOPS_API uint64_t deltaops_cuda_grad_up_workspace(int64_t M, int64_t N, int64_t R);
DELTAOPS_API uint64_t deltaops_cuda_grad_down_workspace(int64_t M, int64_t K, int64_t R);

DELTAOPS_API deltaops_status deltaops_cuda_project(const deltaops_cuda_project_args *args);
DELTAOPS_API deltaops_status deltaops_cuda_grad_up(const deltaops_cuda_grad_up_args *args);
DELTAOPS_API deltaops_status deltaops_cuda_grad_down(const deltaops_cuda_grad_down_args *args);

/* ---- x and its down-projections in one pass, where x is made, on any GPU from sm_80 on
 *
 *     S_i = scaling_i * drop_i(y) A_i^T
 *
 * for the branches of the layers that read y: q, k and v; gate and up; down. S is that of y as
 * rounded, as deltaops_cuda_project would give it, summed in another order; the same bits every
 * time. Matrices have col_stride 1. The ranks of all branches, each rounded up to 64, are at most
 * DELTAOPS_CUDA_MAX_PRODUCED together. */
#define DELTAOPS_CUDA_MAX_PRODUCED 1024

typedef struct {
  deltaops_matrix a;        /* [R, K] of the dtype of y */
  deltaops_matrix s;        /* [M, R] f32, written; or absent */
  deltaops_matrix s_narrow; /* [M, R] of the dtype of y, written; or absent */
  float scaling;
  uint32_t drop_threshold; /* p * 65536 */
  uint32_t branch_stream;
  uint32_t reserved;
  const uint64_t *seed; /* device; NULL where nothing is dropped */
} deltaops_cuda_branch;

/* y = x / sqrt(mean of the row's x^2 + eps) * gamma, rounded once. */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix x;     /* [M, K] bf16 or f16 */
  deltaops_matrix gamma; /* [1, K] of that dtype; or absent: ones */
  deltaops_matrix y;     /* [M, K] of that dtype, written */
  deltaops_matrix rstd;  /* [M, 1] f32, written: 1 / sqrt(mean x^2 + eps); or absent */
  float eps;
  int32_t num_branches;
  const deltaops_cuda_branch *branches; /* on the host */
  void *stream;
} deltaops_cuda_rms_norm_project_args;

/* y = gate / (1 + exp(-gate)) * up, rounded once. */
typedef struct {
  uint32_t struct_size;
  int32_t device;
  deltaops_matrix gate; /* [M, K] bf16 or f16 */
  deltaops_matrix up;   /* [M, K] of that dtype */
  deltaops_matrix y;    /* [M, K] of that dtype, written */
  int32_t num_branches;
  uint32_t reserved;
  const deltaops_cuda_branch *branches; /* on the host */
  void *stream;
} deltaops_cuda_swiglu_project_args;

DELTAOPS_API deltaops_status
deltaops_cuda_rms_norm_project(const deltaops_cuda_rms_norm_project_args *args);
DELTAOPS_API deltaops_status
deltaops_cuda_swiglu_project(const deltaops_cuda_swiglu_project_args *args);

#ifdef __cplusplus
}
#endif
#endif
