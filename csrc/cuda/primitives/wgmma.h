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

#include "element.h"
#include "tensor_copy.h"

#ifdef DELTAOPS_EMULATED
#include <deque>
#include <map>
#include <vector>
#endif

namespace deltaops {

/* Which of an operand's dimensions lies contiguous in shared memory. */
enum class Major { kInner, kOuter };

/* The descriptor of a tile with 128-byte swizzle that starts at this shared address.
 * kInner: rows of 64 elements of the contracted dimension; `blocks` is not read.
 * kOuter: boxes of 64 columns, `block_bytes` apart, with a row for each contracted element. */
template <Major kMajor>
__device__ __forceinline__ uint64_t wgmma_tile(uint32_t address, uint32_t block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = kMajor == Major::kInner ? 1 : block_bytes >> 4;
  return kSwizzle128 | uint64_t{kSwizzleAtom >> 4} << 32 | leading << 16 |
         (address & 0x3FFFFu) >> 4;
}

/* What 16 further contracted elements add to the descriptor. */
template <Major kMajor>
constexpr uint64_t kWgmmaStep = (kMajor == Major::kInner ? 32 : 16 * kSwizzleRow) >> 4;

#ifdef DELTAOPS_EMULATED

/* One product: a warp reads its operands when the first of its threads has to wait for it. */
struct Product {
  uint64_t left, right; /* descriptors */
  int columns;
  Major major; /* of the right operand */
  bool half;   /* fp16 */
  bool accumulate;
  bool operator==(const Product &other) const {
    return left == other.left && right == other.right && columns == other.columns &&
           major == other.major && half == other.half && accumulate == other.accumulate;
  }
};

struct ProductOperands {
  float left[16][16];           /* a row of the warp, a contracted element */
  std::vector<float> right[16]; /* by contracted element: the columns of quad 0, of quad 1 ... */
};

/* The element whose unpermuted place this is. */
inline float wgmma_element(uint32_t address, bool half) {
  const unsigned char *at = shared_pointer(swizzled(address));
  emulation::check_shared(at, 2, 2, "wgmma");
  uint16_t bits;
  memcpy(&bits, at, 2);
  return half ? unpacked<__half>(bits, 0) : unpacked<__nv_bfloat16>(bits, 0);
}

/* Reads as the descriptors say, for one warp of the group. */
inline ProductOperands wgmma_operands(const Product &product, unsigned warp) {
  struct Fields {
    uint32_t start, leading, stride;
    explicit Fields(uint64_t d)
        : start(static_cast<uint32_t>(d & 0x3FFF) << 4),
          leading(static_cast<uint32_t>(d >> 16 & 0x3FFF) << 4),
          stride(static_cast<uint32_t>(d >> 32 & 0x3FFF) << 4) {
      if (d >> 62 != 1) emulation::fail("wgmma: only the 128-byte swizzle is emulated");
      constexpr uint64_t kFields =
          uint64_t{3} << 62 | 0x3FFFull << 32 | 0x3FFFull << 16 | 0x3FFFull;
      if ((d & ~kFields) != 0)
        emulation::fail("wgmma: the descriptor has a base offset, or bits that mean nothing");
      if (start % kSwizzleAtom >= kSwizzleRow)
        emulation::fail("wgmma: a tile starts amid the 1024 bytes of its permutation");
    }
  };
  const Fields left(product.left), right(product.right);
  ProductOperands found;
  for (uint32_t r = 0; r < 16; ++r)
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t row = 16 * warp + r;
      found.left[r][k] = wgmma_element(
          left.start + row / 8 * left.stride + row % 8 * kSwizzleRow + 2 * k, product.half);
    }
  const auto columns = static_cast<uint32_t>(product.columns);
  for (uint32_t k = 0; k < 16; ++k) {
    found.right[k].resize(columns);
    for (uint32_t c = 0; c < columns; ++c) {
      const uint32_t at = product.major == Major::kInner
                              ? right.start + c / 8 * right.stride + c % 8 * kSwizzleRow + 2 * k
                              : right.start + c / 64 * right.leading + k / 8 * right.stride +
                                    k % 8 * kSwizzleRow + c % 64 * 2;
      const uint32_t quad = c % 8 / 2;
      found.right[k][quad * columns / 4 + c / 8 * 2 + c % 2] = wgmma_element(at, product.half);
    }
  }
  return found;
}

/* The products of the warpgroups in their order, and the operands that each warp has read. */
struct BlockProducts {
  std::map<uint64_t, Product> issued[8];
  std::map<uint64_t, ProductOperands> read[32];
};

struct ThreadProducts {
  bool fenced = false;
  uint64_t issued = 0;
  std::vector<uint64_t> open; /* not committed yet */
  std::deque<std::vector<uint64_t>> batches;
  float *registers = nullptr; /* NaN while products run; `acc` is what they hold */
  std::vector<float> acc;
};

/* The instructions are of a warp: none of its lanes goes on before all are there. */
inline void wgmma_meet(const char *what) {
  emulation::collective(what, nullptr, nullptr, [](const void *const *, void *const *) {});
}

inline void wgmma_fence() {
  wgmma_meet("wgmma.fence");
  emulation::of_thread<ThreadProducts>().fenced = true;
}

inline void wgmma_commit() {
  ThreadProducts &mine = emulation::of_thread<ThreadProducts>();
  mine.batches.push_back(std::move(mine.open));
  mine.open.clear();
}

inline void wgmma_finish(ThreadProducts &mine, uint64_t number) {
  auto &block = emulation::of_block<BlockProducts>();
  auto &read = block.read[emulation::warp()];
  const Product product = block.issued[emulation::warp() / 4].at(number);
  if (read.count(number) == 0) {
    read[number] = wgmma_operands(product, emulation::warp() % 4);
    read.erase(read.begin(), read.lower_bound(number < 64 ? 0 : number - 64));
  }
  const ProductOperands &operands = read.at(number);
  const unsigned row = emulation::lane() / 4, quad = emulation::lane() % 4;
  const size_t count = static_cast<size_t>(product.columns) / 4;
  for (unsigned half = 0; half < 2; ++half) {
    float sum[64];
    for (size_t i = 0; i < count; ++i)
      sum[i] = product.accumulate ? mine.acc[i / 2 * 4 + i % 2 + 2 * half] : 0.0f;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = operands.left[row + 8 * half][k];
      const float *right = &operands.right[k][quad * count];
      for (size_t i = 0; i < count; ++i) sum[i] += left * right[i];
    }
    for (size_t i = 0; i < count; ++i) mine.acc[i / 2 * 4 + i % 2 + 2 * half] = sum[i];
  }
}

template <int kRunning>
inline void wgmma_wait() {
  wgmma_meet("wgmma.wait_group");
  ThreadProducts &mine = emulation::of_thread<ThreadProducts>();
  for (; mine.batches.size() > kRunning; mine.batches.pop_front())
    for (const uint64_t number : mine.batches.front()) wgmma_finish(mine, number);
  mine.fenced = false;
  if (!mine.batches.empty() || !mine.open.empty() || mine.registers == nullptr) return;
  memcpy(mine.registers, mine.acc.data(), mine.acc.size() * sizeof(float));
  mine.registers = nullptr;
}

template <int kCount>
inline void wgmma_touch(float (&)[kCount]) {}

template <typename T, int kColumns, Major kRight>
inline void wgmma(float (&acc)[kColumns / 2], uint64_t left, uint64_t right, bool accumulate) {
  ThreadProducts &mine = emulation::of_thread<ThreadProducts>();
  if (!mine.fenced) emulation::fail("wgmma: no wgmma_fence since registers may have been written");
  if (mine.registers == nullptr) {
    mine.registers = acc;
    mine.acc.assign(acc, acc + kColumns / 2);
    memset(acc, emulation::kPoison, sizeof acc);
  } else if (mine.registers != acc) {
    emulation::fail("wgmma: only one set of accumulators at a time is emulated");
  }
  const Product product = {left, right, kColumns, kRight, __is_same(T, __half), accumulate};
  auto &issued = emulation::of_block<BlockProducts>().issued[emulation::warp() / 4];
  if (!(issued.emplace(mine.issued, product).first->second == product))
    emulation::fail("wgmma: warp %u passes other descriptors than its warpgroup",
                    emulation::warp());
  mine.open.push_back(mine.issued++);
}

#else

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
#define DELTAOPS_8_OF_ACC "%0,%1,%2,%3,%4,%5,%6,%7"
#define DELTAOPS_16_OF_ACC DELTAOPS_FIRST_TEN "%10,%11,%12,%13,%14,%15"
#define DELTAOPS_32_OF_ACC DELTAOPS_FIRST_TEN DELTAOPS_TEN(1) DELTAOPS_TEN(2) "%30,%31"
#define DELTAOPS_64_OF_ACC                                                           \
  DELTAOPS_FIRST_TEN DELTAOPS_TEN(1) DELTAOPS_TEN(2) DELTAOPS_TEN(3) DELTAOPS_TEN(4) \
      DELTAOPS_TEN(5) "%60,%61,%62,%63"
#define DELTAOPS_128_OF_ACC                                                           \
  DELTAOPS_FIRST_TEN DELTAOPS_TEN(1) DELTAOPS_TEN(2) DELTAOPS_TEN(3) DELTAOPS_TEN(4)  \
      DELTAOPS_TEN(5) DELTAOPS_TEN(6) DELTAOPS_TEN(7) DELTAOPS_TEN(8) DELTAOPS_TEN(9) \
          DELTAOPS_TEN(10) DELTAOPS_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
/* `last` are the numbers of the operands after acc: left, right, accumulate, transposed. */
#define DELTAOPS_WGMMA(shape, type, list, left_, right_, more, across, ...)                      \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " more                                    \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, " left_ \
               ", " right_ ", more, 1, 1, 0, " across ";\n}\n"                                   \
               : __VA_ARGS__                                                                     \
               : "l"(left), "l"(right), "r"(static_cast<int32_t>(accumulate)), "n"(kAcross))

/* acc = left right, plus acc where `accumulate`. left has kInner; right is kRight. All threads of
 * the warpgroup, with the same descriptors. kColumns: 16, 32, 64, 128 or 256. */
template <typename T, int kColumns, Major kRight>
__device__ __forceinline__ void wgmma(float (&acc)[kColumns / 2], uint64_t left, uint64_t right,
                                      bool accumulate) {
  static_assert(
      kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128 || kColumns == 256,
      "a shape that is written out here");
  constexpr int kAcross = kRight == Major::kOuter;
  constexpr bool kHalf = __is_same(T, __half);
  if constexpr (kColumns == 16 && !kHalf)
    DELTAOPS_WGMMA("m64n16k16", "bf16", DELTAOPS_8_OF_ACC, "%8", "%9", "%10", "%11",
                   DELTAOPS_ACC4(0), DELTAOPS_ACC4(4));
  else if constexpr (kColumns == 16)
    DELTAOPS_WGMMA("m64n16k16", "f16", DELTAOPS_8_OF_ACC, "%8", "%9", "%10", "%11",
                   DELTAOPS_ACC4(0), DELTAOPS_ACC4(4));
  else if constexpr (kColumns == 32 && !kHalf)
    DELTAOPS_WGMMA("m64n32k16", "bf16", DELTAOPS_16_OF_ACC, "%16", "%17", "%18", "%19",
                   DELTAOPS_ACC16(0));
  else if constexpr (kColumns == 32)
    DELTAOPS_WGMMA("m64n32k16", "f16", DELTAOPS_16_OF_ACC, "%16", "%17", "%18", "%19",
                   DELTAOPS_ACC16(0));
  else if constexpr (kColumns == 64 && !kHalf)
    DELTAOPS_WGMMA("m64n64k16", "bf16", DELTAOPS_32_OF_ACC, "%32", "%33", "%34", "%35",
                   DELTAOPS_ACC16(0), DELTAOPS_ACC16(16));
  else if constexpr (kColumns == 64)
    DELTAOPS_WGMMA("m64n64k16", "f16", DELTAOPS_32_OF_ACC, "%32", "%33", "%34", "%35",
                   DELTAOPS_ACC16(0), DELTAOPS_ACC16(16));
  else if constexpr (kColumns == 128 && !kHalf)
    DELTAOPS_WGMMA("m64n128k16", "bf16", DELTAOPS_64_OF_ACC, "%64", "%65", "%66", "%67",
                   DELTAOPS_ACC64(0));
  else if constexpr (kColumns == 128)
    DELTAOPS_WGMMA("m64n128k16", "f16", DELTAOPS_64_OF_ACC, "%64", "%65", "%66", "%67",
                   DELTAOPS_ACC64(0));
  else if constexpr (!kHalf)
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
#undef DELTAOPS_8_OF_ACC
#undef DELTAOPS_16_OF_ACC
#undef DELTAOPS_32_OF_ACC
#undef DELTAOPS_64_OF_ACC
#undef DELTAOPS_128_OF_ACC
#undef DELTAOPS_WGMMA

#endif

}  // namespace deltaops

#endif
