/* arguments.h: what a launch of the Hopper products is told, and who launches them. */
#ifndef DELTAOPS_CUDA_HOPPER_ARGUMENTS_H
#define DELTAOPS_CUDA_HOPPER_ARGUMENTS_H

#include "core.h"
#include "hopper/schedule.h"
#include "primitives/tensor_copy.h"

namespace deltaops::hopper {

constexpr int kMaxSegments = DELTAOPS_CUDA_MAX_HOPPER;
static_assert(kMaxOutputs == DELTAOPS_CUDA_MAX_OUTPUTS, "the C ABI says the same");

/* Elements below `threshold` of 65536 are dropped, the others multiplied by `scale`. */
struct Mask {
  const uint64_t *seed;       /* on the device */
  uint32_t stream, threshold; /* 0: no mask */
  float scale;
};

struct Output {
  const void *bias; /* [columns] of the output's type; or NULL */
  int32_t columns;
  int32_t first_segment, segments; /* at least one */
  Mask mask;                       /* of the first segment */
};

/* S = scaling * x A^T, which some blocks make while others begin with the products (project.h). */
struct Sides {
  TensorMap a;  /* [ranks, K], boxes of `width` rows */
  float *s;     /* [rows, ranks]; or NULL */
  void *narrow; /* [rows, ranks] rounded to the element type: the left of the second segment */
  int64_t s_stride, narrow_stride;
  uint32_t *flags; /* of each row of tiles; 0 before the launch */
  int32_t rows, ranks;
  int32_t width;  /* 16, 32 or 64: ranks rounded up */
  int32_t blocks; /* that make it, whole clusters of them; 0: the launch makes no S */
  float scaling;
};

/* By value: the copy engine reads the maps from the kernel's parameters. */
struct GemmArguments {
  TensorMap left[kMaxSegments], right[kMaxSegments]; /* of each product that is summed */
  int32_t length[kMaxSegments];                      /* its contracted elements, at least one */
  TensorMap out[kMaxOutputs];                        /* [rows, columns] */
  Output output[kMaxOutputs];
  Schedule schedule; /* of clusters */
  Sides sides;
};

/* Which kernel: see Gemm in gemm.h. */
struct Shape {
  bool wide;       /* tiles of 256 columns, else of 128 */
  bool outer;      /* the right matrices have their columns side by side */
  int32_t cluster; /* blocks that share right tiles: 1 or 2 */
};

deltaops_status launch_hopper_bf16(const GemmArguments &arguments, Shape shape,
                                   int32_t multiprocessors, void *stream);
deltaops_status launch_hopper_f16(const GemmArguments &arguments, Shape shape,
                                  int32_t multiprocessors, void *stream);

}  // namespace deltaops::hopper

#endif
