/* wgmma.h: products of a warpgroup, operands in shared memory  (PTX ISA, "wgmma.mma_async")
 *
 *     acc[64, N] = left[64, 16] right[16, N]  (+ acc)        fp16 or bf16, accumulated in fp32
 *
 * Thread t of the 128 holds rows r = 16 (t / 32) + (t mod 32) / 4 and r + 8; with q = t mod 4, its
 * acc[4 j + 0, 1] are columns 8 j + 2 q, + 1 of row r, and acc[4 j + 2, 3] those of row r + 8.
 *
 * The products run on while the threads do other things. wgmma_fence() comes before the first of a
 * batch, since registers may have been written; after wgmma_commit(), wgmma_wait<n>() returns when
 * all batches but the last n are done: only then acc may be read, and their tiles overwritten.
 */
#ifndef DELTAOPS_CUDA_WGMMA_H
#define DELTAOPS_CUDA_WGMMA_H

#include <stdint.h>

namespace deltaops {

enum class Half { kBf16, kF16 };

/* Which of an operand's dimensions lies contiguous in shared memory. */
enum class Major { kInner, kOuter };

constexpr uint32_t kSwizzleRow = 128;             /* bytes of a row of a box */
constexpr uint32_t kSwizzleAtom = 8 * kSwizzleRow; /* bytes after which the permutation repeats */

/* The descriptor of a tile with 128-byte swizzle that starts at this shared address.
 * kInner: rows of 64 elements of the contracted dimension; `blocks` is not read.
 * kOuter: boxes of 64 columns, `block_bytes` apart, with a row for each contracted element. */
template <Major kMajor>
#ifndef DELTAOPS_EMULATED
__device__ __forceinline__
#else
inline
#endif
    uint64_t
    wgmma_tile(uint32_t address, uint32_t block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = kMajor == Major::kInner ? 1 : block_bytes >> 4;
  return kSwizzle128 | uint64_t{kSwizzleAtom >> 4} << 32 | leading << 16 |
         (address & 0x3FFFFu) >> 4;
}

/* What 16 further contracted elements add to the descriptor. */
template <Major kMajor>
constexpr uint64_t kWgmmaStep = (kMajor == Major::kInner ? 32 : 16 * kSwizzleRow) >> 4;

}  // namespace deltaops

#ifdef DELTAOPS_EMULATED
#include "emulation/wgmma.h"
#else

namespace deltaops {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kRunning>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kRunning) : "memory");
}

/* Tells the compiler that the tensor cores write acc, so that no use of it moves across. */
template <int kCount>
__device__ __forceinline__ void wgmma_touch(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

/* "%t0, %t1, ... %t9": ten operands of the asm below, and the registers that fill them. */
#define DELTAOPS_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define DELTAOPS_ACC4(i) "+f"(acc[i]), "+f"(acc[(i) + 1]), "+f"(acc[(i) + 2]), "+f"(acc[(i) + 3])
#define DELTAOPS_ACC16(i) \
  DELTAOPS_ACC4(i), DELTAOPS_ACC4((i) + 4), DELTAOPS_ACC4((i) + 8), DELTAOPS_ACC4((i) + 12)
#define DELTAOPS_ACC64(i) \
  DELTAOPS_ACC16(i), DELTAOPS_ACC16((i) + 16), DELTAOPS_ACC16((i) + 32), DELTAOPS_ACC16((i) + 48)
#define DELTAOPS_FIRST_TEN "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define DELTAOPS_64_OF_ACC                                                                       \
  DELTAOPS_FIRST_TEN DELTAOPS_TEN(1) DELTAOPS_TEN(2) DELTAOPS_TEN(3) DELTAOPS_TEN(4) DELTAOPS_TEN( \
      5) "%60,%61,%62,%63"
#define DELTAOPS_128_OF_ACC                                                                \
  DELTAOPS_FIRST_TEN DELTAOPS_TEN(1) DELTAOPS_TEN(2) DELTAOPS_TEN(3) DELTAOPS_TEN(4)       \
      DELTAOPS_TEN(5) DELTAOPS_TEN(6) DELTAOPS_TEN(7) DELTAOPS_TEN(8) DELTAOPS_TEN(9)      \
          DELTAOPS_TEN(10) DELTAOPS_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
/* `last` are the numbers of the operands after acc: left, right, accumulate, transposed. */
#define DELTAOPS_WGMMA(shape, type, list, left_, right_, more, across, ...)              \
  asm volatile(                                                                                \
      "{\n.reg .pred more;\nsetp.ne.b32 more, " more ", 0;\n"                                  \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, " left_ ", "   \
      right_ ", more, 1, 1, 0, " across ";\n}\n"                                               \
      : __VA_ARGS__                                                                              \
      : "l"(left), "l"(right), "r"(static_cast<int32_t>(accumulate)), "n"(kAcross))

/* acc = left right, plus acc where `accumulate`. left has kInner; right is kRight. All threads of
 * the warpgroup, with the same descriptors. kColumns: 128 or 256. */
template <Half kHalf, int kColumns, Major kRight>
__device__ __forceinline__ void wgmma(float (&acc)[kColumns / 2], uint64_t left, uint64_t right,
                                      bool accumulate) {
  static_assert(kColumns == 128 || kColumns == 256, "a shape that is written out here");
  constexpr int kAcross = kRight == Major::kOuter;
  if constexpr (kColumns == 128 && kHalf == Half::kBf16)
    DELTAOPS_WGMMA("m64n128k16", "bf16", DELTAOPS_64_OF_ACC, "%64", "%65", "%66", "%67",
                   DELTAOPS_ACC64(0));
  else if constexpr (kColumns == 128)
    DELTAOPS_WGMMA("m64n128k16", "f16", DELTAOPS_64_OF_ACC, "%64", "%65", "%66", "%67",
                   DELTAOPS_ACC64(0));
  else if constexpr (kHalf == Half::kBf16)
    DELTAOPS_WGMMA("m64n256k16", "bf16", DELTAOPS_128_OF_ACC, "%128", "%129", "%130", "%131",
                   DELTAOPS_ACC64(0), DELTAOPS_ACC64(64));
  else
    DELTAOPS_WGMMA("m64n256k16", "f16", DELTAOPS_128_OF_ACC, "%128", "%129", "%130", "%131",
                   DELTAOPS_ACC64(0), DELTAOPS_ACC64(64));
}

#undef DELTAOPS_TEN
#undef DELTAOPS_ACC4
#undef DELTAOPS_ACC16
#undef DELTAOPS_ACC64
#undef DELTAOPS_FIRST_TEN
#undef DELTAOPS_64_OF_ACC
#undef DELTAOPS_128_OF_ACC
#undef DELTAOPS_WGMMA

}  // namespace deltaops

#endif
#endif
