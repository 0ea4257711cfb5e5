/* hopper_faults.cu: Hopper kernels with one mistake each, and their right twins; and the schedule.
 *
 *     fault    multiplies [64, 128] by [128, 128] transposed in one warpgroup; the copy engine
 * brings the tiles in two rounds of one stage store    writes a matrix [64, 128] by the copy
 * engine, from one box that is filled twice cluster  copies [384, 64] by two blocks, which share
 * what they read flag     one block makes what the other one reads
 */
#include "core.h"
#include "hopper/schedule.h"
#include "hopper/tensor_map.h"
#include "primitives/cluster.h"
#include "primitives/flag.h"
#include "primitives/tensor_store.h"
#include "primitives/warpgroup.h"
#include "primitives/wgmma.h"

namespace deltaops::hopper {
namespace {

constexpr uint32_t kLeftBytes = 64 * kSwizzleRow, kRightBytes = 128 * kSwizzleRow;
constexpr uint32_t kBytes = kLeftBytes + kRightBytes;
constexpr int kColumns = 128;

enum Fault : int32_t {
  kNone,
  kNoWaitForBytes,    /* reads a stage before it is full */
  kRefilledEarly,     /* fills it again while products read it */
  kReadWhileRunning,  /* reads accumulators of products that run */
  kNoFence,           /* products follow a change of their accumulators */
  kNoInit,            /* an mbarrier that nobody initialised */
  kNotVisible,        /* that the copy engine may not see yet */
  kTooFewBytes,       /* announces fewer bytes than arrive */
  kTooManyBytes,      /* more, and waits for ever */
  kArrivesTwice,      /* more arrivals than were promised */
  kDescriptorsDiffer, /* among the threads of a warpgroup */
  kTileOffItsPlace,   /* amid the 1024 bytes that the swizzle permutes */
  kBaseOffset,        /* a descriptor with more in it than addresses */
  kWrongStride,       /* a descriptor that skips rows of eight */
  kLanesApart,        /* lanes of a warp at different instructions */
};

struct FaultArguments {
  TensorMap left, right;
  float *out; /* [64, 128] */
  Fault fault;
};

/* out = left right^T */
__global__ void fault_kernel(const __grid_constant__ FaultArguments arguments) {
  const Fault fault = arguments.fault;
  unsigned char *left = dynamic_shared(), *right = left + kLeftBytes;
  auto *full = reinterpret_cast<uint64_t *>(left + kBytes);
  const auto fill = [&](int32_t k) {
    const uint32_t off = fault == kTooFewBytes ? -128 : fault == kTooManyBytes ? 128 : 0;
    mbarrier_arrive_expecting(full, kBytes + off);
    if (fault == kArrivesTwice) mbarrier_arrive(full);
    tensor_copy(left, &arguments.left, 0, k, full);
    tensor_copy(right, &arguments.right, 0, k, full);
  };
  if (threadIdx.x == 0) {
    if (fault != kNoInit) mbarrier_init(full, 1);
    if (fault != kNotVisible) mbarrier_init_done();
    fill(0);
  }
  __syncthreads();
  if (fault != kNoWaitForBytes || threadIdx.x >= 64) mbarrier_wait(full, 0);
  float acc[kColumns / 2];
  uint64_t of_left = wgmma_tile<Major::kInner>(shared_address(left), 0);
  if (fault == kDescriptorsDiffer && threadIdx.x == 3) of_left += 2;
  if (fault == kTileOffItsPlace) of_left += kSwizzleRow >> 4;
  if (fault == kBaseOffset) of_left += uint64_t{1} << 49;
  if (fault == kWrongStride) of_left += uint64_t{1} << 32;
  const uint64_t of_right = wgmma_tile<Major::kInner>(shared_address(right), 0);
  const auto multiply = [&](bool more) {
    for (int step = 0; step < 4; ++step)
      wgmma<__nv_bfloat16, kColumns, Major::kInner>(acc, of_left + 2 * step, of_right + 2 * step,
                                                    more || step > 0);
    wgmma_commit();
  };
  if (fault == kLanesApart && threadIdx.x % 32 == 5)
    wgmma_wait<0>();
  else
    wgmma_fence();
  multiply(false);
  if (fault != kRefilledEarly) wgmma_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) fill(64);
  if (fault != kNoWaitForBytes || threadIdx.x >= 64) mbarrier_wait(full, 1);
  if (fault != kNoFence) wgmma_fence();
  multiply(true);
  if (fault != kReadWhileRunning) wgmma_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int i = 0; i < kColumns / 2; ++i)
    arguments.out[(row + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] =
        acc[i];
}

enum StoreFault : int32_t {
  kRight,
  kNoProxyFence,       /* the engine may not see what was written */
  kStoredTooEarly,     /* before all threads have written */
  kOverwritten,        /* filled again before the engine has read it */
  kNoWaitForTheReader, /* by threads that do not ask the one who waited */
  kNotCommitted,       /* a store of no group: nobody can wait for it */
  kEndsEarly,          /* leaves shared memory to another block while the engine reads it */
  kWrongPiece,         /* written as if the engine did not permute */
  kBoxOffItsPlace,     /* amid the 1024 bytes that the swizzle permutes */
};

struct StoreArguments {
  TensorMap out;
  const uint32_t *from; /* [64, 64] pairs */
  StoreFault fault;
};

/* out = from */
__global__ void store_kernel(const __grid_constant__ StoreArguments arguments) {
  const StoreFault fault = arguments.fault;
  unsigned char *box = dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, first = thread / 32 * 16;
  for (int round = 0; round < 2; ++round) {
    if (thread == 0 && fault != kOverwritten) tensor_store_wait<0>();
    if (fault != kNoWaitForTheReader) warpgroup_sync(0);
    for (int piece = 0; piece < 8; piece += 2) {
      uint32_t words[4];
      for (int i = 0; i < 4; ++i)
        words[i] = arguments.from[(first + lane / 4 + i % 2 * 8) * 64 + round * 32 +
                                  (piece + i / 2) * 4 + lane % 4];
      const int at = piece + lane / 16;
      store_matrix(box + (first + lane % 16) * kSwizzleRow +
                       (fault == kWrongPiece ? at : at ^ lane % 8) * 16,
                   words);
    }
    if (fault != kNoProxyFence || thread != 77) tensor_store_fence();
    if (fault != kStoredTooEarly) warpgroup_sync(0);
    if (thread == 0) {
      tensor_store(&arguments.out, 0, 64 * round, box + (fault == kBoxOffItsPlace ? 128 : 0));
      if (fault != kNotCommitted || round == 0) tensor_store_commit();
    }
  }
  if (thread == 0 && fault != kEndsEarly) tensor_store_wait<0>();
}

enum ClusterFault : int32_t {
  kFine,
  kRefilledForOthers, /* when this block has read a tile, and the other has not */
  kHalfExpected,      /* announces only the bytes that this block itself asks for */
  kNoStart,           /* reaches into a block that is not ready */
  kNoEnd,             /* and into one that has ended */
};

constexpr int kRounds = 3;
constexpr uint32_t kHalfBytes = 64 * kSwizzleRow;

struct ClusterArguments {
  TensorMap from; /* [kRounds * 128, 64] */
  uint16_t *out;  /* [2, kRounds * 128, 64] */
  ClusterFault fault;
};

/* Both blocks copy `from`, each having brought half of it to both. */
__global__ void cluster_kernel(const __grid_constant__ ClusterArguments arguments) {
  const ClusterFault fault = arguments.fault;
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + 2 * kHalfBytes), *empty = full + 1;
  const int thread = threadIdx.x, lane = thread % 32, rank = cluster_rank();
  if (thread == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, fault == kRefilledForOthers ? 4 : 8);
    mbarrier_init_done();
  }
  if (fault == kNoStart)
    __syncthreads();
  else
    cluster_sync();
  for (int round = 0; round < kRounds; ++round) {
    if (thread == 0) {
      mbarrier_wait(empty, round % 2 ^ 1);
      mbarrier_arrive_expecting(full, fault == kHalfExpected ? kHalfBytes : 2 * kHalfBytes);
      tensor_copy_to_all(tile + rank * kHalfBytes, &arguments.from, 128 * round + 64 * rank, 0,
                         full);
    }
    mbarrier_wait(full, round % 2);
    const int row = (rank * kRounds + round) * 128 + thread;
    for (int piece = 0; piece < 8; ++piece)
      memcpy(arguments.out + row * 64 + piece * 8,
             tile + thread * kSwizzleRow + (piece ^ thread % 8) * 16, 16);
    __syncwarp();
    if (lane < (fault == kRefilledForOthers ? 1 : 2))
      mbarrier_arrive_at(empty, fault == kRefilledForOthers ? rank : lane);
  }
  if (fault != kNoEnd) cluster_sync();
}

enum FlagFault : int32_t {
  kFlagged,
  kNoPublishFence, /* the engine may not see what one thread wrote */
  kSetTooEarly,    /* before all threads have written */
  kNoWait,         /* reads what is not there yet */
  kNeverSet,       /* and waits for ever */
};

struct FlagArguments {
  TensorMap middle; /* [128, 64] */
  const uint16_t *from;
  uint16_t *to; /* where `middle` lies */
  uint32_t *flag;
  uint16_t *out;
  FlagFault fault;
};

/* Block 0 copies `from` to `middle`, and block 1 that to `out`, by the engine. */
__global__ void flag_kernel(const __grid_constant__ FlagArguments arguments) {
  const FlagFault fault = arguments.fault;
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + 128 * kSwizzleRow);
  const int thread = threadIdx.x;
  if (blockIdx.x == 0) {
    for (int i = 0; i < 64; ++i)
      publish(arguments.to + thread * 64 + i, arguments.from[thread * 64 + i]);
    if (fault != kNoPublishFence || thread != 77) publish_fence();
    if (fault != kSetTooEarly) __syncthreads();
    if (thread == 0 && fault != kNeverSet) flag_set(arguments.flag);
    return;
  }
  if (thread == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_done();
    if (fault != kNoWait) flag_wait(arguments.flag);
    mbarrier_arrive_expecting(full, 128 * kSwizzleRow);
    tensor_copy(tile, &arguments.middle, 0, 0, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int piece = 0; piece < 8; ++piece)
    memcpy(arguments.out + thread * 64 + piece * 8,
           tile + thread * kSwizzleRow + (piece ^ thread % 8) * 16, 16);
}

}  // namespace
}  // namespace deltaops::hopper

using namespace deltaops;
using namespace deltaops::hopper;

extern "C" {

/* out [64, 128] = left [64, 128] right [128, 128]^T of bf16, with fault `which`. */
DELTAOPS_API deltaops_status deltaops_test_hopper_fault(int32_t which, const deltaops_matrix *left,
                                                        const deltaops_matrix *right, float *out) {
  FaultArguments arguments = {};
  const MapMaker maps;
  if (maps.make(&arguments.left, *left, 64) != DELTAOPS_OK ||
      maps.make(&arguments.right, *right, 128) != DELTAOPS_OK)
    return DELTAOPS_UNSUPPORTED;
  arguments.out = out;
  arguments.fault = static_cast<Fault>(which);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = kBytes + sizeof(uint64_t);
  return cuda_check(cudaLaunchKernelEx(&config, fault_kernel, arguments), "running a fault");
}

/* out [64, 128] = from, of bf16, with fault `which`. */
DELTAOPS_API deltaops_status deltaops_test_hopper_store(int32_t which, const deltaops_matrix *from,
                                                        const deltaops_matrix *out) {
  StoreArguments arguments = {};
  const MapMaker maps;
  if (maps.make(&arguments.out, *out, 64) != DELTAOPS_OK) return DELTAOPS_UNSUPPORTED;
  arguments.from = static_cast<const uint32_t *>(from->data);
  arguments.fault = static_cast<StoreFault>(which);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 64 * kSwizzleRow + kSwizzleAtom;
  return cuda_check(cudaLaunchKernelEx(&config, store_kernel, arguments), "running a fault");
}

/* out [2, 384, 64] = from [384, 64] twice, of bf16, by two blocks with fault `which`. */
DELTAOPS_API deltaops_status deltaops_test_hopper_cluster(int32_t which,
                                                          const deltaops_matrix *from,
                                                          uint16_t *out) {
  ClusterArguments arguments = {};
  const MapMaker maps;
  if (maps.make(&arguments.from, *from, 64) != DELTAOPS_OK) return DELTAOPS_UNSUPPORTED;
  arguments.out = out;
  arguments.fault = static_cast<ClusterFault>(which);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 2 * kHalfBytes + 2 * sizeof(uint64_t);
  config.attrs = &together;
  config.numAttrs = 1;
  return cuda_check(cudaLaunchKernelEx(&config, cluster_kernel, arguments), "running a fault");
}

/* out = middle = from [128, 64] of bf16, by two blocks with fault `which`. */
DELTAOPS_API deltaops_status deltaops_test_hopper_flag(int32_t which, const deltaops_matrix *from,
                                                       const deltaops_matrix *middle,
                                                       uint32_t *flag, uint16_t *out) {
  FlagArguments arguments = {};
  const MapMaker maps;
  if (maps.make(&arguments.middle, *middle, 128) != DELTAOPS_OK) return DELTAOPS_UNSUPPORTED;
  arguments.from = static_cast<const uint16_t *>(from->data);
  arguments.to = static_cast<uint16_t *>(middle->data);
  arguments.flag = flag;
  arguments.out = out;
  arguments.fault = static_cast<FlagFault>(which);
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 128 * kSwizzleRow + sizeof(uint64_t);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cuda_check(cudaLaunchKernelEx(&config, flag_kernel, arguments), "running a fault");
}

/* Writes output, row and column of each tile in the order of their numbers; returns their number,
 * and writes nothing where `found` is NULL. `band`: 0 for the usual one. */
DELTAOPS_API int64_t deltaops_test_schedule(int32_t rows, int32_t band, int32_t outputs,
                                            const int32_t *columns, int32_t *found) {
  Schedule schedule = {};
  schedule.rows = rows;
  if (band > 0) schedule.band = band;
  schedule.outputs = outputs;
  for (int32_t i = 0; i < outputs; ++i) schedule.columns[i] = columns[i];
  const int64_t tiles = schedule.tiles();
  for (int64_t number = 0; found != nullptr && number < tiles; ++number) {
    const Tile tile = schedule.at(number);
    found[3 * number] = tile.output;
    found[3 * number + 1] = tile.row;
    found[3 * number + 2] = tile.column;
  }
  return tiles;
}
}
