// isa_avx512.cpp: AVX-512 F, BW, DQ, VL. 6 x 64 tile: 24 of 32 registers; bf16 is widened while
// packing. Blocks of k are long for the reason that isa_avx512_bf16.cpp has.

#define DELTAOPS_ISA avx512
#define DELTAOPS_VECTOR_BYTES 64
#define DELTAOPS_TILE_ROWS 6
#define DELTAOPS_TILE_VECTORS 4
#define DELTAOPS_BLOCK_K_F32 1536
#define DELTAOPS_BLOCK_K_BF16 1536
#define DELTAOPS_BLOCK_ROWS 510
#define DELTAOPS_DPBF16 0

#include "kernels.h"

DELTAOPS_KERNELS(avx512)
