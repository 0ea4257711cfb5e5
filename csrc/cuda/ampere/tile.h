/* tile.h: tiles of 16-bit matrices in shared memory, and the fragments of mma that come from them.
 *
 * A tile has rows of kChunks 16-byte chunks; chunk c of row r lies at c ^ (some bits of r), so that
 * the eight rows that one phase of ldmatrix reads fall on different banks. What lies outside the
 * matrix is zero in the tile.
 */
#ifndef DELTAOPS_CUDA_AMPERE_TILE_H
#define DELTAOPS_CUDA_AMPERE_TILE_H

#include "primitives/copy_async.h"
#include "primitives/matrix.h"

namespace deltaops::ampere {

constexpr int kChunk = 8;                         /* elements in 16 bytes */
constexpr int64_t kMostColumns = INT32_MAX - 256; /* and contracted elements: they are counted in
                                                     32 bits, rows in 64 */
constexpr int kLeastShared = 99 * 1024;           /* what every GPU from sm_80 on gives a block */

/* [rows, cols] of 16-bit elements with neighbouring columns side by side. */
struct Matrix {
  const void *data;
  int64_t rows, stride; /* the latter in elements */
  int32_t cols;
  bool aligned; /* every row starts on 16 bytes: chunks are copied asynchronously */
};

/* Where chunk `chunk` of row `row` begins, in chunks. */
template <int kChunks>
__device__ __forceinline__ int place(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks == 8 || kChunks == 16, "other widths need another pattern");
  const int turn = kChunks == 4 ? (row >> 1) & 3 : row & 7;
  return row * kChunks + (chunk ^ turn);
}

template <int kRows, int kChunks>
struct Tile {
  static constexpr int kBytes = kRows * kChunks * 16;
  uint4 *chunks;

  __device__ __forceinline__ explicit Tile(unsigned char *at)
      : chunks(reinterpret_cast<uint4 *>(at)) {}
  __device__ __forceinline__ uint4 *at(int row, int chunk) const {
    return chunks + place<kChunks>(row, chunk);
  }
};

/* body(row, chunk) for the chunks of a tile that thread `thread` of kThreads brings. */
template <int kRows, int kChunks, int kThreads, typename Body>
__device__ __forceinline__ void for_own_chunks(Body body) {
  static_assert(kRows * kChunks % kThreads == 0, "threads share a tile evenly");
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    body(index / kChunks, index % kChunks);
  }
}

/* How many elements of the chunk at (row, col) lie inside; `*source` is where they begin, or some
 * address of the matrix where there are none. */
__device__ __forceinline__ int inside(const Matrix &from, int64_t row, int col,
                                      const uint16_t **source) {
  const int left = row < from.rows ? from.cols - col : 0;
  const int count = left <= 0 ? 0 : left < kChunk ? left : kChunk;
  *source = static_cast<const uint16_t *>(from.data) + (count > 0 ? row * from.stride + col : 0);
  return count;
}

/* Starts the copy of `from` at (first_row, first_col) into the tile; the caller commits. Chunks of
 * a matrix that is not aligned are copied at once, element by element. */
template <int kRows, int kChunks, int kThreads>
__device__ __forceinline__ void fetch(const Tile<kRows, kChunks> &to, const Matrix &from,
                                      int64_t first_row, int first_col) {
  const uint16_t *source;
  if (from.aligned) {
    for_own_chunks<kRows, kChunks, kThreads>([&](int row, int chunk) {
      const int count = inside(from, first_row + row, first_col + chunk * kChunk, &source);
      copy_async_16(to.at(row, chunk), source, 2 * count);
    });
    return;
  }
#pragma unroll 1 /* slow anyway, and the fast way needs the registers */
  for (int index = static_cast<int>(threadIdx.x); index < kRows * kChunks; index += kThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int count = inside(from, first_row + row, first_col + chunk * kChunk, &source);
    auto *elements = reinterpret_cast<uint16_t *>(to.at(row, chunk));
#pragma unroll 1
    for (int j = 0; j < kChunk; ++j) elements[j] = j < count ? source[j] : 0;
  }
}

/* ---- fragments; `lane` is that of the thread in its warp ---- */

/* A of 16 rows and 16 contracted elements, from a tile [row, contracted]. */
template <class Tile>
__device__ __forceinline__ void left_fragment(uint32_t (&a)[4], const Tile &tile, int row,
                                              int chunk, int lane) {
  load_matrix<false>(a, tile.at(row + lane % 16, chunk + lane / 16));
}

/* The same from a tile [contracted, row]: `at` counts contracted elements, `chunk` rows by 8. */
template <class Tile>
__device__ __forceinline__ void left_fragment_across(uint32_t (&a)[4], const Tile &tile, int at,
                                                     int chunk, int lane) {
  load_matrix<true>(a, tile.at(at + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

/* B of 16 contracted elements and twice 8 columns, from a tile [column, contracted]. */
template <class Tile>
__device__ __forceinline__ void right_fragments(uint32_t (&b)[2][2], const Tile &tile, int column,
                                                int chunk, int lane) {
  uint32_t words[4];
  load_matrix<false>(words, tile.at(column + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}

/* The same from a tile [contracted, column]. */
template <class Tile>
__device__ __forceinline__ void right_fragments_across(uint32_t (&b)[2][2], const Tile &tile,
                                                       int at, int chunk, int lane) {
  uint32_t words[4];
  load_matrix<true>(words, tile.at(at + lane % 16, chunk + lane / 16));
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}

}  // namespace deltaops::ampere
#endif
