// recycled.h: memory of large outputs that goes round instead of back to the system.
//
// glibc maps every large block anew and unmaps it when it is freed, so each activation of a
// training step faults in, page by page, memory that the step before has just given back. Here a
// block whose tensor has died waits for the next one of its size class. It reaches a framework as a
// DLPack capsule, whose deleter is called from any thread, with or without the GIL.

#ifndef DELTAOPS_BINDINGS_RECYCLED_H
#define DELTAOPS_BINDINGS_RECYCLED_H

#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "deltaops.h"
#include "dlpack.h"

namespace deltaops_bindings {

namespace py = pybind11;

class Recycler {
 public:
  // Never destroyed: tensors may outlive the module.
  static Recycler &instance() {
    static Recycler *const recycler = new Recycler;
    return *recycler;
  }

  // At least `bytes`; *capacity is what give() wants to hear.
  void *take(size_t bytes, size_t *capacity) {
    *capacity = size_class(bytes);
    std::vector<Block> dropped;
    void *found = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++clock_;
      for (size_t i = idle_.size(); i-- > 0 && found == nullptr;)  // the last given is the warmest
        if (idle_[i].capacity == *capacity) {
          found = idle_[i].data;
          idle_bytes_ -= *capacity;
          idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
        }
      while (!idle_.empty() && clock_ - idle_.front().given > kStale) drop_oldest(&dropped);
    }
    free_all(dropped);
    if (found != nullptr) return found;
    found = map(*capacity);
    if (found == nullptr) {
      release();
      found = map(*capacity);
    }
    if (found == nullptr) throw std::bad_alloc();
    deltaops_cpu_advise_huge_pages(found, static_cast<int64_t>(*capacity));
    return found;
  }

  void give(void *data, size_t capacity) {
    std::vector<Block> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back({data, capacity, clock_});
      idle_bytes_ += capacity;
      while (idle_bytes_ > limit_) drop_oldest(&dropped);
    }
    free_all(dropped);
  }

  size_t idle_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
  }

  void set_limit(size_t bytes) {
    std::vector<Block> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      limit_ = bytes;
      while (idle_bytes_ > limit_) drop_oldest(&dropped);
    }
    free_all(dropped);
  }

  void release() {
    std::vector<Block> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      dropped.swap(idle_);
      idle_bytes_ = 0;
    }
    free_all(dropped);
  }

 private:
  struct Block {
    void *data;
    size_t capacity;
    uint64_t given;  // the clock then
  };

  static constexpr size_t kHugePage = size_t{1} << 21;
  // Calls of take() after which an idle block goes back: dozens of steps of a model of dozens of
  // layers.
  static constexpr uint64_t kStale = 4096;

  // Four classes to a doubling, in whole huge pages: batches of varying length share blocks, and
  // what a tensor leaves of its block is never touched.
  static size_t size_class(size_t bytes) {
    size_t step = kHugePage;
    while (bytes > 8 * step) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  void drop_oldest(std::vector<Block> *dropped) {
    dropped->push_back(idle_.front());
    idle_bytes_ -= idle_.front().capacity;
    idle_.erase(idle_.begin());
  }

  // Whole huge pages of the system; NULL when it has none. Not from malloc: aligned blocks of many
  // sizes, coming and going, tear its heap into pieces that fit nothing, and it never shrinks.
  static void *map(size_t bytes) {
    const size_t span = bytes + kHugePage;
    void *mapped = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char *const begin = static_cast<char *>(mapped);
    const size_t head = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
    if (head > 0) munmap(begin, head);
    munmap(begin + head + bytes, kHugePage - head);
    return begin + head;
  }

  static void free_all(const std::vector<Block> &blocks) {
    for (const Block &block : blocks) munmap(block.data, block.capacity);
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // by age
  size_t idle_bytes_ = 0, limit_ = 0;
  uint64_t clock_ = 0;
};

// One tensor [rows, cols] on a block; freed with it.
struct Lent {
  DLManagedTensor managed;
  int64_t shape[2], strides[2];
  size_t capacity;
};

inline void take_back(DLManagedTensor *managed) {
  const Lent *lent = static_cast<const Lent *>(managed->context);
  Recycler::instance().give(managed->tensor.data, lent->capacity);
  delete lent;
}

inline py::capsule recycled(int dtype, int64_t rows, int64_t cols) {
  const int64_t size = dtype == DELTAOPS_BF16 ? 2 : 4;
  int64_t bytes;
  if (rows < 1 || cols < 1 || __builtin_mul_overflow(rows, cols, &bytes) ||
      __builtin_mul_overflow(bytes, size, &bytes))
    throw py::value_error("deltaops._cpu: recycled: rows and cols must be positive and countable.");
  size_t capacity = 0;
  void *data = Recycler::instance().take(static_cast<size_t>(bytes), &capacity);
  Lent *lent = new Lent;
  lent->shape[0] = rows;
  lent->shape[1] = lent->strides[0] = cols;
  lent->strides[1] = 1;
  lent->capacity = capacity;
  const uint8_t code = dtype == DELTAOPS_BF16 ? kDLBfloat : kDLFloat;
  lent->managed = {{data,
                    {kDLCPU, 0},
                    2,
                    {code, static_cast<uint8_t>(8 * size), 1},
                    lent->shape,
                    lent->strides,
                    0},
                   lent,
                   take_back};
  // Who takes the tensor renames the capsule; one that nobody took gives the block back.
  return py::capsule(&lent->managed, "dltensor", [](PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    void *managed = PyCapsule_GetPointer(capsule, "dltensor");
    take_back(static_cast<DLManagedTensor *>(managed));
  });
}

}  // namespace deltaops_bindings
#endif
