// isa_avx512_bf16.cpp: AVX-512 with BF16: the main product of bf16 layers runs on VDPBF16PS. A
// panel is at most 384 KiB, read from L2 at 11 bytes a cycle, which the tile does not feel; every
// pass over the sums, it does: blocks of k are as long as the panel and a tile's rows fit in L2.

#define DELTAOPS_ISA avx512_bf16
#define DELTAOPS_VECTOR_BYTES 64
#define DELTAOPS_TILE_ROWS 6
#define DELTAOPS_TILE_VECTORS 4
#define DELTAOPS_BLOCK_K_F32 1536
#define DELTAOPS_BLOCK_K_BF16 3072
#define DELTAOPS_BLOCK_ROWS 510
#define DELTAOPS_DPBF16 1

#include "kernels.h"

DELTAOPS_KERNELS(avx512_bf16)
