// dlpack.h: the parts of DLPack's C ABI that are used here, as its specification lays them out.

#ifndef DELTAOPS_BINDINGS_DLPACK_H
#define DELTAOPS_BINDINGS_DLPACK_H

#include <cstdint>

namespace deltaops_bindings {

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

// Of DLPack 0.x: what a capsule "dltensor" holds.
struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};

// Since DLPack 1.3: the table that the capsule `__dlpack_c_exchange_api__` of a tensor's type
// holds.
struct DLPackExchangeHeader {
  uint32_t major, minor;
  const DLPackExchangeHeader *previous;  // an older table, or null
};
struct DLPackExchange {
  DLPackExchangeHeader header;
  void *allocate, *managed_from_object, *managed_to_object;
  // Fills `out`, whose pointers are the tensor's own; -1 and a Python exception where it cannot.
  int (*view)(void *object, DLTensor *out);  // null where the framework has none
  void *current_stream;
};
constexpr const char *kExchangeName = "dlpack_exchange_api";

}  // namespace deltaops_bindings

#endif
