// cudaxla_module.h: functions of a GPU as handlers of XLA's FFI, under the names that xla_*.cpp
// give those of the CPU. XLA's stream and GPU come first:
//
//     ffi::Error forward(Gpu gpu, ffi::RemainingArgs args, ffi::RemainingRets rets, …attributes);

#ifndef DELTAOPS_BINDINGS_CUDAXLA_MODULE_H
#define DELTAOPS_BINDINGS_CUDAXLA_MODULE_H

#include "deltaops_cuda.h"
#include "xla_handlers.h"
#include "xla_views.h"

namespace deltaops_bindings {

struct Gpu {
  int32_t device;
  void *stream;  // cudaStream_t
};

template <auto function>
struct GpuHandler;
template <class... Attributes,
          ffi::Error (*function)(Gpu, ffi::RemainingArgs, ffi::RemainingRets, Attributes...)>
struct GpuHandler<function> {
  static inline std::array<const char *, sizeof...(Attributes)> names = {};

  static ffi::Error run(void *stream, int32_t device, ffi::RemainingArgs args,
                        ffi::RemainingRets rets, Attributes... given) {
    try {
      return function({device, stream}, args, rets, given...);
    } catch (const std::exception &error) {
      return {ffi::ErrorCode::kResourceExhausted, error.what()};
    }
  }

  static XLA_FFI_Error *call(XLA_FFI_CallFrame *frame) {
    static auto *handler = with_attributes<Attributes...>(ffi::Ffi::Bind()
                                                              .Ctx<ffi::PlatformStream<void *>>()
                                                              .Ctx<ffi::DeviceOrdinal>()
                                                              .RemainingArgs()
                                                              .RemainingRets(),
                                                          names.data())
                               .To(run)
                               .release();
    return handler->Call(frame);
  }
};

template <auto function, class... Names>
void add_on_gpu(Targets *targets, const char *name, Names... attributes) {
  static_assert(sizeof...(Names) == GpuHandler<function>::names.size(),
                "a name for each attribute");
  GpuHandler<function>::names = {attributes...};
  targets->push_back({name, reinterpret_cast<void *>(&GpuHandler<function>::call)});
}

// A seed that the kernel reads when it runs: two words.
inline const uint64_t *seed_on_gpu(const Item &item, const View &seed) {
  return static_cast<const uint64_t *>(item.pointer(seed));
}

inline void expect_seed(Buffers *buffers, const View &seed) {
  buffers->expect(!seed || (seed.width == 4 && seed.size(0) == 2),
                  "deltaops: seed must be two words, as jax.random.key_data gives.");
}

// Each op family of csrc/cuda adds its handlers.
void add_dropout(Targets *targets);
void add_products(Targets *targets);

}  // namespace deltaops_bindings

#endif
