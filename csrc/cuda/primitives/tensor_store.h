/* tensor_store.h: the copy engine writes boxes of shared memory to a matrix
 *   (PTX ISA, "stmatrix", "cp.async.bulk.tensor", "Async proxy")
 *
 * Boxes lie as tensor_copy.h says. What of a box lies outside the matrix is not written, but the
 * engine writes 16 bytes at a time: where columns are no multiple of 8, beyond the end of a row
 * (seen on an H200; the emulated one refuses it). Threads fill a box by store_matrix() and call
 * tensor_store_fence() before they meet at a barrier; then one thread queues the store and ends the
 * group. The box may be filled again once that thread has waited for the group and the others have
 * met it at a barrier; before a block ends, it waits for all of its groups.
 *
 * Emulated: the engine reads a box when its thread waits for the group, and never where it does
 * not. It reads NaN where the box was written without a fence, or changed since the store was
 * queued.
 */
#ifndef DELTAOPS_CUDA_TENSOR_STORE_H
#define DELTAOPS_CUDA_TENSOR_STORE_H

#include "tensor_copy.h"

#ifdef DELTAOPS_EMULATED
#include <deque>
#include <vector>
#endif

namespace deltaops {

#ifdef DELTAOPS_EMULATED

/* The rows of matrices, 16 bytes each, that each thread has written since its last fence. */
struct Unfenced {
  std::vector<std::vector<const unsigned char *>> rows =
      std::vector<std::vector<const unsigned char *>>(emulation::block_threads());
};

inline void store_matrix(void *row, const uint32_t (&from)[4]) {
  emulation::check_shared(row, 16, 16, "stmatrix");
  struct Stored {
    unsigned char *row;
    const uint32_t *from;
  };
  const Stored mine = {static_cast<unsigned char *>(row), from};
  emulation::of_block<Unfenced>().rows[emulation::thread_number()].push_back(mine.row);
  emulation::collective("stmatrix", &mine, nullptr, [](const void *const *in, void *const *) {
    const auto of = [in](unsigned lane) { return static_cast<const Stored *>(in[lane]); };
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 4; ++i)
        memcpy(of(8 * i + lane / 4)->row + lane % 4 * 4, &of(lane)->from[i], 4);
  });
}

inline void tensor_store_fence() {
  emulation::of_block<Unfenced>().rows[emulation::thread_number()].clear();
}

struct BoxStore {
  TensorMap map;
  int32_t row, column;
  const unsigned char *from;
  std::vector<unsigned char> seen; /* the box when the store was queued */
};
struct BoxStores {
  std::vector<BoxStore> open; /* not committed yet */
  std::deque<std::vector<BoxStore>> groups;
};

inline void tensor_store(const TensorMap *map, int32_t row, int32_t column, const void *from) {
  const uint32_t bytes = static_cast<uint32_t>(map->box_rows) * kSwizzleRow;
  emulation::check_shared(from, bytes, kSwizzleAtom, "cp.async.bulk.tensor");
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
    emulation::fail("cp.async.bulk.tensor: the tensor map is not on 64 bytes");
  if (map->columns % 8 != 0)
    emulation::fail("cp.async.bulk.tensor: would write 16 bytes across the end of a row");
  const auto *first = static_cast<const unsigned char *>(from);
  BoxStore store = {*map, row, column, first, {first, first + bytes}};
  for (const auto &rows : emulation::of_block<Unfenced>().rows)
    for (const unsigned char *written : rows)
      if (written >= first && written < first + bytes)
        memset(&store.seen[static_cast<size_t>(written - first)], emulation::kPoison, 16);
  emulation::of_thread<BoxStores>().open.push_back(std::move(store));
}

inline void tensor_store_commit() {
  BoxStores &stores = emulation::of_thread<BoxStores>();
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}

inline void land(const BoxStore &store) {
  const uint32_t first = shared_address(store.from);
  for (int32_t r = 0; r < store.map.box_rows; ++r)
    for (int32_t c = 0; c < 64; ++c) {
      const int64_t row = int64_t{store.row} + r, column = int64_t{store.column} + c;
      if (row < 0 || row >= store.map.rows || column < 0 || column >= store.map.columns) continue;
      const uint32_t at =
          swizzled(first + static_cast<uint32_t>(r) * kSwizzleRow + static_cast<uint32_t>(c) * 2) -
          first;
      auto *to = const_cast<uint16_t *>(store.map.data) + row * store.map.row_stride + column;
      emulation::check_global(to, 2, 2, "cp.async.bulk.tensor");
      if (memcmp(&store.seen[at], store.from + at, 2) == 0)
        memcpy(to, &store.seen[at], 2);
      else
        memset(to, emulation::kPoison, 2);
    }
}

template <int kGroups>
inline void tensor_store_wait() {
  BoxStores &stores = emulation::of_thread<BoxStores>();
  for (; stores.groups.size() > kGroups; stores.groups.pop_front())
    for (const BoxStore &store : stores.groups.front()) land(store);
}

#else

/* Four 8 x 8 matrices of 16-bit elements: lane l points to row l % 8 of matrix l / 8, and has in
 * from[i] elements 2 (l % 4) and + 1 of row l / 4 of matrix i. All lanes of the warp. */
__device__ __forceinline__ void store_matrix(void *row, const uint32_t (&from)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

/* Lets the copy engine see what this thread has written to shared memory. */
__device__ __forceinline__ void tensor_store_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Queues the store of the box at `from`, aligned to 1024 bytes; its first element is (row, column)
 * of the matrix. One thread. */
__device__ __forceinline__ void tensor_store(const TensorMap *map, int32_t row, int32_t column,
                                             const void *from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(shared_address(from))
      : "memory");
}

/* Ends this thread's group of stores. */
__device__ __forceinline__ void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until the engine has read the boxes of all but this thread's kGroups newest groups. */
template <int kGroups>
__device__ __forceinline__ void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

#endif

}  // namespace deltaops

#endif
