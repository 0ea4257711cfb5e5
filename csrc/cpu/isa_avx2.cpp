// isa_avx2.cpp: AVX2 and FMA. 6 x 16 tile: 12 of 16 registers. A panel is 32 KiB, read from L2 at
// 11 bytes a cycle, a block of rows 384 KiB of L2: fewer passes over the sums were measured to be
// worth more than panels that stay in L1.

#define DELTAOPS_ISA avx2
#define DELTAOPS_VECTOR_BYTES 32
#define DELTAOPS_TILE_ROWS 6
#define DELTAOPS_TILE_VECTORS 2
#define DELTAOPS_BLOCK_K_F32 512
#define DELTAOPS_BLOCK_K_BF16 512
#define DELTAOPS_BLOCK_ROWS 192
#define DELTAOPS_DPBF16 0

#include "kernels.h"

DELTAOPS_KERNELS(avx2)
