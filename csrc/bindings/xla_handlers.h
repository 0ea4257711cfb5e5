// xla_handlers.h: functions as handlers of XLA's FFI.
//
//     add<forward>(targets, "gated_forward", "activation", "num_threads");
//
// The types of a handler's attributes are read off the function; their names come in its order.

#ifndef DELTAOPS_BINDINGS_XLA_HANDLERS_H
#define DELTAOPS_BINDINGS_XLA_HANDLERS_H

#include <array>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace deltaops_bindings {

namespace ffi = xla::ffi;

using Numbers = ffi::Span<const int32_t>;
using Scales = ffi::Span<const float>;

struct Target {
  const char *name;
  void *handler;  // of XLA's FFI
};
using Targets = std::vector<Target>;

// The binding with an attribute of each type, by these names. Bindings are never named: they do not
// move.
template <class First, class... Rest, class Binding>
auto with_attributes(Binding &&binding, const char *const *names) {
  if constexpr (sizeof...(Rest) == 0)
    return std::move(binding).template Attr<First>(*names);
  else
    return with_attributes<Rest...>(std::move(binding).template Attr<First>(*names), names + 1);
}

// What XLA calls of a function: its containers may throw where memory ends, and XLA's frames have
// no way to pass an exception on.
template <auto function>
struct Handler;
template <class... Attributes,
          ffi::Error (*function)(ffi::RemainingArgs, ffi::RemainingRets, Attributes...)>
struct Handler<function> {
  static inline std::array<const char *, sizeof...(Attributes)> names = {};

  static ffi::Error run(ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes... given) {
    try {
      return function(args, rets, given...);
    } catch (const std::exception &error) {
      return {ffi::ErrorCode::kResourceExhausted, error.what()};
    }
  }

  static XLA_FFI_Error *call(XLA_FFI_CallFrame *frame) {
    static auto *handler = with_attributes<Attributes...>(
                               ffi::Ffi::Bind().RemainingArgs().RemainingRets(), names.data())
                               .To(run)
                               .release();
    return handler->Call(frame);
  }
};

template <auto function, class... Names>
void add(Targets *targets, const char *name, Names... attributes) {
  static_assert(sizeof...(Names) == Handler<function>::names.size(), "a name for each attribute");
  Handler<function>::names = {attributes...};
  targets->push_back({name, reinterpret_cast<void *>(&Handler<function>::call)});
}

}  // namespace deltaops_bindings

#endif
