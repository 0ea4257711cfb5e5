// xla_module.h: what the files of deltaops._xla share. Each op family adds its handlers.

#ifndef DELTAOPS_BINDINGS_XLA_MODULE_H
#define DELTAOPS_BINDINGS_XLA_MODULE_H

#include <vector>

namespace deltaops_bindings {

struct Target {
  const char *name;
  void *handler;  // of XLA's FFI
};
using Targets = std::vector<Target>;

void add_delta_linear(Targets *targets);
void add_adapters(Targets *targets);
void add_attention(Targets *targets);

}  // namespace deltaops_bindings

#endif
