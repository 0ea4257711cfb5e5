/* produce.h: x and its down-projections in one pass, where x is made
 *
 *     RMSNorm   y = x / sqrt(mean x^2 + eps) * gamma      x [M,K]  gamma [K]
 *     SwiGLU    y = gate / (1 + exp(-gate)) * up          gate, up [M,K]
 *     S_i = s_i * drop_i(y) A_i^T                         y [M,K]  A_i [R_i,K]  S_i [M,R_i]
 *
 * y is computed in fp32 and rounded once, and S is of the rounded y, as a pass over y would have
 * it. A block owns 16 rows; few_rows.h says which elements are whose. A thread alone sees its
 * chunks until the products, so they wait in shared memory without a barrier: x for the row's sum
 * of squares, y for the passes of 64 ranks after the first. What does not fit there is read again,
 * x from L2 and y from where this thread wrote it. Traffic: each input once and y once while 16
 * rows fit, the A_i from L2 once for each 16 rows, 6 M R bytes written. Memory-bound.
 */
#ifndef DELTAOPS_CUDA_AMPERE_PRODUCE_H
#define DELTAOPS_CUDA_AMPERE_PRODUCE_H

#include <math.h>

#include <type_traits>

#include "ampere/few_rows.h"
#include "ampere/mask.h"

namespace deltaops::ampere {

constexpr int kPassRanks = 64, kMaxPasses = 16;
constexpr int kRound = kGemvWarps * kGemvStep;             /* columns that a block takes at once */
constexpr int kRoundBytes = 2 * kGemvThreads * kChunk * 2; /* of shared memory */

/* Up to 64 ranks of a branch. */
struct DownPass {
  Matrix a;
  Mask mask;
  float scale;  /* with the keep scale */
  float *s;     /* may be NULL */
  void *narrow; /* of the dtype of y; may be NULL */
  int64_t s_stride, narrow_stride;
};

template <class Source>
struct ProduceArguments {
  Source source;
  Matrix y;
  DownPass passes[kMaxPasses];
  int32_t count; /* of passes, at least one: it may have no ranks */
  int32_t kept;  /* rounds whose chunks wait in shared memory */
  bool aligned;  /* all matrices are */
};

/* What is a thread's: chunk `chunk` elements into each step of rows `row` and `row` + 8. */
struct Own {
  int warp, lane, chunk;
  int64_t row;
  uint4 *slots; /* [kept][2][threads] */

  __device__ __forceinline__ Own()
      : warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        chunk(lane % 4 * kChunk),
        row(static_cast<int64_t>(blockIdx.x) * kGemvRows + lane / 4),
        slots(reinterpret_cast<uint4 *>(dynamic_shared() + kGemvShared)) {}
  __device__ __forceinline__ uint4 &slot(int round, int half) const {
    return slots[(2 * round + half) * kGemvThreads + threadIdx.x];
  }
};

using Whole = std::true_type; /* steps whose chunks are, of aligned matrices */
using Edge = std::false_type;

/* body(Whole or Edge, first column, round) for each step of this warp. */
template <typename Body>
__device__ __forceinline__ void for_own_steps(int columns, bool aligned, int warp, Body body) {
  const int whole = aligned ? columns / kGemvStep * kGemvStep : 0;
  int k = warp * kGemvStep, round = 0;
#pragma unroll 2
  for (; k < whole; k += kRound, ++round) body(Whole(), k, round);
#pragma unroll 1
  for (; k < columns; k += kRound, ++round) body(Edge(), k, round);
}

/* Elements col ... col + 7 of a row. A row that does not exist reads as the last one, or as 0. */
template <class Kind>
__device__ __forceinline__ uint4 chunk_of(Kind, const Matrix &from, int64_t row, int col) {
  if constexpr (Kind::value) {
    const int64_t there = row < from.rows ? row : from.rows - 1;
    const auto *at = static_cast<const uint16_t *>(from.data) + there * from.stride + col;
    return __ldg(reinterpret_cast<const uint4 *>(at));
  } else {
    return chunk_at_edge(from, row, col);
  }
}

/* The same of a matrix that this thread wrote in this kernel. */
template <class Kind>
__device__ __forceinline__ uint4 written_chunk(Kind, const Matrix &from, int64_t row, int col) {
  if constexpr (Kind::value) {
    if (row >= from.rows) return make_uint4(0, 0, 0, 0);
    const auto *at = static_cast<const uint16_t *>(from.data) + row * from.stride + col;
    return *reinterpret_cast<const uint4 *>(at);
  } else {
    return chunk_at_edge(from, row, col);
  }
}

template <class Kind>
__device__ __forceinline__ void store_chunk(Kind, const uint4 &values, const Matrix &to,
                                            int64_t row, int col) {
  if (row >= to.rows) return;
  auto *at = static_cast<uint16_t *>(const_cast<void *>(to.data)) + row * to.stride + col;
  if constexpr (Kind::value) {
    *reinterpret_cast<uint4 *>(at) = values;
  } else {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (col + j < to.cols) at[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
  }
}

/* body(element of a, element of b) in fp32, rounded, for eight of each. */
template <typename T, typename Body>
__device__ __forceinline__ uint4 combined(const uint4 &a, const uint4 &b, Body body) {
  const auto word = [&](uint32_t one, uint32_t other) {
    return pack_rounded<T>(body(unpacked<T>(one, 0), unpacked<T>(other, 0)),
                           body(unpacked<T>(one, 1), unpacked<T>(other, 1)));
  };
  return make_uint4(word(a.x, b.x), word(a.y, b.y), word(a.z, b.z), word(a.w, b.w));
}

struct RmsNorm {
  Matrix x, gamma; /* gamma.data may be NULL */
  float eps;
  float *rstd; /* of each row; may be NULL */
  int64_t rstd_stride;

  /* 1 / sqrt(mean x^2 + eps) of both rows. Keeps the chunks that there is room for. */
  template <typename T>
  struct Prepared {
    float rstd[2];

    __device__ __forceinline__ Prepared(const ProduceArguments<RmsNorm> &g, const Own &own) {
      const RmsNorm &source = g.source;
      float squares[2] = {};
      for_own_steps(source.x.cols, g.aligned, own.warp, [&](auto kind, int k, int round) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 x = chunk_of(kind, source.x, own.row + 8 * i, k + own.chunk);
          if (round < g.kept) own.slot(round, i) = x;
          const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float v = unpacked<T>(words[j], half);
              squares[i] += v * v;
            }
        }
      });
      auto *sums = reinterpret_cast<float *>(dynamic_shared()); /* [warps][rows] */
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], 1);
        squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], 2);
        if (own.lane % 4 == 0) sums[own.warp * kGemvRows + own.lane / 4 + 8 * i] = squares[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0.0f;
        for (int warp = 0; warp < kGemvWarps; ++warp)
          sum += sums[warp * kGemvRows + own.lane / 4 + 8 * i];
        rstd[i] = 1.0f / sqrtf(sum / static_cast<float>(source.x.cols) + source.eps);
        const int64_t row = own.row + 8 * i;
        if (source.rstd != nullptr && own.warp == 0 && own.lane % 4 == 0 && row < source.x.rows)
          source.rstd[row * source.rstd_stride] = rstd[i];
      }
    }

    template <class Kind>
    __device__ __forceinline__ uint4 chunk(Kind kind, const ProduceArguments<RmsNorm> &g,
                                           const Own &own, int k, int round, int half) const {
      const RmsNorm &source = g.source;
      const int col = k + own.chunk;
      const uint4 x = round < g.kept ? own.slot(round, half)
                                     : chunk_of(kind, source.x, own.row + 8 * half, col);
      if (source.gamma.data == nullptr)
        return combined<T>(x, x, [&](float v, float) { return v * rstd[half]; });
      return combined<T>(x, chunk_of(kind, source.gamma, 0, col),
                         [&](float v, float gamma) { return v * rstd[half] * gamma; });
    }
  };
};

struct SwiGlu {
  Matrix gate, up;

  template <typename T>
  struct Prepared {
    __device__ __forceinline__ Prepared(const ProduceArguments<SwiGlu> &, const Own &) {}

    template <class Kind>
    __device__ __forceinline__ uint4 chunk(Kind kind, const ProduceArguments<SwiGlu> &g,
                                           const Own &own, int k, int, int half) const {
      const int64_t row = own.row + 8 * half;
      const int col = k + own.chunk;
      return combined<T>(chunk_of(kind, g.source.gate, row, col),
                         chunk_of(kind, g.source.up, row, col),
                         [](float gate, float up) { return gate / (1.0f + expf(-gate)) * up; });
    }
  };
};

/* Writes S of a pass where its elements exist. */
template <typename T>
__device__ __forceinline__ void store_pass(const DownPass &pass, const Matrix &y, int row, int rank,
                                           float sum) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kGemvRows + row;
  if (at >= y.rows || rank >= pass.a.rows) return;
  const float value = pass.scale * sum;
  if (pass.s != nullptr) pass.s[at * pass.s_stride + rank] = value;
  if (pass.narrow != nullptr)
    static_cast<T *>(pass.narrow)[at * pass.narrow_stride + rank] = from_float<T>(value);
}

/* One block for 16 rows. */
template <typename T, class Source>
__global__ void __launch_bounds__(kGemvThreads)
    produce_kernel(const __grid_constant__ ProduceArguments<Source> g) {
  const Own own;
  const typename Source::template Prepared<T> prepared(g, own);
  for (int p = 0; p < g.count; ++p) {
    const DownPass &pass = g.passes[p];
    const int ranks = static_cast<int>(pass.a.rows);
    const bool masked = pass.mask.threshold > 0;
    const uint64_t seed = masked ? *pass.mask.seed : 0;
    float sums[kPassRanks / 8][4] = {};
    for_own_steps(g.y.cols, g.aligned, own.warp, [&](auto kind, int k, int round) {
      const int col = k + own.chunk;
      uint4 y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = own.row + 8 * i;
        if (p == 0) {
          y[i] = prepared.chunk(kind, g, own, k, round, i);
          store_chunk(kind, y[i], g.y, row, col);
          if (round < g.kept) own.slot(round, i) = y[i];
        } else {
          y[i] = round < g.kept ? own.slot(round, i) : written_chunk(kind, g.y, row, col);
        }
        if (masked) y[i] = dropped(y[i], row, col / kChunk, pass.mask, seed);
      }
#pragma unroll
      for (int j = 0; j < kPassRanks / 8; ++j)
        if (8 * j < ranks)
          multiply_chunks<T>(sums[j], y, chunk_of(kind, pass.a, 8 * j + own.lane / 4, col));
    });
#pragma unroll
    for (int j = 0; j < kPassRanks / 8; j += 2)
      if (8 * j < ranks) {
        __syncthreads(); /* what shared memory held before is read */
        add_up_warps(sums[j], sums[j + 1], own.warp, own.lane, [&](int row, int col, float sum) {
          store_pass<T>(pass, g.y, row, 8 * j + col, sum);
        });
      }
  }
}

}  // namespace deltaops::ampere
#endif
