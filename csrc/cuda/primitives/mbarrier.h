/* mbarrier.h: barriers in shared memory that count arrivals and bytes  (PTX ISA, "mbarrier")
 *
 * A phase ends when as many arrivals as were promised at init came and all bytes that were
 * announced have landed; the next one begins at once. Waits name the parity of the phase they wait
 * for: 0 is the first one's, and waiting for parity 1 of a fresh barrier returns at once.
 */
#ifndef DELTAOPS_CUDA_MBARRIER_H
#define DELTAOPS_CUDA_MBARRIER_H

#include "shared.h"

#ifdef DELTAOPS_EMULATED
#include <functional>
#include <vector>
#endif

namespace deltaops {

#ifdef DELTAOPS_EMULATED

/* How a barrier looks in its 8 bytes. */
class Mbarrier {
 public:
  explicit Mbarrier(uint64_t *at) : at_(at) {
    emulation::check_shared(at, 8, 8, "mbarrier");
    if (*at >> 62 != kMagic) emulation::fail("mbarrier: used before mbarrier_init");
  }
  static void init(uint64_t *at, uint32_t arrivals) {
    emulation::check_shared(at, 8, 8, "mbarrier_init");
    if (arrivals == 0 || arrivals > kMost) emulation::fail("mbarrier_init: %u arrivals", arrivals);
    *at = kMagic << 62 | uint64_t{arrivals} << 40 | uint64_t{arrivals} << 20;
  }
  uint32_t parity() const { return *at_ >> 61 & 1; } /* of the phase that runs */
  uint32_t expected() const { return static_cast<uint32_t>(*at_ & kMost); } /* bytes */
  void expect(uint32_t bytes) { add_bytes(bytes); }
  void arrive() {
    if ((*at_ >> 20 & kMost) == 0) emulation::fail("mbarrier: more arrivals than were promised");
    *at_ -= uint64_t{1} << 20;
    end_phase();
  }
  void land(uint32_t bytes) {
    if ((*at_ & kMost) < bytes) emulation::fail("mbarrier: bytes landed that nobody announced");
    *at_ -= bytes;
    end_phase();
  }

 private:
  static constexpr uint64_t kMagic = 2; /* poison reads 3 there */
  static constexpr uint64_t kMost = (1 << 20) - 1;
  uint64_t *at_; /* from the top: magic 2, parity 1, then 20 each: promised, missing, bytes */

  void add_bytes(uint32_t bytes) {
    if ((*at_ & kMost) + bytes > kMost) emulation::fail("mbarrier: announces more than 2^20 bytes");
    *at_ += bytes;
  }
  void end_phase() {
    if ((*at_ & ((uint64_t{1} << 40) - 1)) != 0) return;
    *at_ ^= uint64_t{1} << 61;
    *at_ |= (*at_ >> 40 & kMost) << 20;
  }
};

/* What the copy engine has still to do in this block. */
struct Engine {
  struct Copy {
    uint64_t *barrier;
    uint32_t least; /* waits until so many bytes are announced */
    std::function<void()> land;
  };
  bool sees_barriers = false;
  std::vector<Copy> queued;
};

inline void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
  Mbarrier::init(barrier, arrivals);
  emulation::of_block<Engine>().sees_barriers = false;
}
inline void mbarrier_init_done() { emulation::of_block<Engine>().sees_barriers = true; }
inline void mbarrier_arrive_expecting(uint64_t *barrier, uint32_t bytes) {
  Mbarrier(barrier).expect(bytes);
  Mbarrier(barrier).arrive();
}
inline void mbarrier_arrive(uint64_t *barrier) { Mbarrier(barrier).arrive(); }

/* Copies to a barrier land when somebody waits there. */
inline void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
  emulation::wait_until("an mbarrier", [=] {
    const Mbarrier at(barrier);
    auto &queued = emulation::of_block<Engine>().queued;
    for (size_t i = 0; i < queued.size() && at.parity() == parity;) {
      if (queued[i].barrier != barrier || at.expected() < queued[i].least) {
        ++i;
        continue;
      }
      const auto land = std::move(queued[i].land);
      queued.erase(queued.begin() + static_cast<ptrdiff_t>(i));
      land();
    }
    return at.parity() != parity;
  });
}

#else

/* One thread, before the others see the barrier: see mbarrier_init_done(). */
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

/* The thread that initialised: makes it visible to the copy engine. __syncthreads() follows. */
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Arrives once and announces bytes that a copy will bring. */
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t *barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/* Until the phase of this parity has ended. */
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

#endif

}  // namespace deltaops

#endif
