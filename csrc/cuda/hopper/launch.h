/* launch.h: starts a Hopper product of one element type; included by one file for each. */
#ifndef DELTAOPS_CUDA_HOPPER_LAUNCH_H
#define DELTAOPS_CUDA_HOPPER_LAUNCH_H

#include "hopper/project.h"

namespace deltaops::hopper {

template <class G>
deltaops_status launch_one(void (*kernel)(GemmArguments), const GemmArguments &arguments,
                           int32_t cluster, int32_t multiprocessors, void *stream) {
  const deltaops_status status =
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(G::kSharedBytes)),
                 "asking for the shared memory of a Hopper product");
  if (status != DELTAOPS_OK) return status;
  const int32_t aside = arguments.sides.blocks;
  const int64_t tiles = arguments.schedule.tiles(), most = (multiprocessors - aside) / cluster;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (G::kSides) { /* blocks wait for others: all must run */
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  config.gridDim = dim3(static_cast<unsigned>(aside + (tiles < most ? tiles : most) * cluster));
  config.blockDim = dim3(G::kThreads);
  config.dynamicSmemBytes = G::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), "launching a Hopper product");
}

template <typename T>
deltaops_status launch_hopper(const GemmArguments &arguments, Shape shape, int32_t multiprocessors,
                              void *stream) {
  const auto launch = [&](auto g, void (*kernel)(GemmArguments)) {
    return launch_one<decltype(g)>(kernel, arguments, shape.cluster, multiprocessors, stream);
  };
  using Sided = Gemm<T, 256, Major::kInner, true>;
  if (arguments.sides.blocks > 0) return launch(Sided{}, project_gemm_kernel<Sided>);
  const auto plain = [&](auto g) { return launch(g, gemm_kernel<decltype(g)>); };
  if (shape.outer)
    return shape.wide ? plain(Gemm<T, 256, Major::kOuter>{}) : plain(Gemm<T, 128, Major::kOuter>{});
  return shape.wide ? plain(Gemm<T, 256, Major::kInner>{}) : plain(Gemm<T, 128, Major::kInner>{});
}

}  // namespace deltaops::hopper

#endif
