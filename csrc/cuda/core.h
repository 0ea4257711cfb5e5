/* core.h: what the CUDA launchers share: sentences for errors, and the GPU a call is for. */
#ifndef DELTAOPS_CUDA_CORE_H
#define DELTAOPS_CUDA_CORE_H

#include <cuda_runtime.h>

#include "deltaops_cuda.h"

namespace deltaops {

/* Sets this thread's sentence (printf format) and returns the status. */
__attribute__((format(printf, 2, 3))) deltaops_status cuda_fail(deltaops_status status,
                                                                const char *format, ...);

/* DELTAOPS_OK for cudaSuccess; else a status whose sentence says what was being done. */
deltaops_status cuda_check(cudaError_t error, const char *doing);

/* Makes `device` this thread's current GPU, and the earlier one again when it goes out of scope. */
class OnDevice {
 public:
  explicit OnDevice(int32_t device);
  ~OnDevice();
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;
  deltaops_status status() const { return status_; }

 private:
  int earlier_ = -1;
  deltaops_status status_;
};

}  // namespace deltaops
#endif
