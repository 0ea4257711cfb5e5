/* emulation.cpp: fibers, their scheduler, barriers and the meeting of a warp's lanes. */
#include "emulation.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "deltaops.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace deltaops::emulation {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr unsigned kMaxThreads = 1024, kBarriers = 16; /* of a block */
constexpr unsigned kMaxFibers = kMaxTogether * 384;    /* of the blocks that run together */
static_assert(kMaxFibers >= kMaxThreads && kMaxFibers % 64 == 0, "words of bits");
constexpr size_t kMargin = 1024; /* on both sides of shared memory */

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun, ended;
  const char *waits_at; /* null: it can run */
  bool (*done)(void *); /* what it waits for; null: somebody will wake it */
  void *of;
};

/* A set of threads, so that the next one that can run is found without a look at each. */
struct Threads {
  uint64_t words[kMaxFibers / 64] = {};

  void add(unsigned i) { words[i / 64] |= uint64_t{1} << (i % 64); }
  void remove(unsigned i) { words[i / 64] &= ~(uint64_t{1} << (i % 64)); }
  /* The first member from `from` on, or -1. */
  int next(unsigned from) const {
    for (unsigned w = from / 64; w < kMaxFibers / 64; ++w) {
      const uint64_t word = w == from / 64 ? words[w] >> (from % 64) << (from % 64) : words[w];
      if (word) return static_cast<int>(64 * w) + __builtin_ctzll(word);
    }
    return -1;
  }
  int last() const {
    for (int w = kMaxFibers / 64 - 1; w >= 0; --w)
      if (words[w]) return 64 * w + 63 - __builtin_clzll(words[w]);
    return -1;
  }
};

struct Barrier {
  unsigned arrived = 0, threads = 0;
  Threads waiting;
};

struct Meeting { /* of a warp */
  const char *what = nullptr;
  unsigned arrived = 0;
  const void *in[kLanes];
  void *out[kLanes];
};

struct Block {
  Barrier barriers[kBarriers];
  Meeting meetings[kMaxThreads / kLanes];
};

struct Range {
  uintptr_t first, end;
};

Device the_device;
Order order = Order::kAscending;
uint64_t random_state = 1;
std::vector<Range> allowed;
char message[1024];

Fiber fibers[kMaxFibers];
Threads ready, polled; /* can run; wait for a condition */
unsigned char *stacks = nullptr;
unsigned threads = 0, current = 0; /* of a block; the fiber that runs, of all that run together */
unsigned cluster = 1;              /* blocks of a cluster */
unsigned together = 1;             /* blocks that run together: a cluster, or the whole grid */
uint64_t serial = 0;               /* of the first of them */
uint64_t first_block = 0;
Barrier whole_cluster[kMaxTogether]; /* by the number of the cluster */
bool running = false, failed = false;
jmp_buf scheduler;
const std::function<void()> *body;
std::vector<unsigned char> room; /* shared memory with its margins */
unsigned char *shared[kMaxTogether] = {};
size_t shared_bytes = 0;

/* Sets whose fiber runs. */
void become(unsigned number) {
  current = number;
  const unsigned inside = number % threads, in_plane = inside % (blockDim.x * blockDim.y);
  threadIdx = {in_plane % blockDim.x, in_plane / blockDim.x, inside / (blockDim.x * blockDim.y)};
  const uint64_t block = first_block + number / threads, plane = uint64_t{gridDim.x} * gridDim.y;
  blockIdx = {static_cast<unsigned>(block % plane % gridDim.x),
              static_cast<unsigned>(block % plane / gridDim.x),
              static_cast<unsigned>(block / plane)};
}

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

/* makecontext starts a fiber on its stack; from then on _setjmp and _longjmp switch, which unlike
 * swapcontext call no kernel. */
void leave() {
  if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  (*body)();
  fibers[current].ended = true;
  ready.remove(current);
  _longjmp(scheduler, 1);
}

void prepare(unsigned number) {
  Fiber &fiber = fibers[number];
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks + number * kStack + kGuard;
  fiber.start.uc_stack.ss_size = kStack - kGuard;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  fiber.begun = fiber.ended = false;
  fiber.waits_at = nullptr;
  ready.add(number);
}

void enter(unsigned number) {
  become(number);
  Fiber &fiber = fibers[number];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

void wake(unsigned number) {
  fibers[number].waits_at = nullptr;
  ready.add(number);
}

/* The running fiber goes on when it was woken. */
void sleep(const char *what, bool (*done)(void *), void *of) {
  Fiber &fiber = fibers[current];
  fiber.waits_at = what;
  fiber.done = done;
  fiber.of = of;
  ready.remove(current);
  if (done != nullptr) polled.add(current);
  leave();
}

/* The fiber that goes on, or -1. */
int choose() {
  if (_setjmp(scheduler) != 0) return -1; /* a condition called fail() */
  for (int i = polled.next(0); i >= 0; i = polled.next(current + 1)) {
    current = static_cast<unsigned>(i); /* a condition may ask whose it is; not for indices */
    if (!fibers[i].done(fibers[i].of)) continue;
    polled.remove(current);
    wake(current);
  }
  if (order == Order::kDescending) return ready.last();
  if (order == Order::kAscending) return ready.next(0);
  const int later = ready.next(static_cast<unsigned>(random_number() % (threads * together)));
  return later >= 0 ? later : ready.next(0);
}

/* "threads 0-31 wait at __syncthreads; 32-63 have ended" */
std::string who_waits() {
  std::string text;
  const auto state = [](unsigned i) {
    return fibers[i].ended ? std::string("have ended")
                           : std::string("wait at ") + fibers[i].waits_at;
  };
  for (unsigned i = 0, end; i < threads * together; i = end) {
    for (end = i + 1; end < threads * together && state(end) == state(i);) ++end;
    text += (i ? "; " : "threads ") + std::to_string(i) + "-" + std::to_string(end - 1) + " " +
            state(i);
  }
  return text;
}

void fail_from_outside(const char *format, ...) __attribute__((format(printf, 1, 2)));
void vset(const char *format, va_list values) {
  become(current); /* a condition may have failed */
  const int used =
      snprintf(message, sizeof message, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  vsnprintf(message + used, sizeof message - static_cast<size_t>(used), format, values);
  failed = true;
}
void fail_from_outside(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vset(format, values);
  va_end(values);
}

bool margins_hold() {
  const auto poison = [](unsigned char byte) { return byte == kPoison; };
  const unsigned char *from = room.data();
  for (unsigned i = 0; i < together; ++i) {
    if (!std::all_of(from, static_cast<const unsigned char *>(shared[i]), poison)) return false;
    from = shared[i] + shared_bytes;
  }
  return std::all_of(from, static_cast<const unsigned char *>(room.data() + room.size()), poison);
}

bool ended(const Fiber &fiber) { return fiber.ended; }

/* The blocks that run together. */
void run_blocks() {
  serial += kMaxTogether;
  std::fill(room.begin(), room.end(), kPoison);
  ready = polled = Threads{};
  std::fill(whole_cluster, whole_cluster + kMaxTogether, Barrier{});
  for (unsigned i = 0; i < threads * together; ++i) prepare(i);
  for (int next; (next = choose()) >= 0 && !failed;) enter(static_cast<unsigned>(next));
  if (failed) return;
  if (!std::all_of(fibers, fibers + threads * together, ended))
    fail_from_outside("deadlock: %s", who_waits().c_str());
  else if (!margins_hold())
    fail_from_outside("wrote outside its %zu bytes of dynamic shared memory", shared_bytes);
}

/* One more thread at the barrier; whether it was the last, and those who wait go on. */
bool arrive(Barrier &barrier, unsigned expected) {
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  for (int i = barrier.waiting.next(0); i >= 0; i = barrier.waiting.next(0)) {
    wake(static_cast<unsigned>(i));
    barrier.waiting.remove(static_cast<unsigned>(i));
  }
  return true;
}

bool arrive(unsigned number, unsigned expected) {
  if (number >= kBarriers) fail("barrier %u: there are %u", number, kBarriers);
  if (expected == 0 || expected % kLanes != 0 || expected > threads)
    fail("barrier %u: %u threads is no number of whole warps of a block of %u", number, expected,
         threads);
  Barrier &barrier = of_block<Block>().barriers[number];
  if (barrier.arrived > 0 && barrier.threads != expected)
    fail("barrier %u: a thread expects %u threads, and earlier ones %u", number, expected,
         barrier.threads);
  barrier.threads = expected;
  return arrive(barrier, expected);
}

}  // namespace

Device &device() { return the_device; }

const char *error() { return message; }

void set_error(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
}

bool run_grid(dim3 grid, dim3 block, size_t bytes, unsigned of_cluster, bool all,
              const std::function<void()> &thread) {
  message[0] = '\0';
  if (running) return set_error("a kernel was launched by device code"), false;
  threads = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535)
    return set_error("a grid of (%u, %u, %u) blocks of %u threads cannot be launched", grid.x,
                     grid.y, grid.z, threads),
           false;
  const uint64_t at_once = all ? blocks : of_cluster;
  if (of_cluster == 0 || of_cluster > kMaxCluster || grid.x % of_cluster != 0 ||
      at_once > kMaxTogether || threads * at_once > kMaxFibers)
    return set_error(
               "%llu blocks of %u threads together, in clusters of %u, of a grid of (%u, %u, "
               "%u) are not emulated",
               static_cast<unsigned long long>(at_once), threads, of_cluster, grid.x, grid.y,
               grid.z),
           false;
  if (stacks == nullptr) {
    void *got = mmap(nullptr, kMaxFibers * kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return set_error("no address space for the fibers' stacks"), false;
    stacks = static_cast<unsigned char *>(got);
    for (unsigned i = 0; i < kMaxFibers; ++i)
      if (mprotect(stacks + i * kStack, kGuard, PROT_NONE) != 0)
        return set_error("the fibers' stacks cannot be guarded"), false;
  }
  cluster = of_cluster;
  together = static_cast<unsigned>(at_once);
  const size_t apart = (bytes + 2 * kMargin + 1023) / 1024 * 1024;
  room.assign(together * apart + 2 * kMargin + 1024, kPoison);
  const uintptr_t earliest = reinterpret_cast<uintptr_t>(room.data()) + kMargin;
  for (unsigned i = 0; i < together; ++i)
    shared[i] = room.data() + kMargin + ((1024 - earliest % 1024) % 1024) + i * apart;
  shared_bytes = bytes;
  gridDim = grid;
  blockDim = block;
  body = &thread;
  failed = false;
  running = true;
  std::vector<uint64_t> sequence(blocks / together);
  std::iota(sequence.begin(), sequence.end(), uint64_t{0});
  if (order == Order::kDescending) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::kShuffled)
    for (uint64_t i = sequence.size(); i > 1; --i)
      std::swap(sequence[i - 1], sequence[random_number() % i]);
  for (const uint64_t number : sequence) {
    if (failed) break;
    first_block = number * together;
    run_blocks();
  }
  running = false;
  return !failed;
}

unsigned thread_number() { return current % threads; }
unsigned block_threads() { return threads; }
unsigned block_place() { return current / threads; }
uint64_t block_serial() { return serial + block_place(); }
void *shared_memory() { return shared[block_place()]; }
unsigned cluster_size() { return cluster; }
unsigned cluster_rank() { return block_place() % cluster; }

void cluster_sync() {
  Barrier &barrier = whole_cluster[block_place() / cluster];
  if (arrive(barrier, threads * cluster)) return;
  barrier.waiting.add(current);
  sleep("barrier.cluster", nullptr, nullptr);
}

void *in_block(const void *own, unsigned rank) {
  return shared[block_place() - cluster_rank() + rank] +
         (static_cast<const unsigned char *>(own) - shared[block_place()]);
}

unsigned change_block(unsigned rank) {
  const unsigned own = cluster_rank();
  if (rank >= cluster) fail("block %u of a cluster of %u", rank, cluster);
  const unsigned first = (block_place() - own + rank) * threads;
  if (std::all_of(fibers + first, fibers + first + threads, ended))
    fail("block %u of the cluster is asked for something, and has ended", rank);
  current = first + thread_number();
  return own;
}

void check_shared(const void *from, size_t bytes, size_t alignment, const char *what) {
  const unsigned char *mine = shared[block_place()];
  const auto *first = static_cast<const unsigned char *>(from);
  if (first < mine || first + bytes > mine + shared_bytes)
    fail("%s: bytes %td to %td of shared memory, which has %zu", what, first - mine,
         first - mine + static_cast<ptrdiff_t>(bytes), shared_bytes);
  if ((first - mine) % static_cast<ptrdiff_t>(alignment) != 0)
    fail("%s: byte %td of shared memory is not on %zu bytes", what, first - mine, alignment);
}

void check_global(const void *from, size_t bytes, size_t alignment, const char *what) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  if (first % alignment != 0) fail("%s: address %p is not on %zu bytes", what, from, alignment);
  if (allowed.empty()) return;
  for (const Range &range : allowed)
    if (first >= range.first && first + bytes <= range.end) return;
  fail("%s: %zu bytes from %p lie outside every buffer", what, bytes, from);
}

void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vset(format, values);
  va_end(values);
  for (;;) _longjmp(scheduler, 1); /* this fiber is never entered again */
}

void wait_until(const char *what, bool (*done)(void *), void *of) { sleep(what, done, of); }

void collective(const char *what, const void *in, void *out, Combine combine) {
  if (threads % kLanes != 0) fail("%s: a block of %u threads has a ragged warp", what, threads);
  Meeting &meeting = of_block<Block>().meetings[warp()];
  if (meeting.arrived > 0 && strcmp(meeting.what, what) != 0)
    fail("warp %u: lane %u is at %s, and earlier lanes are at %s", warp(), lane(), what,
         meeting.what);
  meeting.what = what;
  meeting.in[lane()] = in;
  meeting.out[lane()] = out;
  if (++meeting.arrived < kLanes) return sleep(what, nullptr, nullptr);
  combine(meeting.in, meeting.out);
  meeting.arrived = 0;
  for (unsigned i = 0; i < kLanes; ++i) wake(current / kLanes * kLanes + i);
}

void barrier_sync(unsigned number, unsigned expected) {
  static const char *const names[kBarriers] = {"barrier 0 (__syncthreads)",
                                               "barrier 1",
                                               "barrier 2",
                                               "barrier 3",
                                               "barrier 4",
                                               "barrier 5",
                                               "barrier 6",
                                               "barrier 7",
                                               "barrier 8",
                                               "barrier 9",
                                               "barrier 10",
                                               "barrier 11",
                                               "barrier 12",
                                               "barrier 13",
                                               "barrier 14",
                                               "barrier 15"};
  if (arrive(number, expected)) return;
  of_block<Block>().barriers[number].waiting.add(current);
  sleep(names[number], nullptr, nullptr);
}

void barrier_arrive(unsigned number, unsigned expected) { arrive(number, expected); }

}  // namespace deltaops::emulation

using namespace deltaops::emulation;

extern "C" {

/* For tests: the GPU that is played, and who runs first. */
DELTAOPS_API void deltaops_emulation_configure(int32_t capability, int32_t multiprocessors,
                                               int32_t which, uint64_t seed) {
  device().capability = capability;
  device().multiprocessors = multiprocessors;
  const int32_t major = capability / 10;
  device().shared_memory = (major == 9 || major == 10 ? 227 : capability == 80 ? 163 : 99) * 1024;
  order = static_cast<Order>(which);
  random_state = seed | 1;
}

/* From the first of these on, what primitives read and write must lie in one of the ranges. */
DELTAOPS_API void deltaops_emulation_allow(const void *first, uint64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(first);
  allowed.push_back({address, address + bytes});
}

DELTAOPS_API void deltaops_emulation_forget(void) { allowed.clear(); }
}
