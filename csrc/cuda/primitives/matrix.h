/* matrix.h: the tensor cores of sm_80: ldmatrix and mma.sync.m16n8k16 with fp32 accumulators.
 *   (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix")
 *
 * With g = lane / 4 and q = lane % 4, and two elements (the lower column first) in a register:
 *     A [16,16]   a0 (g, 2q)    a1 (g+8, 2q)    a2 (g, 2q+8)    a3 (g+8, 2q+8)
 *     B [16,8]    b0 (2q, g) and (2q+1, g)      b1 (2q+8, g) and (2q+9, g)
 *     C [16,8]    c0, c1 (g, 2q), (g, 2q+1)     c2, c3 (g+8, 2q), (g+8, 2q+1)
 * ldmatrix gives register i the 8 x 8 matrix whose rows lanes 8 i ... 8 i + 7 point to: elements
 * (g, 2q) and (g, 2q+1), transposed (2q, g) and (2q+1, g).
 */
#ifndef DELTAOPS_CUDA_MATRIX_H
#define DELTAOPS_CUDA_MATRIX_H

#include <type_traits>

#include "element.h"
#include "shared.h"

namespace deltaops {

#ifdef DELTAOPS_EMULATED

template <bool kTransposed>
inline void load_matrix(uint32_t (&to)[4], const void *row) {
  emulation::check_shared(row, 16, 16, "ldmatrix");
  emulation::collective(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", row, to,
      [](const void *const *in, void *const *out) {
        for (unsigned lane = 0; lane < 32; ++lane)
          for (unsigned i = 0; i < 4; ++i) {
            const unsigned g = lane / 4, q = lane % 4;
            uint16_t pair[2];
            for (unsigned j = 0; j < 2; ++j) {
              const unsigned r = kTransposed ? 2 * q + j : g, c = kTransposed ? g : 2 * q + j;
              memcpy(&pair[j], static_cast<const char *>(in[8 * i + r]) + 2 * c, 2);
            }
            static_cast<uint32_t *>(out[lane])[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
          }
      });
}

/* c += a b */
template <typename T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    const uint32_t *a, *b;
  };
  const Operands mine = {a, b};
  emulation::collective("mma", &mine, c, [](const void *const *in, void *const *out) {
    float A[16][16], B[8][16]; /* B by columns */
    for (unsigned lane = 0; lane < 32; ++lane) {
      const unsigned g = lane / 4, q = lane % 4;
      const Operands &of = *static_cast<const Operands *>(in[lane]);
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned j = 0; j < 2; ++j)
          A[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + j] = unpacked<T>(of.a[i], j);
      for (unsigned i = 0; i < 2; ++i)
        for (unsigned j = 0; j < 2; ++j) B[g][2 * q + 8 * i + j] = unpacked<T>(of.b[i], j);
    }
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
        float &sum = static_cast<float *>(out[lane])[i];
        for (unsigned k = 0; k < 16; ++k) sum += A[row][k] * B[col][k];
      }
  });
}

#else

template <bool kTransposed>
__device__ __forceinline__ void load_matrix(uint32_t (&to)[4], const void *row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace deltaops
#endif
