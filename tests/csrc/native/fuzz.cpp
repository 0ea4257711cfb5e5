// fuzz.cpp: random arguments; every call ends in a status, and a refused call writes nothing.
//
// Three kinds of calls, from one deterministic stream of numbers:
//     valid     a random layer; OK and right
//     spoiled   the same with one to three fields made wrong, each enough by itself:
//     INVALID_ARGUMENT wild      every field drawn from values that tend to break things; any
//     status, and no pointer
//               claims more memory than is there (a lie that no check can see through)
// Compiled with DELTAOPS_LIBFUZZER and clang's -fsanitize=fuzzer, the bytes of an input replace the
// seed and the loop.

#include <algorithm>
#include <limits>

#include "layer.h"

namespace test {
namespace {

using Forward = deltaops_delta_linear_forward_args;
using Backward = deltaops_delta_linear_backward_args;

deltaops_status call(const Forward &args) { return deltaops_cpu_delta_linear_forward(&args); }
deltaops_status call(const Backward &args) { return deltaops_cpu_delta_linear_backward(&args); }

// The matrices that a call needs; both optional and unused ones stay out.
std::vector<deltaops_matrix *> required(Forward *args) {
  return {&args->x, &args->weight, &args->y};
}
std::vector<deltaops_matrix *> required(Backward *args) {
  return {&args->grad_y, &args->weight, &args->grad_x};
}

bool has_elements(const deltaops_matrix &m) { return m.rows > 0 && m.cols > 0; }

// Makes args wrong in the way numbered `way`; false where this layer offers no place for it.
template <class Args>
bool spoil(int way, Args *args, Layer *layer, Rng *rng) {
  const std::vector<deltaops_matrix *> all = required(args);
  deltaops_matrix *m = all[static_cast<size_t>(rng->below(static_cast<int64_t>(all.size())))];
  const int64_t sizes[] = {-1, -7, std::numeric_limits<int64_t>::min(),
                           std::numeric_limits<int64_t>::max(), (int64_t{1} << 40) + 1};
  const int64_t strides[] = {std::numeric_limits<int64_t>::max(),
                             std::numeric_limits<int64_t>::min(), int64_t{1} << 61,
                             -(int64_t{1} << 62)};
  const int32_t counts[] = {0, -1, 1025, std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
  const bool branched = !layer->branches.empty();
  switch (way) {
    case 0:
      args->struct_size = rng->one_in(2) ? 0 : static_cast<uint32_t>(sizeof *args) + 8;
      return true;
    case 1:
      args->num_threads = counts[rng->below(5)];
      return true;
    case 2:
      args->reserved = 1 + static_cast<int32_t>(rng->below(100));
      return true;
    case 3:
      m->reserved = -1;
      return true;
    case 4:
      m->dtype = rng->one_in(2) ? 2 : -1;
      return true;
    case 5:  // odd for both dtypes
      m->data = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(m->data) | 1);
      return true;
    case 6:
      (rng->one_in(2) ? m->rows : m->cols) = sizes[rng->below(5)];
      return true;
    case 7:
      (rng->one_in(2) ? m->row_stride : m->col_stride) = strides[rng->below(4)];
      return true;
    case 8:  // no output may be absent by accident, so inputs only
      m = all[static_cast<size_t>(rng->below(2))];
      if (!has_elements(*m)) return false;
      m->data = nullptr;
      return true;
    case 9:
      if (!branched) return false;
      args->branches = nullptr;
      return true;
    case 10:
      args->num_branches = rng->one_in(2) ? -1 : std::numeric_limits<int32_t>::max();
      return true;
    case 11:
      if (!branched) return false;
      layer->branches.back().drop_threshold = 65537 + static_cast<uint32_t>(rng->below(1 << 20));
      return true;
    case 12:
      if (!branched) return false;
      layer->branches.back().activation = rng->one_in(2) ? -1 : DELTAOPS_SILU + 1;
      return true;
    case 13: {
      if (!branched) return false;
      deltaops_branch &branch = layer->branches.back();
      (rng->one_in(2) ? branch.a.rows : branch.b.cols) = rng->one_in(2) ? 0 : -3;
      return true;
    }
    case 14:
      if (!branched) return false;
      layer->branches.front().a.dtype ^= 1;  // no longer that of b
      return true;
    case 15: {  // rows that overlap in an output
      deltaops_matrix *out = all[2];
      if (out->rows < 2 || out->cols < 1) return false;
      out->row_stride = out->cols - 1 - rng->below(2);
      return true;
    }
    case 16:  // a weight without a unit stride
      if (all[1]->rows < 2 || all[1]->cols < 2) return false;
      all[1]->row_stride = 2, all[1]->col_stride = 3;
      return true;
    case 17:
      if (!branched || !has_elements(layer->branches.back().b)) return false;
      layer->branches.back().b.data = nullptr;
      return true;
    default: {  // an odd address for the list itself
      if (!branched) return false;
      args->branches = reinterpret_cast<const deltaops_branch *>(
          reinterpret_cast<uintptr_t>(args->branches) | 1);
      return true;
    }
  }
}
constexpr int kWays = 19;

template <class Args>
void spoiled(Args args, Layer *layer, Rng *rng) {
  int made = 0, way = 0;
  std::string ways;
  // In rising order, so that no way meets what it made wrong itself and none is taken twice.
  for (int left = 1 + static_cast<int>(rng->below(3)); left > 0 && way < kWays; --left) {
    way += static_cast<int>(rng->below(kWays - way));
    if (spoil(way, &args, layer, rng)) {
      ++made;
      ways += " " + std::to_string(way);
    }
    ++way;
  }
  if (made == 0) return;
  const deltaops_status status = call(args);
  CHECK(status == DELTAOPS_INVALID_ARGUMENT, "status %d for ways%s (%s)", status, ways.c_str(),
        layer->c.name().c_str());
  CHECK(deltaops_last_error()[0] != 0, "a refusal without a sentence, ways%s", ways.c_str());
  CHECK(layer->outputs_untouched(), "a refused call wrote, ways%s (%s)", ways.c_str(),
        layer->c.name().c_str());
  layer->check_inputs();
}

// Memory for wild calls: inputs and outputs apart, pointers into the middle for either sign.
constexpr int64_t kHalf = 1 << 15;
alignas(64) unsigned char wild_inputs[2 * kHalf], wild_outputs[2 * kHalf];

deltaops_matrix wild_matrix(unsigned char *block, Rng *rng) {
  const auto number = [&]() -> int64_t {
    const int64_t edges[] = {0,
                             1,
                             1,
                             2,
                             -1,
                             1 << 16,
                             int64_t{1} << 40,
                             int64_t{1} << 62,
                             std::numeric_limits<int64_t>::max(),
                             std::numeric_limits<int64_t>::min()};
    return rng->one_in(3) ? edges[rng->below(10)] : 1 + rng->below(3);
  };
  deltaops_matrix m = {block + kHalf,
                       number(),
                       number(),
                       number(),
                       number(),
                       static_cast<int32_t>(rng->below(rng->one_in(9) ? 4 : 1)),
                       0};
  const auto reach = [](int64_t count, int64_t stride) {
    return std::fabs(static_cast<double>(count) * static_cast<double>(stride));
  };
  const double elements = reach(m.rows, m.row_stride) + reach(m.cols, m.col_stride) + 1;
  const bool fits = 4 * elements <= static_cast<double>(kHalf);
  if (!fits || rng->one_in(8)) m.data = rng->one_in(2) ? nullptr : block + kHalf + 1;
  return m;
}

template <class Args>
void wild_call(const Args &args) {
  const deltaops_status status = call(args);
  CHECK(status == DELTAOPS_OK || status == DELTAOPS_INVALID_ARGUMENT ||
            status == DELTAOPS_OUT_OF_MEMORY,
        "status %d of a wild call", status);
  CHECK(status == DELTAOPS_OK || deltaops_last_error()[0] != 0, "a refusal without a sentence");
  const auto canary = [](const unsigned char *block) {
    return std::all_of(block, block + 2 * kHalf, [](unsigned char byte) { return byte == 0xFF; });
  };
  CHECK(canary(wild_inputs), "a wild call wrote its inputs");
  if (status == DELTAOPS_OK)
    std::memset(wild_outputs, 0xFF, sizeof wild_outputs);
  else
    CHECK(canary(wild_outputs), "a wild call that failed wrote its outputs");
}

void wild(Rng *rng) {
  const auto in = [&] { return wild_matrix(wild_inputs, rng); };
  const auto out = [&] { return wild_matrix(wild_outputs, rng); };
  const auto maybe = [&](deltaops_matrix m) { return rng->one_in(2) ? m : deltaops_matrix{}; };
  std::vector<deltaops_branch> branches(static_cast<size_t>(rng->below(3)));
  std::vector<deltaops_matrix> grad_a, grad_b, grad_branch_bias;
  for (deltaops_branch &branch : branches) {
    branch = {in(),
              in(),
              maybe(in()),
              static_cast<float>(rng->unit()),
              static_cast<uint32_t>(rng->below(65538)),
              static_cast<uint32_t>(rng->next()),
              static_cast<int32_t>(rng->below(7)) - 1};
    grad_a.push_back(maybe(out()));
    grad_b.push_back(maybe(out()));
    grad_branch_bias.push_back(maybe(out()));
  }
  const int32_t threads = static_cast<int32_t>(rng->below(6));
  const auto count = static_cast<int32_t>(branches.size());
  if (rng->one_in(2)) {
    wild_call(Forward{sizeof(Forward), threads, in(), in(), maybe(in()), out(), maybe(out()),
                      branches.data(), count, 0, rng->next(), nullptr, 0});
  } else {
    wild_call(Backward{sizeof(Backward), threads, in(), maybe(in()), maybe(in()), maybe(in()),
                       branches.data(), count, 0, rng->next(), maybe(out()), maybe(out()),
                       rng->one_in(4) ? nullptr : grad_a.data(),
                       rng->one_in(4) ? nullptr : grad_b.data(),
                       rng->one_in(4) ? nullptr : grad_branch_bias.data(), nullptr, 0});
  }
}

void mask(Rng *rng) {
  const int64_t edges[] = {0,
                           -1,
                           3,
                           int64_t{1} << 33,
                           std::numeric_limits<int64_t>::max(),
                           std::numeric_limits<int64_t>::min()};
  const int64_t M = edges[rng->below(6)], K = edges[rng->below(6)];
  uint8_t keep[9];
  std::memset(keep, 7, sizeof keep);
  const bool fits = M >= 0 && K >= 0 && (M == 0 || K == 0 || (M == 3 && K == 3));
  const uint32_t threshold = static_cast<uint32_t>(rng->below(65600));
  const deltaops_status status =
      deltaops_cpu_dropout_mask(fits ? keep : nullptr, M, K, rng->next(), 1, threshold);
  CHECK((status == DELTAOPS_OK) == (fits && threshold <= 65536), "status %d for M=%lld K=%lld",
        status, static_cast<long long>(M), static_cast<long long>(K));
  if (status != DELTAOPS_OK || M * K == 0)
    CHECK(std::all_of(keep, keep + 9, [](uint8_t k) { return k == 7; }), "an unasked mask");
}

// Forward and, with the s that it has made, backward.
void valid(Layer *layer) {
  const Forward forward = layer->forward();
  CHECK(call(forward) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), layer->c.name().c_str());
  layer->check_forward();
  if (!layer->c.s) return;
  const Backward backward = layer->backward();
  CHECK(call(backward) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), layer->c.name().c_str());
  layer->check_backward();
}

void one(Rng *rng) {
  switch (rng->below(16)) {
    case 0:
    case 1: {
      Layer layer(random_case(rng));
      return valid(&layer);
    }
    case 2:
      CHECK(deltaops_cpu_delta_linear_forward(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_delta_linear_backward(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_set_isa(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_isa_name(static_cast<int32_t>(rng->below(100)) - 200) == nullptr, "-");
      return mask(rng);
    case 3:
    case 4:
    case 5:
    case 6:
    case 7: {
      Layer layer(random_case(rng));
      return rng->one_in(2) ? spoiled(layer.forward(), &layer, rng)
                            : spoiled(layer.backward(), &layer, rng);
    }
    default:
      return wild(rng);
  }
}

}  // namespace

void fuzz(uint64_t seed, int64_t calls) {
  std::memset(wild_inputs, 0xFF, sizeof wild_inputs);
  std::memset(wild_outputs, 0xFF, sizeof wild_outputs);
  Rng rng = {seed};
  for (int64_t i = 0; i < calls; ++i) one(&rng);
}

}  // namespace test

#if defined(DELTAOPS_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint64_t seed = 0;
  std::memcpy(&seed, data, size < sizeof seed ? size : sizeof seed);
  test::fuzz(seed, 1);
  return 0;
}
#endif
