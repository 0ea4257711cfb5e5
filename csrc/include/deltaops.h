/* deltaops.h: the C ABI of the native core, and its only door.
 *
 *     y = x W^T + bias + sum_i s_i * act_i(H_i) B_i^T,    H_i = drop_i(x) A_i^T + a_i
 *
 * M tokens, K inputs, N outputs, R_i the rank of branch i, R their sum. With the identity as act_i
 * a branch is LoRA (Hu et al. 2021, eq. 3), with another a parallel adapter (He et al. 2021).
 * A batch may mix adapters: each row then has one branch or none instead of the sum, and nothing of
 * another comes into it.
 *
 * Ownership   The caller owns every buffer; the library keeps no pointer after it returns.
 * Alignment   That of the element type suffices, and is required.
 * Overlap     Outputs overlap neither the inputs nor one another, or the call is refused. Gaps
 *             between rows do not count: columns of one buffer interleave.
 * Strides     Counted in elements. Activations and gradients need col_stride == 1; the weight and
 * the adapters need one of their two strides to be 1 (so GPT-2's Conv1D passes W^T as it lies).
 * Precision   Products are accumulated in float and rounded once, at the store.
 * Threads     Calls from several threads are safe. The result depends on num_threads and the
 *             instruction set, and on nothing else: the same call gives the same bits again.
 * Errors      A status is returned; deltaops_last_error() has the sentence, per thread. Arguments
 *             are checked before the first store, so outputs are untouched after INVALID_ARGUMENT.
 * Versions    deltaops_abi_version() of the library that is loaded must equal the
 *             DELTAOPS_ABI_VERSION that a caller was compiled with; each struct says its size too,
 *             and is refused where it is another. Zero a struct before filling it.
 * Finding it  pkg-config and CMake know it as "deltaops"; deltaops.get_pkgconfig_dir() and
 *             get_cmake_dir() in Python say where. Programs are in csrc/examples.
 */
#ifndef DELTAOPS_H
#define DELTAOPS_H

#include <stdint.h>

#define DELTAOPS_ABI_VERSION 8

#if defined(__GNUC__)
#define DELTAOPS_API __attribute__((visibility("default")))
#else
#define DELTAOPS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  DELTAOPS_F32 = 0,
  DELTAOPS_BF16 = 1,
  DELTAOPS_F16 = 2 /* taken by deltaops_cuda.h alone */
} deltaops_dtype;

typedef enum {
  DELTAOPS_OK = 0,
  DELTAOPS_INVALID_ARGUMENT = 1, /* shapes, strides, dtypes or null pointers that do not fit */
  DELTAOPS_UNSUPPORTED = 2,      /* well formed, but not on this CPU or in this build */
  DELTAOPS_OUT_OF_MEMORY = 3
} deltaops_status;

/* Element by element, between the two matrices of a branch. */
typedef enum {
  DELTAOPS_IDENTITY = 0,
  DELTAOPS_RELU = 1,      /* max(h, 0) */
  DELTAOPS_GELU = 2,      /* h * (1 + erf(h / sqrt 2)) / 2 */
  DELTAOPS_GELU_TANH = 3, /* h * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3))) / 2 */
  DELTAOPS_SILU = 4       /* h / (1 + exp(-h)) */
} deltaops_activation;

/* A strided matrix view. data == NULL means "absent" where a field is optional. */
typedef struct {
  void *data;
  int64_t rows, cols;
  int64_t row_stride, col_stride; /* in elements */
  int32_t dtype;                  /* deltaops_dtype */
  int32_t reserved;               /* 0 */
} deltaops_matrix;

/* One branch. Element (m, k) of x is dropped when the 16-bit Philox draw at
 * (k, m, stream) is below drop_threshold, and is otherwise scaled by 65536/(65536 -
 * drop_threshold); see csrc/include/philox.h. */
typedef struct {
  deltaops_matrix a;       /* [R_i, K] f32 or bf16 */
  deltaops_matrix b;       /* [N, R_i] same dtype as a */
  deltaops_matrix bias;    /* [1, R_i] same dtype as a, or absent; not read by the backward pass */
  float scaling;           /* dimensionless; LoRA uses alpha / R_i */
  uint32_t drop_threshold; /* p * 65536, 0 (no dropout) to 65536 (all dropped) */
  uint32_t stream;         /* which random stream: the branch's number */
  int32_t activation;      /* deltaops_activation */
} deltaops_branch;

typedef struct {
  uint32_t struct_size;   /* sizeof this struct, for ABI growth */
  int32_t num_threads;    /* >= 1 */
  deltaops_matrix x;      /* [M, K] f32 or bf16 */
  deltaops_matrix weight; /* [N, K] dtype of x */
  deltaops_matrix bias;   /* [1, N] dtype of x, or absent */
  deltaops_matrix y;      /* [M, N] dtype of x, written */
  /* [M, R] f32, written for the backward pass, branches side by side: s_i * H_i where the
   * activation is the identity, else H_i; or absent */
  deltaops_matrix s;
  const deltaops_branch *branches;
  int32_t num_branches; /* 0: the frozen layer alone */
  int32_t reserved;     /* 0 */
  uint64_t seed;
  const void *packed_weight; /* from deltaops_cpu_pack_weight(weight), or NULL */
  int64_t packed_bytes;      /* its size, 0 with NULL */
  /* M of them: row m gets branch adapter[m] and no other, none for -1, and s is 0 in the columns of
   * the others. Or NULL: every row gets all branches */
  const int32_t *adapter;
} deltaops_delta_linear_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix grad_y; /* [M, N] */
  deltaops_matrix x;      /* [M, K]; may be absent when no grad_a is wanted */
  deltaops_matrix weight; /* [N, K]; may be absent when grad_x is not wanted */
  /* [M, R] from the forward pass; may be absent when no grad_b is wanted and no branch has an
   * activation (or only grad_bias is wanted) */
  deltaops_matrix s;
  const deltaops_branch *branches;
  int32_t num_branches;
  int32_t reserved;
  uint64_t seed;             /* as in the forward pass */
  deltaops_matrix grad_x;    /* [M, K] dtype of grad_y, or absent */
  deltaops_matrix grad_bias; /* [1, N] f32 or bf16, or absent */
  const deltaops_matrix
      *grad_a; /* num_branches of [R_i, K] f32 or bf16, each may be absent; or NULL */
  const deltaops_matrix
      *grad_b; /* num_branches of [N, R_i] f32 or bf16, each may be absent; or NULL */
  const deltaops_matrix
      *grad_branch_bias;     /* num_branches of [1, R_i] f32 or bf16, each may be absent; or NULL */
  const void *packed_weight; /* from deltaops_cpu_pack_weight(weight^T, a [K, N] view), or NULL */
  int64_t packed_bytes;      /* its size, 0 with NULL */
  /* as in the forward pass: branch i's gradients are sums over its own rows, 0 where it has none */
  const int32_t *adapter;
} deltaops_delta_linear_backward_args;

DELTAOPS_API uint32_t deltaops_abi_version(void);
/* The sentence for this thread's last error; "" when there was none. Valid until its next call. */
DELTAOPS_API const char *deltaops_last_error(void);

/* Instruction sets: "baseline", "avx2", "avx512", "avx512_bf16" on x86-64, "portable" elsewhere. */
DELTAOPS_API const char *deltaops_cpu_isa(void);              /* the one in use */
DELTAOPS_API int32_t deltaops_cpu_isa_count(void);            /* how many are compiled in */
DELTAOPS_API const char *deltaops_cpu_isa_name(int32_t i);    /* slowest first; NULL out of range */
DELTAOPS_API int32_t deltaops_cpu_isa_runs(const char *name); /* 1 when this CPU can run it */
/* Chosen at load: the best that runs, or DELTAOPS_CPU_ISA from the environment. For tests. */
DELTAOPS_API deltaops_status deltaops_cpu_set_isa(const char *name);

DELTAOPS_API deltaops_status
deltaops_cpu_delta_linear_forward(const deltaops_delta_linear_forward_args *args);
DELTAOPS_API deltaops_status
deltaops_cpu_delta_linear_backward(const deltaops_delta_linear_backward_args *args);
/* 1 to DELTAOPS_MAX_GROUP layers that share x (q, k and v; gate and up), in one pass over it. All
 * have the same x, dtype and num_threads; each its own branches and adapter. Each gives the bits
 * that it gives alone, but for the gradient of x. That is the sum of the layers': the first one's
 * grad_x, or absent there; the others must be absent. Weights are needed, and packed ones used,
 * where it is wanted. */
#define DELTAOPS_MAX_GROUP 16
DELTAOPS_API deltaops_status deltaops_cpu_delta_linear_group_forward(
    const deltaops_delta_linear_forward_args *layers, int32_t count);
DELTAOPS_API deltaops_status deltaops_cpu_delta_linear_group_backward(
    const deltaops_delta_linear_backward_args *layers, int32_t count);
/* A frozen weight may be packed once, in the order in which the product reads it, instead of in
 * every call: about rows * cols floats (pairs of bf16 where the CPU multiplies those) for each of
 * the two orientations. Packed memory belongs to the caller, holds for the instruction set in use,
 * and gives the same bits as the weight itself. A call is refused when it does not fit. */
DELTAOPS_API deltaops_status deltaops_cpu_packed_bytes(const deltaops_matrix *weight,
                                                       int64_t *bytes);
DELTAOPS_API deltaops_status deltaops_cpu_pack_weight(const deltaops_matrix *weight, void *packed,
                                                      int64_t bytes, int32_t num_threads);
/* A hash of the weight's shape and of some of its elements, spread evenly: enough to notice that a
 * weight was changed behind the back of whoever packed it, at the price of a few cache lines. */
DELTAOPS_API deltaops_status deltaops_cpu_fingerprint(const deltaops_matrix *weight,
                                                      uint64_t *hash);
/* For benchmarks: runs `steps` rounds of independent multiply-adds of this dtype on each thread and
 * returns how many that were, -1 for arguments that cannot be. The caller takes the time. */
DELTAOPS_API int64_t deltaops_cpu_fma_peak(int32_t dtype, int64_t steps, int32_t num_threads);
/* keep[m * K + k] = 1 where the draw at (k, m, stream) keeps the element: the mask, for tests. */
DELTAOPS_API deltaops_status deltaops_cpu_dropout_mask(uint8_t *keep, int64_t M, int64_t K,
                                                       uint64_t seed, uint32_t stream,
                                                       uint32_t drop_threshold);

/* ---- bottleneck: a sequential adapter (Houlsby et al. 2019; Pfeiffer et al. 2021)
 *
 *     h = norm(x) Down^T + down_bias,    y = residual + scaling * act(h) Up^T + up_bias
 *
 * K inputs and outputs, R the bottleneck. Parameters may be f32 or bf16, each for itself, and are
 * contiguous; what is absent is 0, and gamma 1. */
typedef enum { DELTAOPS_NO_NORM = 0, DELTAOPS_LAYER_NORM = 1, DELTAOPS_RMS_NORM = 2 } deltaops_norm;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix x;         /* [M, K] f32 or bf16 */
  deltaops_matrix residual;  /* [M, K] dtype of x: x itself, another tensor, or absent */
  deltaops_matrix gamma;     /* [1, K] or absent; with a norm only */
  deltaops_matrix beta;      /* [1, K] or absent; with a norm only */
  deltaops_matrix down;      /* [R, K] */
  deltaops_matrix down_bias; /* [1, R] or absent */
  deltaops_matrix up;        /* [K, R] */
  deltaops_matrix up_bias;   /* [1, K] or absent */
  deltaops_matrix y;         /* [M, K] dtype of x, written */
  deltaops_matrix h;         /* [M, R] f32, written for the backward pass; or absent */
  deltaops_matrix stats;     /* [M, 2] f32, written with a norm: mean and 1 / std; or absent */
  float scaling;             /* of the branch, not of up_bias */
  float eps;                 /* of the norm */
  int32_t activation;        /* deltaops_activation */
  int32_t norm;              /* deltaops_norm */
} deltaops_bottleneck_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix grad_y; /* [M, K] f32 or bf16 */
  deltaops_matrix x; /* [M, K]; may be absent when no grad_down and nothing past a norm is wanted */
  deltaops_matrix h; /* [M, R] from the forward pass */
  deltaops_matrix stats;                 /* [M, 2] from the forward pass, with a norm */
  deltaops_matrix gamma, beta, down, up; /* as in the forward pass */
  deltaops_matrix grad_x;                /* [M, K] dtype of grad_y, or absent; so all that follow */
  deltaops_matrix grad_gamma, grad_beta; /* [1, K] f32 or bf16 */
  deltaops_matrix grad_down;             /* [R, K] f32 or bf16 */
  deltaops_matrix grad_down_bias;        /* [1, R] f32 or bf16 */
  deltaops_matrix grad_up;               /* [K, R] f32 or bf16 */
  deltaops_matrix grad_up_bias;          /* [1, K] f32 or bf16 */
  float scaling;
  int32_t activation;
  int32_t norm;
  int32_t residual_is_x; /* 1: grad_x gets grad_y too */
} deltaops_bottleneck_backward_args;

DELTAOPS_API deltaops_status
deltaops_cpu_bottleneck_forward(const deltaops_bottleneck_forward_args *args);
DELTAOPS_API deltaops_status
deltaops_cpu_bottleneck_backward(const deltaops_bottleneck_backward_args *args);

/* ---- norm_bias: y = (x - mean) * rstd * gamma + bias, LayerNorm or (mean = 0) RMSNorm; without a
 * norm y = x * gamma + bias, the gains of (IA)^3 (Liu et al. 2022) */
typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix x;     /* [M, K] f32 or bf16 */
  deltaops_matrix gamma; /* [1, K] f32 or bf16, or absent: 1 */
  deltaops_matrix bias;  /* [1, K] f32 or bf16, or absent: 0 */
  deltaops_matrix y;     /* [M, K] dtype of x, written */
  deltaops_matrix stats; /* [M, 2] f32, written with a norm: mean and rstd; or absent */
  float eps;
  int32_t norm; /* deltaops_norm */
} deltaops_norm_bias_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix grad_y;     /* [M, K] f32 or bf16 */
  deltaops_matrix x;          /* [M, K]; may be absent when only grad_bias is wanted, or without a
                               * norm no grad_gamma */
  deltaops_matrix stats;      /* [M, 2] from the forward pass; read where x is, past a norm */
  deltaops_matrix gamma;      /* as in the forward pass */
  deltaops_matrix grad_x;     /* [M, K] dtype of grad_y, or absent; so the next two */
  deltaops_matrix grad_gamma; /* [1, K] f32 or bf16 */
  deltaops_matrix grad_bias;  /* [1, K] f32 or bf16 */
  int32_t norm;
  int32_t reserved; /* 0 */
} deltaops_norm_bias_backward_args;

DELTAOPS_API deltaops_status
deltaops_cpu_norm_bias_forward(const deltaops_norm_bias_forward_args *args);
DELTAOPS_API deltaops_status
deltaops_cpu_norm_bias_backward(const deltaops_norm_bias_backward_args *args);

/* ---- cross_entropy of M rows of logits x [M, V], each against one class:
 *
 *     loss = sum_m (log sum_v exp(x_mv) - x_m,target_m)
 *
 * over the rows whose target is not ignore_index; DELTAOPS_MEAN divides it by their number, which
 * gives NaN for none. No probability is kept: `state` holds the maximum of each row and
 * 1 / sum_v exp(x_mv - maximum), from which the backward pass makes them again. NaN, +infinity and
 * a row of nothing but -infinity give NaN in the row; ignored rows are not looked at, and their
 * gradient is 0. The result does not depend on num_threads. */
typedef enum { DELTAOPS_SUM = 0, DELTAOPS_MEAN = 1 } deltaops_reduction;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix logits; /* [M, V] f32 or bf16 */
  const int64_t *target;  /* M of them: a class from 0 to V - 1, or ignore_index */
  int64_t ignore_index;
  int32_t reduction;     /* deltaops_reduction */
  int32_t reserved;      /* 0 */
  deltaops_matrix state; /* [M, 2] f32, contiguous, written */
  float *loss;           /* one, written */
} deltaops_cross_entropy_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix logits; /* these five as in the forward pass */
  const int64_t *target;
  int64_t ignore_index;
  int32_t reduction;
  int32_t reserved;
  deltaops_matrix state;       /* what the forward pass wrote */
  const float *grad_loss;      /* one */
  deltaops_matrix grad_logits; /* [M, V] dtype of logits, written */
} deltaops_cross_entropy_backward_args;

DELTAOPS_API deltaops_status
deltaops_cpu_cross_entropy_forward(const deltaops_cross_entropy_forward_args *args);
DELTAOPS_API deltaops_status
deltaops_cpu_cross_entropy_backward(const deltaops_cross_entropy_backward_args *args);
/* Asks the system to back this memory by huge pages from its first touch on; contents stay. For
 * large new buffers, which malloc maps afresh each time: in pages of 4 KiB the faults of a
 * gradient of the logits take several times as long as writing it. Advice: nothing can fail. */
DELTAOPS_API void deltaops_cpu_advise_huge_pages(void *data, int64_t bytes);

/* ---- gated: the product in the middle of a gated MLP, element by element (Shazeer 2020)
 *
 *     y = act(gate) * up,    grad_gate = grad_y * up * act'(gate),    grad_up = grad_y * act(gate)
 *
 * Without up, all zeros then: y = act(gate), grad_gate = grad_y * act'(gate).
 *
 * NaN and the infinities give what torch gives, not the limits that the other ops take: infinity *
 * 0 is NaN in gelu and silu of -infinity, and in their slopes at both infinities. The result does
 * not depend on num_threads. */
typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix gate; /* [M, K] f32 or bf16 */
  deltaops_matrix up;   /* [M, K] dtype of gate, or all zeros */
  deltaops_matrix y;    /* [M, K] dtype of gate, written */
  int32_t activation;   /* deltaops_activation */
  int32_t reserved;     /* 0 */
} deltaops_gated_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  deltaops_matrix grad_y;    /* [M, K] f32 or bf16 */
  deltaops_matrix gate;      /* [M, K] dtype of grad_y */
  deltaops_matrix up;        /* [M, K]; absent where forward had none, or only grad_up is wanted */
  deltaops_matrix grad_gate; /* [M, K] dtype of grad_y, or absent; so the next */
  deltaops_matrix grad_up;   /* [M, K] */
  int32_t activation;
  int32_t reserved; /* 0 */
} deltaops_gated_backward_args;

DELTAOPS_API deltaops_status deltaops_cpu_gated_forward(const deltaops_gated_forward_args *args);
DELTAOPS_API deltaops_status deltaops_cpu_gated_backward(const deltaops_gated_backward_args *args);

/* ---- rotary position embedding (Su et al. 2021), D cut into halves as Llama has it
 *
 *     y1 = x1 cos1 - x2 sin1,    y2 = x2 cos2 + x1 sin2
 *
 * The backward pass is the same with x the gradient of y, and y the gradient of x:
 *
 *     y1 = x1 cos1 + x2 sin2,    y2 = x2 cos2 - x1 sin1
 *
 * B sequences of L tokens, H heads of D elements, which lie side by side everywhere. The result
 * does not depend on num_threads. */
typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  int64_t sizes[4];         /* B, H, L, D; D even */
  const void *x;            /* [B, H, L, D] f32 or bf16 */
  int64_t x_strides[3];     /* of B, H and L */
  void *y;                  /* [B, H, L, D] dtype of x, written */
  int64_t y_strides[3];     /* which keep the heads apart */
  const void *cos, *sin;    /* [B, L, D] each */
  int64_t table_strides[2]; /* of B, 0 where the batch shares the tables, and of L */
  int32_t dtype;            /* deltaops_dtype of x and y */
  int32_t table_dtype;      /* of cos and sin: f32, or that of x */
  int32_t backward;         /* 0 or 1 */
  int32_t reserved;         /* 0 */
} deltaops_rotary_args;

DELTAOPS_API deltaops_status deltaops_cpu_rotary(const deltaops_rotary_args *args);

/* ---- attention: softmax over the keys, for each query of each head (Vaswani et al. 2017, eq. 1)
 *
 *     s_ij = scale q_i . k_j,    lse_i = log sum_j exp(s_ij),    p_ij = exp(s_ij - lse_i)
 *     y_i  = sum_j p_ij v_j
 *
 * over the keys j that query i sees: with `causal` those with j <= i, with a mask those whose byte
 * is 1. A query that sees none has y = 0, lse = +infinity and gradients of 0. No p is kept; the
 * backward pass (dy: the gradient of y) makes it again from lse:
 *
 *     ds_ij = scale p_ij (dy_i . v_j - dy_i . y_i)
 *     dq_i = sum_j ds_ij k_j,    dk_j = sum_i ds_ij q_i,    dv_j = sum_i p_ij dy_i
 *
 * B sequences; H heads of queries, Hkv of keys and values, which H / Hkv neighbouring heads of
 * queries share; Lq queries and Lk keys of D elements, which lie side by side everywhere. The
 * scores may be of any size: maxima come off before the exponentials. A NaN comes out in every row
 * that sees it, and may in rows from which it is hidden. The result does not depend on num_threads.
 *
 * With a prefix (Li and Liang 2021) the sums over j run over prefix_length more keys and values,
 * which every query sees and the batch shares; their gradients are summed over the batch too.
 *
 * With a bias (as Raffel et al. 2020 have one) s_ij = scale q_i . k_j + bias_ij, over the
 * sequence's own keys or over those of the prefix too. It gets no gradient; -infinity hides a key.
 */
typedef struct {
  void *data;
  int64_t strides[3]; /* of the batch, the head and the token */
} deltaops_heads;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  int64_t sizes[6];        /* B, H, Hkv, Lq, Lk, D */
  deltaops_heads q;        /* [B, H, Lq, D] f32 or bf16, all alike */
  deltaops_heads k, v;     /* [B, Hkv, Lk, D] */
  const uint8_t *mask;     /* [B, H, Lq, Lk] of 0 and 1, or NULL: all see all */
  int64_t mask_strides[4]; /* 0 where it is broadcast; the last 0 or 1 */
  const float *bias;       /* [B, H, Lq, P + Lk - bias_from], or NULL: none */
  int64_t bias_strides[4]; /* as those of the mask */
  int64_t bias_from;       /* its first column is this key's of prefix and sequence: P, or 0 */
  /* [Hkv, P, D], not read without a prefix; so the stride of the batch */
  deltaops_heads prefix_k, prefix_v;
  int64_t prefix_length; /* P; 0: no prefix */
  deltaops_heads y;      /* [B, H, Lq, D], written; strides keep the heads apart */
  float *lse;            /* [B, H, Lq], contiguous, written for the backward pass; or NULL */
  float scale;           /* 1 / sqrt D, as a rule */
  int32_t causal;        /* 1: query i sees keys 0 ... i; Lq = Lk. Else 0 */
  int32_t dtype;         /* deltaops_dtype */
  int32_t prefix_dtype;  /* deltaops_dtype of both and of their gradients */
} deltaops_attention_forward_args;

typedef struct {
  uint32_t struct_size;
  int32_t num_threads;
  int64_t sizes[6];
  deltaops_heads grad_y; /* [B, H, Lq, D] */
  deltaops_heads q, k, v;
  const uint8_t *mask;
  int64_t mask_strides[4];
  const float *bias;
  int64_t bias_strides[4];
  int64_t bias_from;
  deltaops_heads prefix_k, prefix_v;
  int64_t prefix_length;
  deltaops_heads y;              /* what the forward pass wrote */
  const float *lse;              /* so too */
  deltaops_heads grad_q;         /* [B, H, Lq, D], or absent: data NULL; so the next two */
  deltaops_heads grad_k, grad_v; /* [B, Hkv, Lk, D] */
  /* [Hkv, P, D], or absent; not written without a prefix */
  deltaops_heads grad_prefix_k, grad_prefix_v;
  float scale;
  int32_t causal;
  int32_t dtype;
  int32_t prefix_dtype;
} deltaops_attention_backward_args;

DELTAOPS_API deltaops_status
deltaops_cpu_attention_forward(const deltaops_attention_forward_args *args);
DELTAOPS_API deltaops_status
deltaops_cpu_attention_backward(const deltaops_attention_backward_args *args);

/* ---- both: attention whose queries and keys are turned by rotary first, in one pass
 *
 * The same arguments. q and k are as they were before they were turned, and so are their gradients;
 * the turned ones are not rounded and stand nowhere. The keys of a prefix are not turned. */
typedef struct {
  const void *cos, *sin; /* [B, L, D] each, L = Lq = Lk, D even; as rotary has them */
  int64_t strides[2];    /* of B, 0 where the batch shares them, and of L */
  int32_t dtype;         /* f32, or that of q */
  int32_t reserved;      /* 0 */
} deltaops_rotary_tables;

DELTAOPS_API deltaops_status deltaops_cpu_rotary_attention_forward(
    const deltaops_attention_forward_args *args, const deltaops_rotary_tables *tables);
DELTAOPS_API deltaops_status deltaops_cpu_rotary_attention_backward(
    const deltaops_attention_backward_args *args, const deltaops_rotary_tables *tables);

#ifdef __cplusplus
}
#endif
#endif
