// workspace.cpp: scratch memory that belongs to the calling thread.
//
// One block per calling thread; the driver cuts it into its buffers, those of its OpenMP team
// included, before the first store. So running out of memory is a status and never half a result.
// Large blocks ask for huge pages: packed panels are read in strides that would miss the TLB.

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core.h"

namespace deltaops {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;

struct Block {
  void *data = nullptr;
  size_t bytes = 0;
  ~Block() { free(data); }
};

thread_local Block block;

}  // namespace

// Advice only: where it is refused the memory works just as well, in small pages.
void advise_huge_pages(void *data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void *workspace(size_t bytes) {
  if (bytes <= block.bytes) return block.data;
  free(block.data);
  block.data = nullptr;
  block.bytes = 0;
  const size_t page = bytes >= kHugePage ? kHugePage : kLine;
  if (bytes > SIZE_MAX - page) return nullptr;
  const size_t rounded = (bytes + page - 1) / page * page;
  if (posix_memalign(&block.data, page, rounded) != 0) {
    block.data = nullptr;
    return nullptr;
  }
  block.bytes = rounded;
  if (page == kHugePage) advise_huge_pages(block.data, rounded);
  return block.data;
}

}  // namespace deltaops
