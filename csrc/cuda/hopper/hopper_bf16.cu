/* hopper_bf16.cu: the Hopper products of bf16. Compiled for sm_90a alone. */
#include "hopper/launch.h"

namespace deltaops::hopper {

deltaops_status launch_hopper_bf16(const GemmArguments &arguments, Shape shape,
                                   int32_t multiprocessors, void *stream) {
  return launch_hopper<__nv_bfloat16>(arguments, shape, multiprocessors, stream);
}

}  // namespace deltaops::hopper
