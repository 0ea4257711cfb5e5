// xla_module.h: what the files of deltaops._xla share. Each op family adds its handlers.

#ifndef DELTAOPS_BINDINGS_XLA_MODULE_H
#define DELTAOPS_BINDINGS_XLA_MODULE_H

#include "xla_handlers.h"

namespace deltaops_bindings {

void add_delta_linear(Targets *targets);
void add_adapters(Targets *targets);
void add_elementwise(Targets *targets);
void add_heads(Targets *targets);

}  // namespace deltaops_bindings

#endif
