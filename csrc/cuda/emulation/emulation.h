/* emulation.h: a CUDA grid on the CPU, so that g++ compiles the device code and tests run it.
 *
 * One fiber is one CUDA thread. Clusters, or blocks, run one after another; the blocks of a cluster
 * run together, and so do all blocks of a cooperative launch. Of those a fiber runs until it has to
 * wait, and then the Order says which goes on:
 *
 *     ascending, descending   always the lowest (highest) thread that can: one warp races ahead
 *     shuffled                any thread that can, from a seed; blocks in a random order too
 *
 * A race that a missing barrier leaves open therefore shows as different bits. Where no thread can
 * go on, the launch fails and says where each of them waits.
 *
 * Shared memory starts as NaN bits, between margins that are looked at when the block ends. What
 * device code reaches by PTX goes through csrc/cuda/primitives/, whose bodies under
 * DELTAOPS_EMULATED are written with what follows. To add an instruction:
 *     waits       wait_until("mbarrier", [&] { return barrier.phase != parity; }): the condition is
 *                 asked again and again and may itself make progress (land what is outstanding).
 *     a warp's    collective("mma", &in, &out, combine): all 32 lanes meet, combine runs once.
 *     state       of_block<T>(), of_thread<T>(): a T that is new in each block (and thread).
 *     memory      check_shared, check_global: bounds and alignment of one access.
 *     broken use  fail("..."): ends the launch with that sentence.
 * Asynchronous copies land as late as the program allows, and what they will overwrite is NaN from
 * their start: a missing wait reads NaN, and so does a buffer that is filled again too early.
 *
 * Not seen: fences between the generic and the async proxy (but for mbarrier_init_done, and of what
 * store_matrix and publish wrote), memory order beyond barriers, what is no primitive (plain loads
 * and stores of global memory), registers and their moves by setmaxnreg, bank conflicts, and blocks
 * that run at the same time, but for those of a cluster or a cooperative launch.
 *
 * No part of libdeltaops_cuda.so. One host thread at a time.
 */
#ifndef DELTAOPS_CUDA_EMULATION_H
#define DELTAOPS_CUDA_EMULATION_H

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* Those of the fiber that runs. */
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace deltaops::emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned char kPoison = 0xFF; /* NaN as float, half and bfloat16 */

enum class Order : int { kAscending = 0, kDescending = 1, kShuffled = 2 };

/* The GPU that is played. */
struct Device {
  int capability = 80;
  int multiprocessors = 3; /* few, so that small problems make a persistent block go on */
  size_t shared_memory = 163 * 1024;
};
Device &device();

/* Runs `thread` for each thread of each block: together the `cluster` blocks of a cluster,
 * neighbours in x, or `all` blocks. False where it failed; error() says how. */
bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool all,
              const std::function<void()> &thread);
const char *error();
/* Sets error() without a launch; for what a runtime call refuses. */
__attribute__((format(printf, 1, 2))) void set_error(const char *format, ...);

/* ---- for the bodies of primitives; only within a launch ---- */

unsigned thread_number(); /* in its block: x fastest */
inline unsigned lane() { return thread_number() % kLanes; }
inline unsigned warp() { return thread_number() / kLanes; }
unsigned block_threads();
uint64_t block_serial(); /* another number for every block that was ever run */

void *shared_memory(); /* the dynamic part, on 1024 bytes */

constexpr unsigned kMaxCluster = 2, kMaxTogether = 8; /* blocks */
/* Of the thread's block. */
unsigned block_place(); /* among the blocks that run together */
unsigned cluster_size();
unsigned cluster_rank();
void cluster_sync(); /* all threads of the cluster meet */
/* Another block's place for what is at `own` in this one's shared memory. */
void *in_block(const void *own, unsigned rank);
/* From then on the thread counts as one of that block; returns its own block's rank. */
unsigned change_block(unsigned rank);
/* Calls body() as a thread of that block would. */
template <class F>
void as_block(unsigned rank, F body) {
  const unsigned own = change_block(rank);
  body();
  change_block(own);
}
void check_shared(const void *from, size_t bytes, size_t alignment, const char *what);
/* Bounds are known where a test names its buffers: deltaops_emulation_allow. */
void check_global(const void *from, size_t bytes, size_t alignment, const char *what);

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);

void wait_until(const char *what, bool (*done)(void *), void *of);
template <class F>
void wait_until(const char *what, F done) {
  wait_until(what, [](void *f) -> bool { return (*static_cast<F *>(f))(); }, &done);
}

/* in[i], out[i]: what lane i passed; they live on the fibers' stacks. */
using Combine = void (*)(const void *const in[kLanes], void *const out[kLanes]);
void collective(const char *what, const void *in, void *out, Combine combine);

/* Named barriers: bar.sync and bar.arrive of PTX. Number 0 with all threads is __syncthreads. */
void barrier_sync(unsigned number, unsigned threads);
void barrier_arrive(unsigned number, unsigned threads);

template <class T>
T &of_block() {
  static T values[kMaxTogether];
  static uint64_t serials[kMaxTogether] = {};
  T &value = values[block_place()];
  uint64_t &serial = serials[block_place()];
  if (serial != block_serial()) value = T{}, serial = block_serial();
  return value;
}
template <class T>
T &of_thread() {
  struct All {
    std::vector<T> each = std::vector<T>(block_threads());
  };
  return of_block<All>().each[thread_number()];
}

}  // namespace deltaops::emulation
#endif
