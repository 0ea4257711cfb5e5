// threads.cpp: many callers at once, on inputs of their own and on shared ones; the same bits.

#include <thread>

#include "ops.h"

namespace test {
namespace {

const Case kCase = {40,
                    70,
                    300,
                    {{8, 0}, {4, 6554}, {3, 0, DELTAOPS_GELU, true}},
                    DELTAOPS_F32,
                    DELTAOPS_F32,
                    Layout::kDense,
                    2,
                    true,
                    true,
                    true,
                    7};
constexpr int kCallers = 4;

// With other's inputs and the layer's own outputs.
std::string run(Layer *layer, Layer *inputs) {
  auto forward = inputs->forward(), own = layer->forward();
  forward.y = own.y;
  forward.s = own.s;
  CHECK(deltaops_cpu_delta_linear_forward(&forward) == DELTAOPS_OK, "%s", deltaops_last_error());
  auto backward = inputs->backward(), mine = layer->backward();
  backward.s = mine.s;
  backward.grad_x = mine.grad_x;
  backward.grad_bias = mine.grad_bias;
  backward.grad_a = mine.grad_a;
  backward.grad_b = mine.grad_b;
  backward.grad_branch_bias = mine.grad_branch_bias;
  CHECK(deltaops_cpu_delta_linear_backward(&backward) == DELTAOPS_OK, "%s", deltaops_last_error());
  return layer->output_bits();
}

// The same for the other ops: shared inputs are those of another op of the same case.
std::string run(Op *own, const Op *inputs) {
  const auto pass = [&](Pass *mine, const Pass &theirs) {
    for (size_t i = 0; i < mine->slots.size(); ++i)
      if (!mine->slots[i].written) *mine->slots[i].view = *theirs.slots[i].view;
    for (size_t i = 0; i < mine->heads.size(); ++i)
      if (!mine->heads[i].data.written) mine->heads[i].data.set(theirs.heads[i].data.get());
    CHECK(mine->call() == DELTAOPS_OK, "%s", deltaops_last_error());
  };
  pass(&own->forward, inputs->forward);
  pass(&own->backward, inputs->backward);
  return own->output_bits();
}

void threads_of(const OpCase &c, int rounds) {
  const std::unique_ptr<Op> shared = make(c);
  check_passes(shared.get());
  const std::string want = shared->output_bits();
  for (const bool share : {false, true}) {
    std::vector<std::string> got(kCallers);
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i)
      callers.emplace_back([&, i] {
        const std::unique_ptr<Op> own = make(c);
        for (int round = 0; round < rounds; ++round) {
          own->restore_outputs();
          got[static_cast<size_t>(i)] = run(own.get(), share ? shared.get() : own.get());
        }
      });
    for (std::thread &caller : callers) caller.join();
    for (const std::string &bits : got)
      CHECK(bits == want, "callers at once gave other bits (%s)", c.name().c_str());
  }
}

}  // namespace

void threads(int rounds) {
  for (const Kind kind : kKinds) threads_of({kind, 60, 200, 24, 2, true, 11}, rounds);
  Layer shared(kCase);
  const std::string want = run(&shared, &shared);
  shared.check_forward();
  shared.check_backward();
  shared.pack();
  for (const bool share : {false, true}) {
    std::vector<std::string> got(kCallers);
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i)
      callers.emplace_back([&, i] {
        Layer own(kCase);  // the same seed: the same values at addresses of their own
        for (int round = 0; round < rounds; ++round) {
          own.restore_outputs();
          got[static_cast<size_t>(i)] = run(&own, share ? &shared : &own);
          // An error of this thread must not be seen by the others.
          CHECK(deltaops_cpu_delta_linear_forward(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
        }
      });
    for (std::thread &caller : callers) caller.join();
    for (const std::string &bits : got)
      CHECK(bits == want, "callers at once gave other bits (%s)", kCase.name().c_str());
  }
}

}  // namespace test
