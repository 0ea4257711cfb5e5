// op.cpp: what every op's case is: its memory, what may change of it, and the checks of its passes.

#include <algorithm>
#include <cmath>

#include "ops.h"

namespace test {

std::string OpCase::name() const {
  const char *const names[] = {"bottleneck", "norm_bias", "cross_entropy",
                               "gated",      "rotary",    "attention"};
  return std::string(names[static_cast<int>(kind)]) + " M=" + std::to_string(M) +
         " K=" + std::to_string(K) + " R=" + std::to_string(R) +
         " threads=" + std::to_string(threads) + (whole ? " whole" : "") +
         " seed=" + std::to_string(seed) + " isa=" + deltaops_cpu_isa();
}

Array *Op::input(int64_t rows, int64_t cols, int dtype, bool operand) {
  const Layout by_rows[] = {Layout::kDense, Layout::kPadded, Layout::kReversed, Layout::kRepeated};
  const Layout layout = operand ? static_cast<Layout>(rng_.below(3)) : by_rows[rng_.below(4)];
  inputs_.push_back(&arrays_.emplace_back(rows, cols, dtype, layout, &rng_));
  inputs_.back()->fill(&rng_);
  return &arrays_.back();
}

Array *Op::output(int64_t rows, int64_t cols, int dtype, bool dense) {
  const Layout layout = dense || rng_.one_in(2) ? Layout::kDense : Layout::kPadded;
  outputs_.push_back(&arrays_.emplace_back(rows, cols, dtype, layout, &rng_));
  return &arrays_.back();
}

Array *Op::saved(int64_t rows, int64_t cols, bool dense) {
  saved_.push_back(output(rows, cols, DELTAOPS_F32, dense));
  return &arrays_.back();
}

Tensor *Op::tensor(const int64_t (&sizes)[4], int dtype, Tensor::Use use) {
  Tensor *made = &tensors_.emplace_back(sizes, size_of(dtype), use, &rng_);
  (use == Tensor::Use::kWritten ? outputs_ : inputs_).push_back(made);
  if (use == Tensor::Use::kRead) made->fill(&rng_);
  return made;
}

Tensor *Op::tensor_like(const Tensor &other) {  // an input
  inputs_.push_back(&tensors_.emplace_back(other, &rng_));
  inputs_.back()->fill(&rng_);
  return &tensors_.back();
}

Tensor *Op::saved_tensor(const int64_t (&sizes)[4], int dtype) {
  saved_.push_back(tensor(sizes, dtype, Tensor::Use::kWritten));
  return &tensors_.back();
}

// Of bytes; each query sees most of the keys, or few.
Tensor *Op::mask(const int64_t (&sizes)[4]) {
  Tensor *made = &tensors_.emplace_back(sizes, 1, Tensor::Use::kMask, &rng_);
  const int64_t hidden = 1 + rng_.below(100);
  made->fill([&] { return static_cast<float>(rng_.below(100) >= hidden); });
  inputs_.push_back(made);
  return made;
}

void Op::check(const Tensor &got, const int64_t (&at)[4], Sum want, const char *what) const {
  const double value = got.at(at[0], at[1], at[2], at[3]);
  const double bound = error_bound(want, got.size() == 2 ? DELTAOPS_BF16 : DELTAOPS_F32);
  CHECK(std::fabs(value - want.value) <= bound,
        "%s[%lld, %lld, %lld, %lld] is %.9g, not %.9g +- %.3g (%s)", what,
        static_cast<long long>(at[0]), static_cast<long long>(at[1]), static_cast<long long>(at[2]),
        static_cast<long long>(at[3]), value, want.value, bound, name_.c_str());
}

void Op::keep_saved() {
  for (Memory *memory : saved_) memory->remember();
}

void Op::fill_inputs(const std::function<float()> &value) {
  for (Memory *memory : inputs_)
    if (memory->size() > 1) memory->fill(value);  // a mask stays
}

bool Op::inputs_untouched() const {
  bool same = targets == targets_before_;
  for (const Memory *memory : inputs_) same = same && memory->untouched();
  return same;
}

bool Op::outputs_untouched() const {
  bool same = true;
  for (const Memory *memory : outputs_) same = same && memory->untouched();
  return same;
}

bool Op::only_outputs_changed() const {
  bool same = inputs_untouched();
  for (const Memory *memory : outputs_) same = same && memory->only_elements_changed();
  return same;
}

void Op::restore_outputs() {
  for (Memory *memory : outputs_) memory->restore();
}

std::string Op::output_bits() const {
  std::string bits;
  for (const Memory *memory : outputs_) bits += memory->bits();
  return bits;
}

bool Op::holds(const void *data, double low, double high) const {
  const auto in = [&](const Memory &memory) { return memory.holds(data, low, high); };
  return std::any_of(arrays_.begin(), arrays_.end(), in) ||
         std::any_of(tensors_.begin(), tensors_.end(), in);
}

bool Op::holds(const deltaops_matrix &m) const {
  if (m.data == nullptr) return true;
  if (std::fabs(static_cast<double>(m.rows) * static_cast<double>(m.cols)) > 1 << 20) return false;
  const auto size = static_cast<double>(size_of(m.dtype));
  const double down = (static_cast<double>(m.rows) - 1) * static_cast<double>(m.row_stride);
  const double across = (static_cast<double>(m.cols) - 1) * static_cast<double>(m.col_stride);
  return holds(m.data, size * (std::min(down, 0.0) + std::min(across, 0.0)),
               size * (std::max(down, 0.0) + std::max(across, 0.0) + 1));
}

bool Op::holds(const HeadsSlot &slot) const {
  if (!slot.has_elements()) return true;
  const auto size = static_cast<double>(slot.element());
  double low = 0, high = 0, all = 1;
  bool strided = false;
  for (int axis = 0; axis < 4; ++axis) {
    const auto count = static_cast<double>(slot.count(axis));
    all *= count;
    if (slot.strides[axis] == nullptr) {
      if (axis == 3) high += count - 1;
      continue;
    }
    const double reach = (count - 1) * static_cast<double>(*slot.strides[axis]);
    strided = true;
    low += std::min(reach, 0.0), high += std::max(reach, 0.0);
  }
  if (all > 1 << 16) return false;
  return holds(slot.data.get(), size * low, size * (strided ? high + 1 : all));
}

OpCase random_op(Kind kind, Rng *rng) {
  const auto size = [&] { return 1 + rng->below(rng->one_in(8) ? 90 : 20); };
  OpCase c = {kind, rng->one_in(10) ? 0 : size(), size(), size(), 0, rng->one_in(3), 0};
  if ((kind == Kind::kCrossEntropy || kind == Kind::kAttention) && rng->one_in(12)) c.K = 0;
  c.threads = rng->one_in(30) ? 1024 : 1 + static_cast<int>(rng->below(3));
  c.seed = rng->next();
  return c;
}

void check_passes(Op *op) {
  const std::string name = op->c.name();
  const auto run = [&](const Pass &pass) {
    CHECK(pass.call() == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), name.c_str());
    CHECK(op->only_outputs_changed(), "written beside the outputs (%s)", name.c_str());
  };
  run(op->forward);
  op->check_forward();
  op->keep_saved();
  run(op->backward);
  op->check_backward();
  const std::string want = op->output_bits();
  op->restore_outputs();
  for (const Pass *pass : {&op->forward, &op->backward}) {
    *pass->threads() = op->c.threads % 3 + 2;
    run(*pass);
  }
  CHECK(op->output_bits() == want, "another team gave other bits (%s)", name.c_str());
}

}  // namespace test
