// isa_avx512_bf16.cpp: AVX-512 with BF16: the main product of bf16 layers runs on VDPBF16PS.

#define DELTAOPS_ISA avx512_bf16
#define DELTAOPS_VECTOR_BYTES 64
#define DELTAOPS_TILE_ROWS 6
#define DELTAOPS_TILE_VECTORS 4
#define DELTAOPS_BLOCK_K_F32 512
#define DELTAOPS_BLOCK_K_BF16 1024
#define DELTAOPS_BLOCK_ROWS 510
#define DELTAOPS_DPBF16 1

#include "kernels.h"

DELTAOPS_KERNELS(avx512_bf16)
