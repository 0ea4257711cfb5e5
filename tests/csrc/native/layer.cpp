// layer.cpp: the double reference, straight from the formulas in deltaops.h.

#include "layer.h"

namespace test {
namespace {

int64_t total_rank(const Case &c) {
  int64_t total = 0;
  for (const BranchSpec &branch : c.branches) total += branch.rank;
  return total;
}

Layout rows_layout(Rng *rng) { return rng->one_in(2) ? Layout::kDense : Layout::kPadded; }

}  // namespace

std::string Case::name() const {
  std::string text = "M=" + std::to_string(M) + " N=" + std::to_string(N) +
                     " K=" + std::to_string(K) + (dtype == DELTAOPS_BF16 ? " bf16" : " f32") +
                     (adapters == DELTAOPS_BF16 ? "/bf16" : "/f32") +
                     " layout=" + std::to_string(static_cast<int>(weight)) +
                     " threads=" + std::to_string(threads) + (bias ? " bias" : "") +
                     (s ? " s" : "") + " seed=" + std::to_string(seed);
  for (const BranchSpec &branch : branches)
    text += " r" + std::to_string(branch.rank) + "/" + std::to_string(branch.threshold);
  return text + " isa=" + deltaops_cpu_isa();
}

Layer::Layer(const Case &given)
    : c(given),
      rng_{given.seed},
      x_(c.M, c.K, c.dtype, rows_layout(&rng_), &rng_),
      weight_(c.N, c.K, c.dtype, c.weight, &rng_),
      bias_(1, c.N, c.dtype, Layout::kDense, &rng_),
      y_(c.M, c.N, c.dtype, rows_layout(&rng_), &rng_),
      s_(c.M, total_rank(c), DELTAOPS_F32, rows_layout(&rng_), &rng_),
      grad_y_(c.M, c.N, c.dtype, rows_layout(&rng_), &rng_),
      grad_x_(c.M, c.K, c.dtype, rows_layout(&rng_), &rng_),
      grad_bias_(1, c.N, c.dtype, Layout::kDense, &rng_),
      ranks_(total_rank(c)) {
  for (const BranchSpec &spec : c.branches) {
    const Layout layout = static_cast<Layout>(rng_.below(3));
    a_.emplace_back(spec.rank, c.K, c.adapters, layout, &rng_);
    b_.emplace_back(c.N, spec.rank, c.adapters, layout, &rng_);
    grad_a_.emplace_back(spec.rank, c.K, c.adapters, Layout::kDense, &rng_);
    grad_b_.emplace_back(c.N, spec.rank, c.adapters, Layout::kDense, &rng_);
  }
  for (Array *array : {&x_, &weight_, &bias_, &grad_y_}) array->fill(&rng_);
  for (size_t i = 0; i < a_.size(); ++i) {
    a_[i].fill(&rng_);
    b_[i].fill(&rng_);
    branches.push_back({a_[i].matrix(),
                        b_[i].matrix(),
                        {},
                        0.5f + static_cast<float>(i),
                        c.branches[i].threshold,
                        static_cast<uint32_t>(i),
                        0});
    grad_a_list.push_back(grad_a_[i].matrix());
    grad_b_list.push_back(grad_b_[i].matrix());
  }
}

deltaops_delta_linear_forward_args Layer::forward() {
  deltaops_delta_linear_forward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = c.threads;
  args.x = x_.matrix();
  args.weight = weight_.matrix();
  if (c.bias) args.bias = bias_.matrix();
  args.y = y_.matrix();
  if (c.s) args.s = s_.matrix();
  args.branches = branches.data();
  args.num_branches = static_cast<int32_t>(branches.size());
  args.seed = c.seed;
  return args;
}

deltaops_delta_linear_backward_args Layer::backward() {
  deltaops_delta_linear_backward_args args = {};
  args.struct_size = sizeof args;
  args.num_threads = c.threads;
  args.grad_y = grad_y_.matrix();
  args.x = x_.matrix();
  args.weight = weight_.matrix();
  args.s = s_.matrix();
  args.branches = branches.data();
  args.num_branches = static_cast<int32_t>(branches.size());
  args.seed = c.seed;
  args.grad_x = grad_x_.matrix();
  if (c.bias) args.grad_bias = grad_bias_.matrix();
  args.grad_a = grad_a_list.data();
  args.grad_b = grad_b_list.data();
  return args;
}

bool Layer::kept(int64_t m, int64_t k, size_t i) const {
  return deltaops_draw(k, m, static_cast<uint32_t>(i), c.seed) >= c.branches[i].threshold;
}

double Layer::factor(size_t i) const {
  const double kept = 65536.0 - c.branches[i].threshold;
  return kept > 0 ? static_cast<double>(branches[i].scaling) * 65536.0 / kept : 0.0;
}

// Float sums in blocks stay far below 64 roundings; the result is rounded once more, to its dtype.
void Layer::check(const Array &got, int64_t r, int64_t col, Sum want, const char *what) const {
  const double value = got.at(r, col);
  double bound = 64 * 0x1p-24 * want.size + 1e-30;
  if (got.matrix().dtype == DELTAOPS_BF16) bound += 0x1p-8 * std::fabs(want.value);
  CHECK(std::fabs(value - want.value) <= bound, "%s[%lld, %lld] is %.9g, not %.9g +- %.3g (%s)",
        what, static_cast<long long>(r), static_cast<long long>(col), value, want.value, bound,
        c.name().c_str());
}

void Layer::check_forward() const {
  std::vector<Sum> s(static_cast<size_t>(ranks_));
  for (int64_t m = 0; m < c.M; ++m) {
    size_t at = 0;
    for (size_t i = 0; i < a_.size(); ++i)
      for (int64_t q = 0; q < a_[i].rows(); ++q, ++at) {
        Sum sum;
        for (int64_t k = 0; k < c.K; ++k)
          if (kept(m, k, i)) sum.add(factor(i) * x_.at(m, k), a_[i].at(q, k));
        s[at] = sum;
        if (c.s) check(s_, m, static_cast<int64_t>(at), sum, "s");
      }
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      if (c.bias) sum.add(bias_.at(0, n), 1);
      for (int64_t k = 0; k < c.K; ++k) sum.add(x_.at(m, k), weight_.at(n, k));
      at = 0;
      for (const Array &b : b_)
        for (int64_t q = 0; q < b.cols(); ++q, ++at) sum.add(s[at], b.at(n, q));
      check(y_, m, n, sum, "y");
    }
  }
  CHECK(y_.only_elements_changed() && s_.only_elements_changed(),
        "forward wrote beside its outputs (%s)", c.name().c_str());
  check_inputs();
}

void Layer::check_backward() const {
  // ds[i][m * rank + q] = factor_i * sum_n grad_y[m, n] b_i[n, q]
  std::vector<std::vector<Sum>> ds(a_.size());
  for (size_t i = 0; i < a_.size(); ++i)
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t q = 0; q < a_[i].rows(); ++q) {
        Sum sum;
        for (int64_t n = 0; n < c.N; ++n) sum.add(factor(i) * grad_y_.at(m, n), b_[i].at(n, q));
        ds[i].push_back(sum);
      }
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t k = 0; k < c.K; ++k) {
      Sum sum;
      for (int64_t n = 0; n < c.N; ++n) sum.add(grad_y_.at(m, n), weight_.at(n, k));
      for (size_t i = 0; i < a_.size(); ++i)
        if (kept(m, k, i))
          for (int64_t q = 0; q < a_[i].rows(); ++q)
            sum.add(ds[i][static_cast<size_t>(m * a_[i].rows() + q)], a_[i].at(q, k));
      check(grad_x_, m, k, sum, "grad_x");
    }
  int64_t column = 0;
  for (size_t i = 0; i < a_.size(); column += a_[i].rows(), ++i)
    for (int64_t q = 0; q < a_[i].rows(); ++q) {
      for (int64_t k = 0; k < c.K; ++k) {
        Sum sum;
        for (int64_t m = 0; m < c.M; ++m)
          if (kept(m, k, i)) sum.add(ds[i][static_cast<size_t>(m * a_[i].rows() + q)], x_.at(m, k));
        check(grad_a_[i], q, k, sum, "grad_a");
      }
      for (int64_t n = 0; n < c.N; ++n) {
        Sum sum;
        for (int64_t m = 0; m < c.M; ++m) sum.add(grad_y_.at(m, n), s_.at(m, column + q));
        check(grad_b_[i], n, q, sum, "grad_b");
      }
    }
  if (c.bias)
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      for (int64_t m = 0; m < c.M; ++m) sum.add(grad_y_.at(m, n), 1);
      check(grad_bias_, 0, n, sum, "grad_bias");
    }
  each_output([&](const Array &array) {
    CHECK(array.only_elements_changed(), "backward wrote beside its outputs (%s)",
          c.name().c_str());
  });
  check_inputs();
}

void Layer::check_inputs() const {
  bool same = x_.untouched() && weight_.untouched() && bias_.untouched() && grad_y_.untouched();
  for (size_t i = 0; i < a_.size(); ++i) same = same && a_[i].untouched() && b_[i].untouched();
  CHECK(same, "an input was written (%s)", c.name().c_str());
}

template <class F>
void Layer::each_output(const F &f) const {
  for (const Array *array : {&y_, &s_, &grad_x_, &grad_bias_}) f(*array);
  for (size_t i = 0; i < a_.size(); ++i) f(grad_a_[i]), f(grad_b_[i]);
}

bool Layer::outputs_untouched() const {
  bool same = true;
  each_output([&](const Array &array) { same = same && array.untouched(); });
  return same;
}

void Layer::restore_outputs() {
  each_output([](const Array &array) { const_cast<Array &>(array).restore(); });
}

std::string Layer::output_bits() const {
  std::string bits;
  each_output([&](const Array &array) { bits += array.bits(); });
  return bits;
}

Case random_case(Rng *rng) {
  const auto size = [&] { return rng->one_in(12) ? 0 : 1 + rng->below(rng->one_in(8) ? 90 : 20); };
  Case c = {};
  c.M = size(), c.N = size(), c.K = rng->one_in(20) ? 1025 + rng->below(40) : size();
  for (int64_t left = rng->below(4); left > 0; --left) {
    const uint32_t thresholds[] = {0, 0, 6554, 65535, 65536};
    c.branches.push_back({1 + rng->below(rng->one_in(6) ? 40 : 9), thresholds[rng->below(5)]});
  }
  c.dtype = rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32;
  c.adapters = rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32;
  c.weight = static_cast<Layout>(rng->below(3));
  c.threads = 1 + static_cast<int>(rng->below(3));
  c.bias = !rng->one_in(4);
  c.s = !rng->one_in(4);
  c.seed = rng->next();
  return c;
}

}  // namespace test
