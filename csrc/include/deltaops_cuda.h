/* deltaops_cuda.h: the C ABI of the CUDA library (libdeltaops_cuda.so).
 *
 * What CUDA finds here; the dropout stream of csrc/include/philox.h on a GPU, which the other
 * backends are held against; and the two large products of delta_linear on Hopper, each with its
 * rank part in the same accumulator.
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

#define DELTAOPS_CUDA_ABI_VERSION 1

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
/* The architectures this library was compiled for: "80;90a;100". */
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

/* ---- delta_linear's products on Hopper (compute capability 9.0), of layers that share x
 *
 *     y_i  = x W_i^T + S_i B_i^T + bias_i
 *     dx   = sum_i (mask_i * (dS_i A_i) + dy_i W_i)
 *
 * M tokens, K inputs, N_i outputs, R_i the rank of a layer's one branch. bf16 or f16, all of one
 * call the same; accumulated in float, rounded once; the same call gives the same bits again. S may
 * be f32, and is then rounded into the workspace first. mask is 0 where the draw at (k, m, stream)
 * drops an element, else 65536 / (65536 - drop_threshold).
 *
 * Matrices are on the device, with col_stride 1 and rows on 16 bytes (data and row_stride); an f32
 * S may lie anyhow. Each size may be anything from 1 to 2^31 - 512, M and N (or K) also 0. Outputs
 * overlap neither inputs nor one another nor the workspace. What is well formed and not taken gives
 * DELTAOPS_UNSUPPORTED. Nothing is read or written before all was checked. */
#define DELTAOPS_CUDA_MAX_GROUP 4

typedef struct {
  uint32_t struct_size;   /* sizeof this struct, set by the caller */
  int32_t reserved;       /* 0 */
  deltaops_matrix x;      /* [M, K], the same of all layers */
  deltaops_matrix weight; /* [N, K] */
  deltaops_matrix bias;   /* [1, N], or absent */
  deltaops_matrix s;      /* [M, R] of the type of x or f32: scaled and activated; or absent */
  deltaops_matrix b;      /* [N, R]; absent where s is */
  deltaops_matrix y;      /* [M, N], written */
} deltaops_cuda_outputs_args;

typedef struct {
  uint32_t struct_size;
  int32_t reserved;
  deltaops_matrix grad_y;  /* [M, N] */
  deltaops_matrix weight;  /* [N, K] */
  deltaops_matrix grad_s;  /* [M, R] of the type of grad_y or f32: scaled; or absent */
  deltaops_matrix a;       /* [R, K]; absent where grad_s is */
  deltaops_matrix grad_x;  /* [M, K], written; the first layer's, absent in the others */
  const uint64_t *seed;    /* device: one value, read when the kernel runs; NULL without dropout */
  uint32_t stream;         /* which random stream: the branch's number */
  uint32_t drop_threshold; /* p * 65536, 0 to 65536; above 0 for a single layer alone */
} deltaops_cuda_grad_input_args;

/* Bytes of device memory on 16 bytes that the call needs while it runs; 0 where S is not f32. */
DELTAOPS_API deltaops_status deltaops_cuda_outputs_workspace(
    const deltaops_cuda_outputs_args *layers, int32_t count, int64_t *bytes);
DELTAOPS_API deltaops_status deltaops_cuda_outputs(int32_t device,
                                                   const deltaops_cuda_outputs_args *layers,
                                                   int32_t count, void *workspace, int64_t bytes,
                                                   void *stream);
DELTAOPS_API deltaops_status deltaops_cuda_grad_input_workspace(
    const deltaops_cuda_grad_input_args *layers, int32_t count, int64_t *bytes);
DELTAOPS_API deltaops_status deltaops_cuda_grad_input(int32_t device,
                                                      const deltaops_cuda_grad_input_args *layers,
                                                      int32_t count, void *workspace, int64_t bytes,
                                                      void *stream);

#ifdef __cplusplus
}
#endif
#endif
