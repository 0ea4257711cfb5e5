/* launch.h: starts a Hopper product of one element type; included by one file for each. */
#ifndef DELTAOPS_CUDA_HOPPER_LAUNCH_H
#define DELTAOPS_CUDA_HOPPER_LAUNCH_H

#include "hopper/gemm.h"

namespace deltaops::hopper {

template <class G>
deltaops_status launch_one(const GemmArguments &arguments, int32_t cluster, int32_t multiprocessors,
                           void *stream) {
  auto *kernel = gemm_kernel<G>;
  const deltaops_status status =
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(G::kSharedBytes)),
                 "asking for the shared memory of a Hopper product");
  if (status != DELTAOPS_OK) return status;
  const int64_t tiles = arguments.schedule.tiles(), most = multiprocessors / cluster;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.attrs = &together;
  config.numAttrs = cluster > 1;
  config.gridDim = dim3(static_cast<unsigned>((tiles < most ? tiles : most) * cluster));
  config.blockDim = dim3(G::kThreads);
  config.dynamicSmemBytes = G::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), "launching a Hopper product");
}

template <typename T>
deltaops_status launch_hopper(const GemmArguments &arguments, Shape shape, int32_t multiprocessors,
                              void *stream) {
  if (shape.outer)
    return shape.wide ? launch_one<Gemm<T, 256, Major::kOuter>>(arguments, shape.cluster,
                                                                multiprocessors, stream)
                      : launch_one<Gemm<T, 128, Major::kOuter>>(arguments, shape.cluster,
                                                                multiprocessors, stream);
  return shape.wide ? launch_one<Gemm<T, 256, Major::kInner>>(arguments, shape.cluster,
                                                              multiprocessors, stream)
                    : launch_one<Gemm<T, 128, Major::kInner>>(arguments, shape.cluster,
                                                              multiprocessors, stream);
}

}  // namespace deltaops::hopper

#endif
