// isa_portable.cpp: any CPU, 16-byte vectors. A NEON body would take 8 x 12 and stand beside this
// file.

#define DELTAOPS_ISA portable
#define DELTAOPS_VECTOR_BYTES 16
#define DELTAOPS_TILE_ROWS 4
#define DELTAOPS_TILE_VECTORS 2
#define DELTAOPS_BLOCK_K_F32 256
#define DELTAOPS_BLOCK_K_BF16 256
#define DELTAOPS_BLOCK_ROWS 192
#define DELTAOPS_DPBF16 0

#include "kernels.h"

DELTAOPS_KERNELS(portable)
