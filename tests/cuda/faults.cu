/* faults.cu: kernels with one mistake each, and their right twins, for the emulator to tell apart.
 */
#include "core.h"
#include "deltaops_cuda.h"
#include "primitives/copy_async.h"
#include "primitives/matrix.h"

namespace deltaops {
namespace {

struct Fault {
  const float *in;
  float *out;
  bool wrong;
};

/* out[i] = in[127 - i] through shared memory. */
__global__ void no_barrier(Fault f) {
  auto *tile = reinterpret_cast<float *>(dynamic_shared());
  tile[threadIdx.x] = f.in[threadIdx.x];
  if (!f.wrong) __syncthreads();
  f.out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void no_wait(Fault f) {
  auto *tile = reinterpret_cast<float *>(dynamic_shared());
  if (threadIdx.x < 32) copy_async_16(tile + 4 * threadIdx.x, f.in + 4 * threadIdx.x, 16);
  copy_async_commit();
  if (!f.wrong) copy_async_wait<0>();
  __syncthreads();
  f.out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

/* Fills the tile a second time, which slow threads still read where the barrier is missing. */
__global__ void refilled_early(Fault f) {
  auto *tile = reinterpret_cast<float *>(dynamic_shared());
  if (threadIdx.x < 32) copy_async_16(tile + 4 * threadIdx.x, f.in + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  f.out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
  if (!f.wrong) __syncthreads();
  if (threadIdx.x < 32) copy_async_16(tile + 4 * threadIdx.x, f.in, 16);
  copy_async_commit();
  copy_async_wait<0>();
}

__global__ void half_at_the_barrier(Fault f) {
  if (!f.wrong || threadIdx.x < 64) __syncthreads();
  f.out[threadIdx.x] = f.in[blockDim.x - 1 - threadIdx.x];
}

__global__ void lanes_apart(Fault f) {
  uint32_t matrix[4];
  if (f.wrong && threadIdx.x % 32 == 3)
    __syncwarp();
  else
    load_matrix<false>(matrix, dynamic_shared());
  f.out[threadIdx.x] = f.in[blockDim.x - 1 - threadIdx.x];
}

__global__ void beyond_shared(Fault f) {
  auto *tile = reinterpret_cast<float *>(dynamic_shared());
  if (f.wrong && threadIdx.x == 0) tile[128] = 1.0f;
  f.out[threadIdx.x] = f.in[blockDim.x - 1 - threadIdx.x];
}

__global__ void beyond_global(Fault f) {
  if (threadIdx.x == 0) copy_async_16(dynamic_shared(), f.in + (f.wrong ? 128 : 124), 16);
  f.out[threadIdx.x] = f.in[blockDim.x - 1 - threadIdx.x];
}

__global__ void unaligned(Fault f) {
  if (threadIdx.x == 0) copy_async_16(dynamic_shared(), f.in + (f.wrong ? 1 : 4), 16);
  f.out[threadIdx.x] = f.in[blockDim.x - 1 - threadIdx.x];
}

constexpr void (*kFaults[])(Fault) = {no_barrier,          no_wait,     refilled_early,
                                      half_at_the_barrier, lanes_apart, beyond_shared,
                                      beyond_global,       unaligned};

}  // namespace
}  // namespace deltaops

using namespace deltaops;

/* Runs fault `which` on 128 threads with in and out [128]; out should be in from its end. */
extern "C" DELTAOPS_API deltaops_status deltaops_test_fault(int32_t which, int32_t wrong,
                                                            const float *in, float *out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 512;
  return cuda_check(cudaLaunchKernelEx(&config, kFaults[which], Fault{in, out, wrong != 0}),
                    "running a fault");
}
