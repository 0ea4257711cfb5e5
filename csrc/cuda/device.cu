/* device.cu: what CUDA finds on this machine, in numbers and, where something is missing, in words.
 */
#include <stdarg.h>
#include <stdio.h>

#include "core.h"

namespace deltaops {
namespace {

thread_local char last_error[512] = "";

}  // namespace

deltaops_status cuda_fail(deltaops_status status, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return status;
}

deltaops_status cuda_check(cudaError_t error, const char *doing) {
  switch (error) {
    case cudaSuccess:
      return DELTAOPS_OK;
    case cudaErrorInsufficientDriver: {
      /* Also the answer where there is no driver at all: then its version reads 0. */
      int driver = 0;
      cudaDriverGetVersion(&driver);
      if (driver == 0)
        return cuda_fail(DELTAOPS_UNSUPPORTED,
                         "%s: no NVIDIA driver on this machine (libcuda.so.1 was not found); "
                         "install the driver, or use a CPU backend",
                         doing);
      return cuda_fail(
          DELTAOPS_UNSUPPORTED,
          "%s: the NVIDIA driver serves CUDA up to %d.%d, and this library was built with "
          "CUDA %d.%d; update the driver, or rebuild with an older toolkit",
          doing, driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
          CUDART_VERSION % 1000 / 10);
    }
    case cudaErrorNoDevice:
      return cuda_fail(
          DELTAOPS_UNSUPPORTED,
          "%s: there is an NVIDIA driver and no GPU that it shows to this process; check "
          "nvidia-smi and CUDA_VISIBLE_DEVICES",
          doing);
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: /* what an attribute of such a kernel gives */
      return cuda_fail(DELTAOPS_UNSUPPORTED,
                       "%s: this library was compiled for sm_%s and not for this GPU; rebuild with "
                       "DELTAOPS_CUDA_ARCHS set to its architecture",
                       doing, deltaops_cuda_archs());
    case cudaErrorUnsupportedPtxVersion:
      return cuda_fail(DELTAOPS_UNSUPPORTED,
                       "%s: this library was built with CUDA %d.%d, and the older NVIDIA driver "
                       "cannot translate its PTX for this GPU; update the driver, or rebuild with "
                       "DELTAOPS_CUDA_ARCHS set to its architecture alone",
                       doing, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    case cudaErrorMemoryAllocation:
      return cuda_fail(DELTAOPS_OUT_OF_MEMORY, "%s: the GPU has no memory left for it", doing);
    default:
      return cuda_fail(DELTAOPS_UNSUPPORTED, "%s: CUDA reports %s (%s)", doing,
                       cudaGetErrorName(error), cudaGetErrorString(error));
  }
}

OnDevice::OnDevice(int32_t device) {
  status_ = cuda_check(cudaGetDevice(&earlier_), "asking for the current GPU");
  if (status_ == DELTAOPS_OK && earlier_ != device)
    status_ = cuda_check(cudaSetDevice(device), "choosing the GPU of the tensors");
}

OnDevice::~OnDevice() {
  int now = -1;
  if (earlier_ >= 0 && cudaGetDevice(&now) == cudaSuccess && now != earlier_)
    cudaSetDevice(earlier_);
}

}  // namespace deltaops

using deltaops::cuda_check;
using deltaops::cuda_fail;

extern "C" {

uint32_t deltaops_cuda_abi_version(void) { return DELTAOPS_CUDA_ABI_VERSION; }

const char *deltaops_cuda_last_error(void) { return deltaops::last_error; }

const char *deltaops_cuda_archs(void) { return DELTAOPS_CUDA_ARCHS; }

deltaops_status deltaops_cuda_device_count(int32_t *count) {
  if (count == nullptr)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT,
                     "device_count: count must point to an int32_t, got NULL");
  int found = 0;
  const deltaops_status status = cuda_check(cudaGetDeviceCount(&found), "counting GPUs");
  *count = status == DELTAOPS_OK ? found : 0;
  return status;
}

deltaops_status deltaops_cuda_describe(int32_t device, deltaops_cuda_device_info *info) {
  if (info == nullptr || info->struct_size != sizeof *info)
    return cuda_fail(
        DELTAOPS_INVALID_ARGUMENT,
        "describe: info must be a deltaops_cuda_device_info with struct_size = %zu; were "
        "caller and library compiled from the same deltaops_cuda.h?",
        sizeof *info);
  int32_t count = 0;
  deltaops_status status = deltaops_cuda_device_count(&count);
  if (status != DELTAOPS_OK) return status;
  if (device < 0 || device >= count)
    return cuda_fail(DELTAOPS_INVALID_ARGUMENT, "describe: device must be in [0, %d), got %d",
                     count, device);
  cudaDeviceProp found;
  status = cuda_check(cudaGetDeviceProperties(&found, device), "reading a GPU's properties");
  if (status != DELTAOPS_OK) return status;
  info->capability = 10 * found.major + found.minor;
  info->multiprocessors = found.multiProcessorCount;
  info->shared_memory = static_cast<int32_t>(found.sharedMemPerBlockOptin);
  info->memory = found.totalGlobalMem;
  snprintf(info->name, sizeof info->name, "%s", found.name);
  return DELTAOPS_OK;
}
}
