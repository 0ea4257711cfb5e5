/* cuda_runtime.h of the emulator: as much of CUDA C++ and its runtime as csrc/cuda uses. */
#ifndef DELTAOPS_EMULATED_CUDA_RUNTIME_H
#define DELTAOPS_EMULATED_CUDA_RUNTIME_H

#include <math.h>
#include <string.h>

#include <map>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static /* of the one block that runs */
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_VERSION 0

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

/* ---- what a block and a warp do together ---- */

inline void __syncthreads() {
  deltaops::emulation::barrier_sync(0, deltaops::emulation::block_threads());
}

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void require_all_lanes(unsigned mask, const char *what) {
  if (mask != kAllLanes) deltaops::emulation::fail("%s: only whole warps are emulated", what);
}

inline void __syncwarp(unsigned mask = kAllLanes) {
  require_all_lanes(mask, "__syncwarp");
  deltaops::emulation::collective("__syncwarp", nullptr, nullptr,
                                  [](const void *const *, void *const *) {});
}

template <class T>
struct Shuffled {
  T value;
  int source; /* the lane whose value comes */
};

template <class T>
T shuffle_from(const char *what, T value, int source) {
  const Shuffled<T> in = {value, source};
  T out;
  deltaops::emulation::collective(what, &in, &out, [](const void *const *in, void *const *out) {
    for (unsigned i = 0; i < deltaops::emulation::kLanes; ++i) {
      const int from = static_cast<const Shuffled<T> *>(in[i])->source;
      *static_cast<T *>(out[i]) = static_cast<const Shuffled<T> *>(in[from])->value;
    }
  });
  return out;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  require_all_lanes(mask, "__shfl_xor_sync");
  return shuffle_from("__shfl_xor_sync", value,
                      static_cast<int>(deltaops::emulation::lane()) ^ other);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  require_all_lanes(mask, "__shfl_sync");
  return shuffle_from("__shfl_sync", value, source & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  require_all_lanes(mask, "__shfl_down_sync");
  const unsigned here = deltaops::emulation::lane();
  return shuffle_from("__shfl_down_sync", value,
                      static_cast<int>(here + by < 32 ? here + by : here));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  require_all_lanes(mask, "__ballot_sync");
  unsigned out;
  deltaops::emulation::collective(
      "__ballot_sync", &predicate, &out, [](const void *const *in, void *const *out) {
        unsigned bits = 0;
        for (unsigned i = 0; i < 32; ++i)
          bits |= static_cast<unsigned>(*static_cast<const int *>(in[i]) != 0) << i;
        for (unsigned i = 0; i < 32; ++i) *static_cast<unsigned *>(out[i]) = bits;
      });
  return out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == kAllLanes;
}

template <class T>
T __ldg(const T *from) {
  deltaops::emulation::check_global(from, sizeof(T), alignof(T), "__ldg");
  return *from;
}

/* ---- the runtime ---- */

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorInsufficientDriver,
  cudaErrorNoDevice,
  cudaErrorInvalidDevice,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorLaunchFailure
};
using cudaStream_t = void *;

inline const char *cudaGetErrorName(cudaError_t) { return "an error of the emulated grid"; }
inline const char *cudaGetErrorString(cudaError_t) { return deltaops::emulation::error(); }
inline cudaError_t cudaDriverGetVersion(int *version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int *number) { return *number = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int number) {
  if (number == 0) return cudaSuccess;
  deltaops::emulation::set_error("there is only device 0, got %d", number);
  return cudaErrorInvalidDevice;
}

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerBlockOptin, totalGlobalMem;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *found, int) {
  const deltaops::emulation::Device &device = deltaops::emulation::device();
  *found = {
      "emulated",           device.capability / 10, device.capability % 10, device.multiprocessors,
      device.shared_memory, size_t{1} << 30};
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  const deltaops::emulation::Device &device = deltaops::emulation::device();
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device.shared_memory);
      break;
  }
  return cudaSuccess;
}

/* Bytes of dynamic shared memory that each kernel asked for. */
inline std::map<const void *, size_t> &shared_memory_opted() {
  static std::map<const void *, size_t> opted;
  return opted;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > deltaops::emulation::device().shared_memory) {
    deltaops::emulation::set_error("%d bytes of shared memory, and a block has at most %zu", bytes,
                                   deltaops::emulation::device().shared_memory);
    return cudaErrorInvalidValue;
  }
  shared_memory_opted()[reinterpret_cast<const void *>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative /* all blocks run together */
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
  size_t most = 48 * 1024;
  const auto opted = shared_memory_opted().find(reinterpret_cast<const void *>(kernel));
  if (opted != shared_memory_opted().end()) most = opted->second;
  if (config->dynamicSmemBytes > most) {
    deltaops::emulation::set_error("%zu bytes of dynamic shared memory, and the kernel may use %zu",
                                   config->dynamicSmemBytes, most);
    return cudaErrorInvalidValue;
  }
  unsigned cluster = 1; /* along x alone */
  bool all = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute &attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) all = attribute.val.cooperative != 0;
  }
  const bool ran =
      deltaops::emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                    cluster, all, [=] { kernel(Parameters(arguments)...); });
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

#endif
