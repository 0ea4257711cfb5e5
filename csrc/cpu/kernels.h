/* kernels.h: every op's bodies, and the table of them that an ISA file exports. */
#ifndef DELTAOPS_CPU_KERNELS_H
#define DELTAOPS_CPU_KERNELS_H

#include "attention_backward.h"
#include "attention_forward.h"
#include "bottleneck.h"
#include "cross_entropy.h"
#include "delta_linear.h"
#include "gated.h"
#include "norm_bias.h"
#include "rotary.h"

/* Ends every ISA file: the one symbol it exports. */
#define DELTAOPS_KERNELS(isa)                                                    \
  namespace deltaops {                                                           \
  const Kernels kernels_##isa = {#isa,                                           \
                                 isa::forward,                                   \
                                 isa::backward,                                  \
                                 isa::pack_weight,                               \
                                 isa::kTileColumns,                              \
                                 isa::UnitOf<isa::MainUnit<float>::type>::k,     \
                                 isa::UnitOf<isa::MainUnit<isa::Bf16>::type>::k, \
                                 isa::peak,                                      \
                                 isa::dropout_mask,                              \
                                 isa::bottleneck_forward,                        \
                                 isa::bottleneck_backward,                       \
                                 isa::norm_bias_forward,                         \
                                 isa::norm_bias_backward,                        \
                                 isa::cross_entropy_forward,                     \
                                 isa::cross_entropy_backward,                    \
                                 isa::gated_forward,                             \
                                 isa::gated_backward,                            \
                                 isa::rotary,                                    \
                                 isa::attention_forward,                         \
                                 isa::attention_backward};                       \
  }
#endif
