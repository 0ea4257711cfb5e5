/* core.h: what the per-instruction-set files share with the plain C++ around them.
 *
 * deltaops.h (C ABI) -> dispatch.cpp -> checks.cpp -> one Kernels table per instruction set.
 * The ISA files are compiled with flags that this CPU may lack, so nothing in them may be shared
 * with other files by the linker: they include no STL, keep every function in an unnamed
 * namespace, and export one object each, the table below. The gate: nm finds no weak symbol.
 */
#ifndef DELTAOPS_CPU_CORE_H
#define DELTAOPS_CPU_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "deltaops.h"

namespace deltaops {

using ForwardArgs = deltaops_delta_linear_forward_args;
using BackwardArgs = deltaops_delta_linear_backward_args;
using BottleneckForwardArgs = deltaops_bottleneck_forward_args;
using BottleneckBackwardArgs = deltaops_bottleneck_backward_args;
using NormBiasForwardArgs = deltaops_norm_bias_forward_args;
using NormBiasBackwardArgs = deltaops_norm_bias_backward_args;
using CrossEntropyForwardArgs = deltaops_cross_entropy_forward_args;
using CrossEntropyBackwardArgs = deltaops_cross_entropy_backward_args;
using GatedForwardArgs = deltaops_gated_forward_args;
using GatedBackwardArgs = deltaops_gated_backward_args;
using RotaryArgs = deltaops_rotary_args;
using RotaryTables = deltaops_rotary_tables;
using AttentionForwardArgs = deltaops_attention_forward_args;
using AttentionBackwardArgs = deltaops_attention_backward_args;

/* What a packed weight starts with; panels follow, each [steps][panel_columns] units. */
struct PackedHeader {
  uint64_t magic;
  int64_t rows, cols;
  int32_t dtype, unit_k;  // a unit holds unit_k neighbours along cols
  int32_t panel_columns;
  int32_t reserved[7];
};
static_assert(sizeof(PackedHeader) == 64, "panels start on a cache line");
constexpr uint64_t kPackedMagic = 0x64656c74616f7073;

constexpr int32_t kMaxThreads = 1024;

/* One instruction set's bodies. Arguments have been checked; the only way to fail is memory. */
struct Kernels {
  const char *name;
  deltaops_status (*delta_linear_forward)(const ForwardArgs *layers, int64_t count);
  deltaops_status (*delta_linear_backward)(const BackwardArgs *layers, int64_t count);
  void (*pack_weight)(const deltaops_matrix &weight, void *packed, int num_threads);
  int32_t panel_columns, unit_k_f32, unit_k_bf16;  // the packed weight's format
  int64_t (*fma_peak)(int32_t dtype, int64_t steps, int num_threads);
  void (*dropout_mask)(uint8_t *keep, int64_t M, int64_t K, uint64_t seed, uint32_t stream,
                       uint32_t threshold);
  deltaops_status (*bottleneck_forward)(const BottleneckForwardArgs &);
  deltaops_status (*bottleneck_backward)(const BottleneckBackwardArgs &);
  deltaops_status (*norm_bias_forward)(const NormBiasForwardArgs &);
  deltaops_status (*norm_bias_backward)(const NormBiasBackwardArgs &);
  deltaops_status (*cross_entropy_forward)(const CrossEntropyForwardArgs &);
  deltaops_status (*cross_entropy_backward)(const CrossEntropyBackwardArgs &);
  deltaops_status (*gated_forward)(const GatedForwardArgs &);
  deltaops_status (*gated_backward)(const GatedBackwardArgs &);
  deltaops_status (*rotary)(const RotaryArgs &);
  /* Without tables nothing is turned. */
  deltaops_status (*attention_forward)(const AttentionForwardArgs &, const RotaryTables *);
  deltaops_status (*attention_backward)(const AttentionBackwardArgs &, const RotaryTables *);
};

/* Where other bodies would stand: AMX (tdpbf16ps tiles) after avx512_bf16, NEON and SVE beside
 * portable. Each is one file that sets its constants and includes kernels.h. */
#if defined(__x86_64__)
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#else
extern const Kernels kernels_portable;
#endif

/* The calling thread's scratch memory, at least `bytes` long and aligned to a cache line; it grows
 * and is kept for the next call. NULL when there is no memory: the old block is gone then too. */
void *workspace(size_t bytes);
void advise_huge_pages(void *data, size_t bytes);  // of the whole huge pages inside

/* checks.cpp: DELTAOPS_OK, or a status with its sentence in fail(). */
deltaops_status check(const ForwardArgs *args, const Kernels &kernels);
deltaops_status check(const BackwardArgs *args, const Kernels &kernels);
deltaops_status check_group(const ForwardArgs *layers, int32_t count, const Kernels &kernels);
deltaops_status check_group(const BackwardArgs *layers, int32_t count, const Kernels &kernels);
deltaops_status check_packing(const deltaops_matrix *weight, const Kernels &kernels,
                              int64_t *bytes);
deltaops_status check(const BottleneckForwardArgs *args);
deltaops_status check(const BottleneckBackwardArgs *args);
deltaops_status check(const NormBiasForwardArgs *args);
deltaops_status check(const NormBiasBackwardArgs *args);
deltaops_status check(const GatedForwardArgs *args);
deltaops_status check(const GatedBackwardArgs *args);
/* checks_heads.cpp */
deltaops_status check(const RotaryArgs *args);
deltaops_status check(const AttentionForwardArgs *args);
deltaops_status check(const AttentionBackwardArgs *args);
deltaops_status check(const AttentionForwardArgs *args, const RotaryTables *tables);
deltaops_status check(const AttentionBackwardArgs *args, const RotaryTables *tables);
/* checks_cross_entropy.cpp */
deltaops_status check(const CrossEntropyForwardArgs *args);
deltaops_status check(const CrossEntropyBackwardArgs *args);

/* Sets this thread's sentence (printf format) and returns the status. */
__attribute__((format(printf, 2, 3))) deltaops_status fail(deltaops_status status,
                                                           const char *format, ...);

}  // namespace deltaops
#endif
