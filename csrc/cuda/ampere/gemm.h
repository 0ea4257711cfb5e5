/* gemm.h: the two products of delta_linear with mma.sync, each output in one accumulator.
 *
 *     forward       y  = x W^T + sum_i S_i B_i^T + bias       x [M,K]  W [N,K]  S [M,R]  B [N,R]
 *     input grad    dx = dy W + sum_i mask_i * (dS_i A_i)     dy [M,N]  dS [M,R]  A [R,K]
 *
 * Both are sums over segments, out += left right, and one loop with one pipeline runs through the
 * 32-element steps of all of them; bf16 or fp16, summed in fp32, rounded once. Forward, the right
 * matrix lies [columns, contracted] (kAcross off), for the gradient [contracted, columns].
 * A masked segment sums each fragment of its step apart and adds what the mask keeps: the mask is
 * linear, so any number of masked branches share the accumulator.
 *
 * A block makes a tile of 128 x 128 by 4 warps, 64 x 64 each (128 accumulators a thread), or where
 * something is masked, which takes registers, by 8 warps of 64 x 32. Four stages of 16 KB are
 * filled by cp.async. An SM of an A100 has two blocks of the first kind or one of the second, 8
 * warps. Traffic of a tile: 512 bytes for each contracted element, from L2 for the most part, as
 * eight rows of tiles go down together; 32 KB out.
 */
#ifndef DELTAOPS_CUDA_AMPERE_GEMM_H
#define DELTAOPS_CUDA_AMPERE_GEMM_H

#include "ampere/mask.h"
#include "ampere/tile.h"

namespace deltaops::ampere {

constexpr int kMaxSegments = 16, kMaxMasked = 8;
constexpr int kTileRows = 128, kTileColumns = 128, kStep = 32;
constexpr int kGemmStages = 4;
constexpr int kTilesDown = 8; /* rows of tiles that go down together */

struct Segment {
  Matrix left;  /* [M, contracted] */
  Matrix right; /* [columns, contracted], or [contracted, columns] */
  Mask mask;
};

struct GemmArguments {
  Segment segments[kMaxSegments];
  int count;
  const void *bias; /* [columns], or NULL */
  void *out;        /* [rows, columns] */
  int64_t rows, out_stride;
  int32_t columns;
  bool out_aligned; /* rows of out start on 16 bytes */
};

using LeftTile = Tile<kTileRows, kStep / kChunk>;
using RightTile = Tile<kTileColumns, kStep / kChunk>;
using RightTileAcross = Tile<kStep, kTileColumns / kChunk>;
using OutTile = Tile<kTileRows, kTileColumns / kChunk>;
constexpr int kGemmStageBytes = LeftTile::kBytes + RightTile::kBytes;
constexpr int kStagesBytes = kGemmStages * kGemmStageBytes;
constexpr int kKeepWords = kTileRows * kTileColumns / 32; /* the mask of a tile */
static_assert(OutTile::kBytes <= kStagesBytes, "the output is staged where the operands were");

template <bool kMasked>
constexpr int kGemmThreads = kMasked ? 256 : 128;

/* A place in the steps of all segments. */
struct Cursor {
  int segment = 0, at = 0;

  __device__ __forceinline__ void advance(const GemmArguments &g) {
    at += kStep;
    if (at >= g.segments[segment].left.cols) {
      at = 0;
      ++segment;
    }
  }
};

template <bool kAcross, int kThreads>
__device__ __forceinline__ void fetch_step(unsigned char *stage, const Segment &segment, int at,
                                           int64_t first_row, int first_col) {
  fetch<kTileRows, kStep / kChunk, kThreads>(LeftTile(stage), segment.left, first_row, at);
  if constexpr (kAcross)
    fetch<kStep, kTileColumns / kChunk, kThreads>(RightTileAcross(stage + LeftTile::kBytes),
                                                  segment.right, at, first_col);
  else
    fetch<kTileColumns, kStep / kChunk, kThreads>(RightTile(stage + LeftTile::kBytes),
                                                  segment.right, first_col, at);
}

/* Bytes of shared memory: the stages, and the mask of each masked segment. */
constexpr int gemm_shared(int masked) { return kStagesBytes + masked * 4 * kKeepWords; }
static_assert(gemm_shared(kMaxMasked) <= kLeastShared);

/* What a warp sums, from (row, column) of the block's tile on. */
template <typename T, bool kAcross, bool kMasked>
struct WarpTile {
  static constexpr int kThreads = kGemmThreads<kMasked>;
  static constexpr int kDown = 4, kSideways = kMasked ? 4 : 8; /* fragments [16, 8] */
  static constexpr int kWarpsSideways = kTileColumns / (8 * kSideways);

  float sums[kDown][kSideways][4];
  int row, column, lane;

  __device__ __forceinline__ WarpTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    row = warp / kWarpsSideways * 16 * kDown;
    column = warp % kWarpsSideways * 8 * kSideways;
    lane = static_cast<int>(threadIdx.x) % 32;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kSideways; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
  }

  /* All columns of the warp, 16 contracted elements from k on. */
  __device__ __forceinline__ void load_right(uint32_t (&b)[kSideways / 2][2][2],
                                             unsigned char *stage, int k) const {
    unsigned char *at = stage + LeftTile::kBytes;
#pragma unroll
    for (int pair = 0; pair < kSideways / 2; ++pair) {
      if constexpr (kAcross)
        right_fragments_across(b[pair], RightTileAcross(at), k, column / kChunk + 2 * pair, lane);
      else
        right_fragments(b[pair], RightTile(at), column + 16 * pair, k / kChunk, lane);
    }
  }

  __device__ __forceinline__ void add_step(unsigned char *stage) {
    const LeftTile left(stage);
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[kSideways / 2][2][2];
      load_right(b, stage, k);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        uint32_t a[4];
        left_fragment(a, left, row + 16 * i, k / kChunk, lane);
#pragma unroll
        for (int j = 0; j < kSideways; ++j) multiply<T>(sums[i][j], a, b[j / 2][j % 2]);
      }
    }
  }

  /* Leaves what of the tile of out that begins at (first_row, first_col) the mask keeps in `keep`:
   * bit 16 (i % 2) + 8 h + 2 j + e of word i / 2 for sums[i][j][2 h + e]. */
  __device__ __forceinline__ void draw(uint32_t *keep, const Mask &mask, int64_t first_row,
                                       int first_col) const {
    static_assert(kSideways == 4, "a row of fragments is one call of kept_in_row");
    const uint64_t seed = *mask.seed;
    const int group = (first_col + column) / kChunk;
    for (int word = 0; word < kDown / 2; ++word) {
      uint32_t bits = 0;
      for (int part = 0; part < 4; ++part) {
        const int64_t r = first_row + row + 32 * word + 8 * part + lane / 4;
        bits |= kept_in_row(r, group, mask, seed, lane) << (8 * part);
      }
      keep[word * kThreads + threadIdx.x] = bits;
    }
  }

  __device__ __forceinline__ void add_kept_step(unsigned char *stage, const uint32_t *keep,
                                                float scale) {
    const LeftTile left(stage);
#pragma unroll 1 /* for fewer registers */
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[kSideways / 2][2][2];
      load_right(b, stage, k);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const uint32_t bits = keep[i / 2 * kThreads + threadIdx.x] >> (16 * (i % 2));
        uint32_t a[4];
        left_fragment(a, left, row + 16 * i, k / kChunk, lane);
#pragma unroll
        for (int j = 0; j < kSideways; ++j) {
          float term[4] = {};
          multiply<T>(term, a, b[j / 2][j % 2]);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (bits >> (8 * (e / 2) + 2 * j + e % 2) & 1) sums[i][j][e] += scale * term[e];
        }
      }
    }
  }

  /* Adds the bias, rounds, and leaves the tile in shared memory. */
  __device__ __forceinline__ void put(const OutTile &tile, const T *bias, int first_col,
                                      int columns) const {
#pragma unroll
    for (int j = 0; j < kSideways; ++j) {
      const int col = column + 8 * j + 2 * (lane % 4);
      float add[2] = {};
      if (bias != nullptr)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (first_col + col + e < columns) add[e] = to_float(bias[first_col + col + e]);
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + 16 * i + 8 * half + lane / 4;
          auto *pairs = reinterpret_cast<uint32_t *>(tile.at(r, col / kChunk));
          pairs[lane % 4] =
              pack_rounded<T>(sums[i][j][2 * half] + add[0], sums[i][j][2 * half + 1] + add[1]);
        }
    }
  }
};

/* Writes what of the tile lies inside out. */
template <int kThreads>
__device__ __forceinline__ void store_out(const OutTile &tile, const GemmArguments &g,
                                          int64_t first_row, int first_col) {
  for_own_chunks<kTileRows, kTileColumns / kChunk, kThreads>([&](int row, int chunk) {
    const int64_t r = first_row + row;
    const int c = first_col + chunk * kChunk;
    if (r >= g.rows || c >= g.columns) return;
    auto *to = static_cast<uint16_t *>(g.out) + r * g.out_stride + c;
    const uint4 values = *tile.at(row, chunk);
    if (g.out_aligned && c + kChunk <= g.columns) {
      *reinterpret_cast<uint4 *>(to) = values;
      return;
    }
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (c + j < g.columns) to[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
  });
}

/* One block a tile. */
template <typename T, bool kAcross, bool kMasked>
__global__ void __launch_bounds__(kGemmThreads<kMasked>, kMasked ? 1 : 2)
    gemm_kernel(const __grid_constant__ GemmArguments g) {
  constexpr int kThreads = kGemmThreads<kMasked>;
  unsigned char *shared = dynamic_shared();
  auto *keep = reinterpret_cast<uint32_t *>(shared + kStagesBytes);
  const int64_t down = (g.rows + kTileRows - 1) / kTileRows;
  const int across = (g.columns + kTileColumns - 1) / kTileColumns;
  const int64_t block = blockIdx.x, first_down = block / (kTilesDown * across) * kTilesDown;
  const int64_t height = down - first_down < kTilesDown ? down - first_down : kTilesDown;
  const int64_t within = block % (kTilesDown * across);
  const int64_t first_row = (first_down + within % height) * kTileRows;
  const int first_col = static_cast<int>(within / height) * kTileColumns;

  Cursor fetched;
  int filled = 0; /* the stage that is filled next */
  const auto fetch_next = [&] {
    if (fetched.segment < g.count) {
      fetch_step<kAcross, kThreads>(shared + filled * kGemmStageBytes, g.segments[fetched.segment],
                                    fetched.at, first_row, first_col);
      fetched.advance(g);
    }
    copy_async_commit(); /* empty at the end, so that the wait counts alike */
    filled = filled + 1 == kGemmStages ? 0 : filled + 1;
  };
  for (int i = 0; i < kGemmStages - 1; ++i) fetch_next();

  WarpTile<T, kAcross, kMasked> tile;
  if constexpr (kMasked) /* while the copies are under way and no register is an accumulator yet */
    for (int i = 0, masked = 0; i < g.count; ++i)
      if (g.segments[i].mask.threshold > 0)
        tile.draw(keep + kKeepWords * masked++, g.segments[i].mask, first_row, first_col);
  tile.clear();

  int stage = 0;
  for (Cursor cursor; cursor.segment < g.count; cursor.advance(g)) {
    copy_async_wait<kGemmStages - 2>();
    __syncthreads(); /* shows the stage to all, and that all have done with the one filled next */
    fetch_next();
    const Segment &segment = g.segments[cursor.segment];
    unsigned char *now = shared + stage * kGemmStageBytes;
    if (!kMasked || segment.mask.threshold == 0) {
      tile.add_step(now);
    } else if constexpr (kMasked) {
      tile.add_kept_step(now, keep, keep_scale(segment.mask.threshold));
      if (cursor.at + kStep >= segment.left.cols) keep += kKeepWords; /* the next one's */
    }
    stage = stage + 1 == kGemmStages ? 0 : stage + 1;
  }

  copy_async_wait<0>();
  __syncthreads();
  const OutTile out(shared);
  tile.put(out, static_cast<const T *>(g.bias), first_col, g.columns);
  __syncthreads();
  store_out<kThreads>(out, g, first_row, first_col);
}

}  // namespace deltaops::ampere
#endif
