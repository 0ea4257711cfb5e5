// isa_avx2.cpp: AVX2 and FMA. 6 x 16 tile: 12 of 16 registers; a panel is 16 KiB of L1, a block 192
// KiB of L2.

#define DELTAOPS_ISA avx2
#define DELTAOPS_VECTOR_BYTES 32
#define DELTAOPS_TILE_ROWS 6
#define DELTAOPS_TILE_VECTORS 2
#define DELTAOPS_BLOCK_K_F32 256
#define DELTAOPS_BLOCK_K_BF16 256
#define DELTAOPS_BLOCK_ROWS 192
#define DELTAOPS_DPBF16 0

#include "kernels.h"

DELTAOPS_KERNELS(avx2)
