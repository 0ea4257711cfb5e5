/* quantized.h: the products of delta_linear on a quantised weight for at most 16 rows, as in
 * decoding
 *
 *     y = x W^T + S B^T + bias,   W = codes * scales        x [M,K]  W [N,K]  S [M,R]  B [N,R]
 *
 *     int8   W[n, k] = codes[n, k] * scales[n]
 *     NF4    W.flat[i] = kNf4[code i] * scales[i div block]    (Dettmers et al. 2023, section 3)
 *            two codes a byte, the first in the upper half
 *
 * Bound by reading the codes once: N K or N K / 2 bytes. An element is its product in fp32, rounded
 * to the dtype of x, as every other way to read such a weight has it. Products as few_rows.h has
 * them, with the contracted elements in yet another order: lane (g, q) loads 16 bytes of codes of
 * column g, which are elements kCodes q ... of a step of 4 kCodes, makes their numbers in registers
 * and takes the chunks of x that go with them. NF4's values come from a copy for each lane, in
 * banks of its own. Weights whose rows or blocks do not allow that are read code by code.
 */
#ifndef DELTAOPS_CUDA_AMPERE_QUANTIZED_H
#define DELTAOPS_CUDA_AMPERE_QUANTIZED_H

#include "ampere/gemv.h"

namespace deltaops::ampere {

constexpr int kNf4Values = 16;
/* Quantiles of the normal distribution, as files of codes mean them. */
__constant__ const float kNf4[kNf4Values] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

struct QuantizedArguments {
  GemmArguments rest; /* S B^T and others, the bias, and y */
  Matrix x;
  const void *codes;
  const float *scales;
  int64_t block; /* elements that share a scale, of NF4 */
  bool aligned;  /* the codes of a lane are 16 bytes with one scale */
};

constexpr int kTableBytes = kNf4Values * 32 * 4;
constexpr int kQuantizedShared = kGemvShared + kTableBytes;

/* The numbers of a weight, as this lane makes them. */
struct Int8 {
  static constexpr int kCodes = 16; /* in 16 bytes */

  __device__ __forceinline__ Int8(const QuantizedArguments &, int) {}
  static __device__ __forceinline__ const unsigned char *place(const QuantizedArguments &g,
                                                               int64_t n, int k) {
    return static_cast<const unsigned char *>(g.codes) + n * g.x.cols + k;
  }
  static __device__ __forceinline__ float scale(const QuantizedArguments &g, int64_t n, int) {
    return g.scales[n];
  }
  /* Code `which` of a word. */
  __device__ __forceinline__ float value(uint32_t word, int which) const {
    return static_cast<float>(static_cast<int8_t>(word >> (8 * which)));
  }
  __device__ __forceinline__ float one(const QuantizedArguments &g, int64_t n, int k) const {
    return value(*place(g, n, k), 0);
  }
};

struct Nf4 {
  static constexpr int kCodes = 32;
  const float *table; /* of this lane, kNf4Values rows of 32 */

  __device__ __forceinline__ Nf4(const QuantizedArguments &, int lane) {
    auto *all = reinterpret_cast<float *>(dynamic_shared() + kGemvShared);
    for (int i = static_cast<int>(threadIdx.x); i < kNf4Values * 32; i += kGemvThreads)
      all[i] = kNf4[i / 32];
    __syncthreads();
    table = all + lane;
  }
  static __device__ __forceinline__ int64_t flat(const QuantizedArguments &g, int64_t n, int k) {
    return n * g.x.cols + k;
  }
  static __device__ __forceinline__ const unsigned char *place(const QuantizedArguments &g,
                                                               int64_t n, int k) {
    return static_cast<const unsigned char *>(g.codes) + flat(g, n, k) / 2;
  }
  static __device__ __forceinline__ float scale(const QuantizedArguments &g, int64_t n, int k) {
    return g.scales[flat(g, n, k) / g.block];
  }
  /* Code `which` of a word: of each byte the upper half is the first. */
  __device__ __forceinline__ float value(uint32_t word, int which) const {
    return table[(word >> (4 * (which ^ 1)) & 15) * 32];
  }
  __device__ __forceinline__ float one(const QuantizedArguments &g, int64_t n, int k) const {
    return value(*place(g, n, k), static_cast<int>(flat(g, n, k) % 2));
  }
};

/* Eight numbers, of codes first ... first + 7 of `words`. */
template <typename T, class Weight>
__device__ __forceinline__ uint4 numbers(const Weight &weight, const uint32_t (&words)[4],
                                         int first, float scale) {
  constexpr int kOfWord = Weight::kCodes / 4;
  const auto number = [&](int i) {
    return weight.value(words[(first + i) / kOfWord], (first + i) % kOfWord) * scale;
  };
  return make_uint4(pack_rounded<T>(number(0), number(1)), pack_rounded<T>(number(2), number(3)),
                    pack_rounded<T>(number(4), number(5)), pack_rounded<T>(number(6), number(7)));
}

/* Eight numbers of a row of W read one by one, 0 where there are none. */
template <typename T, class Weight>
__device__ __forceinline__ uint4 numbers_at_edge(const Weight &weight, const QuantizedArguments &g,
                                                 int64_t n, int k) {
  const auto number = [&](int i) {
    if (n >= g.rest.columns || k + i >= g.x.cols) return 0.0f;
    return weight.one(g, n, k + i) * weight.scale(g, n, k + i);
  };
  return make_uint4(pack_rounded<T>(number(0), number(1)), pack_rounded<T>(number(2), number(3)),
                    pack_rounded<T>(number(4), number(5)), pack_rounded<T>(number(6), number(7)));
}

/* Adds the steps of x W^T that are this warp's. */
template <typename T, class Weight>
__device__ __forceinline__ void add_quantized(FewRows<T> &tile, const Weight &weight,
                                              const QuantizedArguments &g, int first_col, int warp,
                                              int lane) {
  constexpr int kSideways = FewRows<T>::kSideways, kCodes = Weight::kCodes, kStep = 4 * kCodes;
  const int row = lane / 4, mine = lane % 4 * kCodes;
  const int whole = g.aligned ? g.x.cols / kStep * kStep : 0;
  const uint16_t *lefts[2];
  int64_t columns[kSideways];
#pragma unroll
  for (int i = 0; i < 2; ++i) { /* what does not exist reads as the last, as in gemv.h */
    const int64_t m = row + 8 * i < g.x.rows ? row + 8 * i : g.x.rows - 1;
    lefts[i] = static_cast<const uint16_t *>(g.x.data) + m * g.x.stride + mine;
  }
#pragma unroll
  for (int j = 0; j < kSideways; ++j) {
    const int64_t n = first_col + 8 * j + row;
    columns[j] = n < g.rest.columns ? n : g.rest.columns - 1;
  }
  int k = warp * kStep;
#pragma unroll 2 /* loads of two steps are under way together */
  for (; k < whole; k += kGemvWarps * kStep) {
    uint32_t words[kSideways][4];
    float scales[kSideways];
#pragma unroll
    for (int j = 0; j < kSideways; ++j) {
      const auto *at = Weight::place(g, columns[j], k + mine);
      const uint4 codes = __ldg(reinterpret_cast<const uint4 *>(at));
      words[j][0] = codes.x, words[j][1] = codes.y, words[j][2] = codes.z, words[j][3] = codes.w;
      scales[j] = Weight::scale(g, columns[j], k + mine);
    }
#pragma unroll
    for (int chunk = 0; chunk < kCodes; chunk += kChunk) {
      uint4 left[2], right[kSideways];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        left[i] = __ldg(reinterpret_cast<const uint4 *>(lefts[i] + k + chunk));
#pragma unroll
      for (int j = 0; j < kSideways; ++j) right[j] = numbers<T>(weight, words[j], chunk, scales[j]);
      tile.add(left, right);
    }
  }
#pragma unroll 1
  for (; k < g.x.cols; k += kGemvWarps * kStep)
#pragma unroll 1
    for (int chunk = 0; chunk < kCodes; chunk += kChunk) {
      uint4 left[2], right[kSideways];
#pragma unroll
      for (int i = 0; i < 2; ++i) left[i] = chunk_at_edge(g.x, row + 8 * i, k + mine + chunk);
#pragma unroll
      for (int j = 0; j < kSideways; ++j)
        right[j] = numbers_at_edge<T>(weight, g, first_col + 8 * j + row, k + mine + chunk);
      tile.add(left, right);
    }
}

/* One block for 16 columns. */
template <typename T, class Weight>
__global__ void __launch_bounds__(kGemvThreads)
    quantized_kernel(const __grid_constant__ QuantizedArguments g) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = static_cast<int>(blockIdx.x) * kGemvColumns;
  const Weight weight(g, lane);
  FewRows<T> tile;
  add_quantized<T>(tile, weight, g, first_col, warp, lane);
  for (int s = 0; s < g.rest.count; ++s) tile.add(g.rest.segments[s], first_col, warp, lane);
  tile.finish(g.rest, first_col, warp, lane);
}

}  // namespace deltaops::ampere
#endif
