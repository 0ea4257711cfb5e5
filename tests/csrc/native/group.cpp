// group.cpp: layers of the same x, called together and called alone.
//
// Alone they have been held against double by the other parts. Together they give the same bits,
// but for the gradient of x, which is the sum of the layers' own to rounding; and a group that is
// none is refused before anything is written.

#include "layer.h"

namespace test {
namespace {

using Forward = deltaops_delta_linear_forward_args;
using Backward = deltaops_delta_linear_backward_args;
using Values = std::vector<double>;

double value_of(const deltaops_matrix &m, int64_t r, int64_t c) {
  const int64_t size = m.dtype == DELTAOPS_BF16 ? 2 : 4;
  const char *at = static_cast<const char *>(m.data) + (r * m.row_stride + c * m.col_stride) * size;
  uint32_t bits = 0;
  uint16_t half;
  if (size == 2)
    std::memcpy(&half, at, sizeof half), bits = uint32_t{half} << 16;
  else
    std::memcpy(&bits, at, sizeof bits);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void append(const deltaops_matrix &m, Values *values) {
  if (m.data == nullptr) return;
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.cols; ++c) values->push_back(value_of(m, r, c));
}

Values outputs(const Forward &args) {
  Values values;
  append(args.y, &values);
  append(args.s, &values);
  return values;
}

// All but the gradient of x.
Values outputs(const Backward &args) {
  Values values;
  append(args.grad_bias, &values);
  for (int32_t i = 0; i < args.num_branches; ++i)
    for (const auto *list : {args.grad_a, args.grad_b, args.grad_branch_bias})
      append(list[i], &values);
  return values;
}

bool same(const Values &a, const Values &b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

struct Calls {
  std::vector<Forward> forward;
  std::vector<Backward> backward;
};

// Each layer's calls, with the first one's x. The same memory each time.
Calls calls_of(std::vector<std::unique_ptr<Layer>> *layers) {
  Calls calls;
  for (auto &layer : *layers) {
    calls.forward.push_back(layer->forward());
    calls.backward.push_back(layer->backward());
    calls.forward.back().x = calls.forward[0].x;
    calls.backward.back().x = calls.backward[0].x;
  }
  return calls;
}

void check_group(std::vector<std::unique_ptr<Layer>> *layers, bool want_x) {
  const std::string name = (*layers)[0]->c.name();
  Calls calls = calls_of(layers);
  const auto count = static_cast<int32_t>(layers->size());
  if (!want_x)
    for (Backward &args : calls.backward) args.grad_x = {};
  const deltaops_matrix grad_x = calls.backward[0].grad_x;
  std::vector<Values> alone;
  Values sum, size;
  for (size_t i = 0; i < layers->size(); ++i) {
    CHECK(deltaops_cpu_delta_linear_forward(&calls.forward[i]) == DELTAOPS_OK, "%s (%s)",
          deltaops_last_error(), name.c_str());
    alone.push_back(outputs(calls.forward[i]));
  }
  for (size_t i = 0; i < layers->size(); ++i) {
    CHECK(deltaops_cpu_delta_linear_backward(&calls.backward[i]) == DELTAOPS_OK, "%s (%s)",
          deltaops_last_error(), name.c_str());
    alone.push_back(outputs(calls.backward[i]));
    Values own;
    append(calls.backward[i].grad_x, &own);
    sum.resize(own.size()), size.resize(own.size());
    for (size_t j = 0; j < own.size(); ++j) sum[j] += own[j], size[j] += std::fabs(own[j]);
  }
  for (auto &layer : *layers) layer->restore_outputs();

  for (size_t i = 1; i < layers->size(); ++i) calls.backward[i].grad_x = {};
  CHECK(deltaops_cpu_delta_linear_group_forward(calls.forward.data(), count) == DELTAOPS_OK,
        "%s (%s)", deltaops_last_error(), name.c_str());
  for (size_t i = 0; i < layers->size(); ++i)
    CHECK(same(outputs(calls.forward[i]), alone[i]), "layer %zu forward has other bits (%s)", i,
          name.c_str());
  CHECK(deltaops_cpu_delta_linear_group_backward(calls.backward.data(), count) == DELTAOPS_OK,
        "%s (%s)", deltaops_last_error(), name.c_str());
  for (size_t i = 0; i < layers->size(); ++i)
    CHECK(same(outputs(calls.backward[i]), alone[layers->size() + i]),
          "layer %zu backward has other bits (%s)", i, name.c_str());
  Values together;
  append(grad_x, &together);
  // Each own gradient was rounded once, and is itself a sum of larger terms than its value says.
  const double each = (*layers)[0]->c.dtype == DELTAOPS_BF16 ? 0x1p-7 : 0x1p-14;
  for (size_t j = 0; j < together.size(); ++j)
    CHECK(std::fabs(together[j] - sum[j]) <= each * (size[j] + 1), "grad_x is %g, not %g (%s)",
          together[j], sum[j], name.c_str());
  for (auto &layer : *layers) layer->check_inputs();
}

// One thing that makes it no group.
void check_refused(std::vector<std::unique_ptr<Layer>> *layers, Rng *rng) {
  for (auto &layer : *layers) layer->restore_outputs();
  Calls calls = calls_of(layers);
  const auto count = static_cast<int32_t>(layers->size());
  const auto last = layers->size() - 1;
  for (size_t i = 1; i < layers->size(); ++i) calls.backward[i].grad_x = {};
  switch (rng->below(4)) {
    case 0:
      calls.forward[last].x = (*layers)[last]->forward().x;
      calls.backward[last].grad_x = (*layers)[last]->backward().grad_x;
      break;
    case 1:
      calls.forward[last].num_threads = calls.backward[last].num_threads = 1 + 3;
      break;
    case 2:
      calls.forward[last].y = calls.forward[0].y;
      calls.backward[last].grad_x = calls.backward[0].grad_x;
      break;
    default:
      calls.forward[last].struct_size = calls.backward[last].struct_size = 0;
  }
  const deltaops_status forward =
      deltaops_cpu_delta_linear_group_forward(calls.forward.data(), count);
  const deltaops_status backward =
      deltaops_cpu_delta_linear_group_backward(calls.backward.data(), count);
  CHECK(forward == DELTAOPS_INVALID_ARGUMENT && backward == DELTAOPS_INVALID_ARGUMENT,
        "a spoiled group gave %d and %d", forward, backward);
  for (auto &layer : *layers)
    CHECK(layer->outputs_untouched(), "a refused group wrote (%s)", layer->c.name().c_str());
}

}  // namespace

void groups(uint64_t seed, int64_t count) {
  Rng rng{seed};
  for (int64_t i = 0; i < count; ++i) {
    const Case first = random_case(&rng);
    std::vector<std::unique_ptr<Layer>> layers;
    for (int64_t members = 1 + rng.below(4); members > 0; --members) {
      Case c = random_case(&rng);
      c.M = first.M, c.K = first.K, c.dtype = first.dtype, c.threads = first.threads;
      c.s = true;
      if (rng.one_in(2) && !layers.empty()) c.N = layers[0]->c.N;
      layers.push_back(std::make_unique<Layer>(c));
      if (c.packed) layers.back()->pack();
    }
    check_group(&layers, !rng.one_in(4));
    // elements to overlap, and gradients to refuse
    const Case &one = layers[0]->c;
    if (layers.size() > 1 && one.M > 0 && one.K > 0 && one.N > 0 && layers.back()->c.N == one.N)
      check_refused(&layers, &rng);
  }
}

}  // namespace test
