/* cuda_runtime_api.h for C programs on the emulated grid: its memory is the host's. */
#ifndef DELTAOPS_EMULATED_CUDA_RUNTIME_API_H
#define DELTAOPS_EMULATED_CUDA_RUNTIME_API_H

#include <stdlib.h>
#include <string.h>

typedef enum { cudaSuccess, cudaErrorMemoryAllocation } cudaError_t;
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

static inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "no memory";
}
static inline cudaError_t cudaSetDevice(int device) {
  (void)device;
  return cudaSuccess;
}
static inline cudaError_t cudaMalloc(void **data, size_t bytes) {
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}
static inline cudaError_t cudaFree(void *data) { return free(data), cudaSuccess; }
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  (void)kind;
  return memcpy(to, from, bytes), cudaSuccess;
}
static inline cudaError_t cudaMemset(void *data, int value, size_t bytes) {
  return memset(data, value, bytes), cudaSuccess;
}
static inline cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

#endif
