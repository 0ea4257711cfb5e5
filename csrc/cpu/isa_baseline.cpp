// isa_baseline.cpp: SSE2, which every x86-64 has. 4 x 8 tile: 8 of 16 registers, no FMA.

#define DELTAOPS_ISA baseline
#define DELTAOPS_VECTOR_BYTES 16
#define DELTAOPS_TILE_ROWS 4
#define DELTAOPS_TILE_VECTORS 2
#define DELTAOPS_BLOCK_K_F32 64
#define DELTAOPS_BLOCK_K_BF16 256
#define DELTAOPS_BLOCK_ROWS 192
#define DELTAOPS_DPBF16 0

#include "delta_linear.h"

DELTAOPS_KERNELS(baseline)
