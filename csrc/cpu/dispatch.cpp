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

// FNV-1a over the shape and up to kProbes elements, one in each stretch of the weight and each time
// a little further into it, so that they do not all lie in one column.
uint64_t fingerprint(const deltaops_matrix &weight) {
  constexpr int64_t kProbes = 32;
  uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&hash](uint64_t value) { hash = (hash ^ value) * 0x100000001b3; };
  mix(static_cast<uint64_t>(weight.rows));
  mix(static_cast<uint64_t>(weight.cols));
  const int64_t count = weight.rows * weight.cols;
  const int64_t probes = count < kProbes ? count : kProbes;
  for (int64_t i = 0; i < probes; ++i) {
    const int64_t at = count / probes * i + i % (count / probes);
    const int64_t offset =
        at / weight.cols * weight.row_stride + at % weight.cols * weight.col_stride;
    if (weight.dtype == DELTAOPS_BF16) {
      mix(static_cast<const uint16_t *>(weight.data)[offset]);
    } else {
      uint32_t bits;
      std::memcpy(&bits, static_cast<const float *>(weight.data) + offset, sizeof bits);
      mix(bits);
    }
  }
  return hash;
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
  if (status == DELTAOPS_OK) status = check(args, *kernels);
  return status == DELTAOPS_OK ? kernels->delta_linear_forward(args, 1) : status;
}

deltaops_status deltaops_cpu_delta_linear_backward(
    const deltaops_delta_linear_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args, *kernels);
  return status == DELTAOPS_OK ? kernels->delta_linear_backward(args, 1) : status;
}

deltaops_status deltaops_cpu_delta_linear_group_forward(
    const deltaops_delta_linear_forward_args *layers, int32_t count) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check_group(layers, count, *kernels);
  return status == DELTAOPS_OK ? kernels->delta_linear_forward(layers, count) : status;
}

deltaops_status deltaops_cpu_delta_linear_group_backward(
    const deltaops_delta_linear_backward_args *layers, int32_t count) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check_group(layers, count, *kernels);
  return status == DELTAOPS_OK ? kernels->delta_linear_backward(layers, count) : status;
}

deltaops_status deltaops_cpu_packed_bytes(const deltaops_matrix *weight, int64_t *bytes) {
  const Kernels *kernels = nullptr;
  const deltaops_status status = current(&kernels);
  return status == DELTAOPS_OK ? check_packing(weight, *kernels, bytes) : status;
}

deltaops_status deltaops_cpu_pack_weight(const deltaops_matrix *weight, void *packed, int64_t bytes,
                                         int32_t num_threads) {
  const Kernels *kernels = nullptr;
  int64_t needed = 0;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check_packing(weight, *kernels, &needed);
  if (status != DELTAOPS_OK) return status;
  if (packed == nullptr || bytes != needed)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "pack_weight: packed must be the %lld bytes of deltaops_cpu_packed_bytes, got %s "
                "of %lld bytes.",
                static_cast<long long>(needed), packed ? "a buffer" : "NULL",
                static_cast<long long>(bytes));
  if (reinterpret_cast<uintptr_t>(packed) % alignof(float) != 0)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "pack_weight: packed must be aligned to %zu bytes, got the address %p. Allocate it "
                "as floats.",
                alignof(float), packed);
  if (num_threads < 1 || num_threads > kMaxThreads)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "pack_weight: num_threads must be 1 to %d, got %d. Pass the number of cores.",
                kMaxThreads, num_threads);
  kernels->pack_weight(*weight, packed, num_threads);
  return DELTAOPS_OK;
}

deltaops_status deltaops_cpu_fingerprint(const deltaops_matrix *weight, uint64_t *hash) {
  const Kernels *kernels = nullptr;
  int64_t bytes = 0;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check_packing(weight, *kernels, &bytes);
  if (status != DELTAOPS_OK) return status;
  if (hash == nullptr)
    return fail(DELTAOPS_INVALID_ARGUMENT, "fingerprint: hash must not be NULL.");
  *hash = fingerprint(*weight);
  return DELTAOPS_OK;
}

int64_t deltaops_cpu_fma_peak(int32_t dtype, int64_t steps, int32_t num_threads) {
  const Kernels *kernels = nullptr;
  if (current(&kernels) != DELTAOPS_OK) return -1;
  constexpr int64_t kMaxSteps = int64_t{1} << 40;  // an hour; the count of them all stays in int64
  if (dtype < DELTAOPS_F32 || dtype > DELTAOPS_BF16 || steps < 1 || steps > kMaxSteps ||
      num_threads < 1 || num_threads > kMaxThreads) {
    (void)fail(DELTAOPS_INVALID_ARGUMENT,
               "fma_peak: dtype must be 0 or 1, steps 1 to 2^40 and num_threads 1 to %d, got %d, "
               "%lld, %d. Ask for less.",
               kMaxThreads, dtype, static_cast<long long>(steps), num_threads);
    return -1;
  }
  return kernels->fma_peak(dtype, steps, num_threads);
}

deltaops_status deltaops_cpu_dropout_mask(uint8_t *keep, int64_t M, int64_t K, uint64_t seed,
                                          uint32_t stream, uint32_t drop_threshold) {
  const Kernels *kernels = nullptr;
  const deltaops_status status = current(&kernels);
  if (status != DELTAOPS_OK) return status;
  int64_t bytes = 0;
  if (M < 0 || K < 0 || __builtin_mul_overflow(M, K, &bytes))
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: M and K must be 0 or more and M * K below 2^63, got M=%lld, K=%lld.",
                static_cast<long long>(M), static_cast<long long>(K));
  if (drop_threshold > 65536)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: drop_threshold must be 0 to 65536 (p * 65536), got %u.",
                drop_threshold);
  if (keep == nullptr && M > 0 && K > 0)
    return fail(DELTAOPS_INVALID_ARGUMENT,
                "dropout_mask: keep must point to M * K bytes, got NULL for M=%lld, K=%lld.",
                static_cast<long long>(M), static_cast<long long>(K));
  if (bytes > 0) kernels->dropout_mask(keep, M, K, seed, stream, drop_threshold);
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

deltaops_status deltaops_cpu_cross_entropy_forward(
    const deltaops_cross_entropy_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->cross_entropy_forward(*args) : status;
}

deltaops_status deltaops_cpu_cross_entropy_backward(
    const deltaops_cross_entropy_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->cross_entropy_backward(*args) : status;
}

deltaops_status deltaops_cpu_gated_forward(const deltaops_gated_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->gated_forward(*args) : status;
}

deltaops_status deltaops_cpu_gated_backward(const deltaops_gated_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->gated_backward(*args) : status;
}

deltaops_status deltaops_cpu_rotary(const deltaops_rotary_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->rotary(*args) : status;
}

deltaops_status deltaops_cpu_attention_forward(const deltaops_attention_forward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->attention_forward(*args, nullptr) : status;
}

deltaops_status deltaops_cpu_attention_backward(const deltaops_attention_backward_args *args) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args);
  return status == DELTAOPS_OK ? kernels->attention_backward(*args, nullptr) : status;
}

deltaops_status deltaops_cpu_rotary_attention_forward(const deltaops_attention_forward_args *args,
                                                      const deltaops_rotary_tables *tables) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args, tables);
  return status == DELTAOPS_OK ? kernels->attention_forward(*args, tables) : status;
}

deltaops_status deltaops_cpu_rotary_attention_backward(const deltaops_attention_backward_args *args,
                                                       const deltaops_rotary_tables *tables) {
  const Kernels *kernels = nullptr;
  deltaops_status status = current(&kernels);
  if (status == DELTAOPS_OK) status = check(args, tables);
  return status == DELTAOPS_OK ? kernels->attention_backward(*args, tables) : status;
}

void deltaops_cpu_advise_huge_pages(void *data, int64_t bytes) {
  if (data != nullptr && bytes > 0) advise_huge_pages(data, static_cast<size_t>(bytes));
}

}  // extern "C"
