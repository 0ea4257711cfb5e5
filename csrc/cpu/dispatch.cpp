// dispatch.cpp: the C ABI. Picks the instruction set once, checks, and calls its table.

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core.h"

namespace deltaops {
namespace {

constexpr size_t kSentence = 1024;
thread_local char sentence[kSentence];

struct Isa {
  const Kernels *kernels;
  bool runs;
};

#if defined(__x86_64__)
// Slowest first. Each asks for every extension its file is compiled with (flags.json).
const Isa *isas() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(DELTAOPS_EMULATED)
  // A test build: the 64-byte bodies were compiled for AVX2 ("emulated" in flags.json).
  const bool avx512 = avx2, avx512_bf16 = avx2;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      avx2;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const Isa list[] = {{&kernels_baseline, true},
                             {&kernels_avx2, avx2},
                             {&kernels_avx512, avx512},
                             {&kernels_avx512_bf16, avx512_bf16}};
  return list;
}
constexpr int32_t kIsaCount = 4;
#else
const Isa *isas() {
  static const Isa list[] = {{&kernels_portable, true}};
  return list;
}
constexpr int32_t kIsaCount = 1;
#endif

const Isa *find(const char *name) {
  for (int32_t i = 0; i < kIsaCount; ++i)
    if (std::strcmp(isas()[i].kernels->name, name) == 0) return &isas()[i];
  return nullptr;
}

// "baseline, avx2": what this CPU runs, for error sentences.
const char *names_that_run() {
  thread_local char names[128];
  size_t used = 0;
  names[0] = 0;
  for (int32_t i = 0; i < kIsaCount; ++i)
    if (isas()[i].runs)
      used += static_cast<size_t>(std::snprintf(names + used, sizeof names - used, "%s%s",
                                                used ? ", " : "", isas()[i].kernels->name));
  return names;
}

deltaops_status select(const char *name, const char *asked_by, const Kernels **out) {
  const Isa *isa = name ? find(name) : nullptr;
  if (isa == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "%s: the instruction set must be one that is compiled in, got '%s'. This CPU "
                "runs: %s.",
                asked_by, name ? name : "(null)", names_that_run());
  if (!isa->runs)
    return fail(DELTAOPS_UNSUPPORTED,
                "%s: the instruction set must be one that this CPU runs, got '%s'. Choose one of: "
                "%s.",
                asked_by, name, names_that_run());
  *out = isa->kernels;
  return DELTAOPS_OK;
}

const Kernels *best() {
  const Kernels *kernels = nullptr;
  for (int32_t i = 0; i < kIsaCount; ++i)
    if (isas()[i].runs) kernels = isas()[i].kernels;
  return kernels;
}

// Set by deltaops_cpu_set_isa; NULL: the choice made at load stands.
std::atomic<const Kernels *> chosen{nullptr};

// The table in use, or a status that says why the environment's request cannot be met. The
// environment is read once; its error is given again on each call, since a silent second choice
// would measure and test something else than was asked for.
deltaops_status current(const Kernels **out) {
  if (const Kernels *set = chosen.load(std::memory_order_acquire)) {
    *out = set;
    return DELTAOPS_OK;
  }
  static const char *const wanted = std::getenv("DELTAOPS_CPU_ISA");
  if (wanted == nullptr || wanted[0] == 0) {
    static const Kernels *const fastest = best();
    *out = fastest;
    return DELTAOPS_OK;
  }
  return select(wanted, "DELTAOPS_CPU_ISA", out);
}

}  // namespace

deltaops_status fail(deltaops_status status, const char *format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(sentence, kSentence, format, list);
  va_end(list);
  return status;
}

}  // namespace deltaops

using namespace deltaops;

extern "C" {

uint32_t deltaops_abi_version(void) { return DELTAOPS_ABI_VERSION; }

const char *deltaops_last_error(void) { return sentence; }

const char *deltaops_cpu_isa(void) {
  const Kernels *kernels = nullptr;
  return current(&kernels) == DELTAOPS_OK ? kernels->name : nullptr;
}

int32_t deltaops_cpu_isa_count(void) { return kIsaCount; }

const char *deltaops_cpu_isa_name(int32_t i) {
  return i >= 0 && i < kIsaCount ? isas()[i].kernels->name : nullptr;
}

int32_t deltaops_cpu_isa_runs(const char *name) {
  const Isa *isa = name ? find(name) : nullptr;
  return isa != nullptr && isa->runs;
}

deltaops_status deltaops_cpu_set_isa(const char *name) {
  const Kernels *kernels = nullptr;
  const deltaops_status status = select(name, "deltaops_cpu_set_isa", &kernels);
  if (status == DELTAOPS_OK) chosen.store(kernels, std::memory_order_release);
  return status;
}

deltaops_status deltaops_cpu_delta_linear_forward(const deltaops_delta_linear_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->delta_linear_forward(*args) : status;
}

deltaops_status deltaops_cpu_delta_linear_backward(
    const deltaops_delta_linear_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->delta_linear_backward(*args) : status;
}

deltaops_status deltaops_cpu_dropout_mask(uint8_t *keep, int64_t M, int64_t K, uint64_t seed,
                                          uint32_t stream, uint32_t drop_threshold) {
  const Kernels *kernels = nullptr;
  const deltaops_status status = current(&kernels);
  if (status != DELTAOPS_OK) return status;
  if (M < 0 || K < 0)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: M and K must not be negative, got M=%lld, K=%lld.",
                static_cast<long long>(M), static_cast<long long>(K));
  if (drop_threshold > 65536)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: drop_threshold must be 0 to 65536 (p * 65536), got %u.",
                drop_threshold);
  if (keep == nullptr && M > 0 && K > 0)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: keep must point to M * K bytes, got NULL for M=%lld, K=%lld.",
                static_cast<long long>(M), static_cast<long long>(K));
  kernels->dropout_mask(keep, M, K, seed, stream, drop_threshold);
  return DELTAOPS_OK;
}

deltaops_status deltaops_cpu_bottleneck_forward(const deltaops_bottleneck_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->bottleneck_forward(*args) : status;
}

deltaops_status deltaops_cpu_bottleneck_backward(const deltaops_bottleneck_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->bottleneck_backward(*args) : status;
}

deltaops_status deltaops_cpu_norm_bias_forward(const deltaops_norm_bias_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->norm_bias_forward(*args) : status;
}

deltaops_status deltaops_cpu_norm_bias_backward(const deltaops_norm_bias_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->norm_bias_backward(*args) : status;
}

}  // extern "C"
