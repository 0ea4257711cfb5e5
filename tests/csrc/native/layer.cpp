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

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

// The gates come from erfc and exp, so that the left tails keep their digits.
double gate(int32_t kind, double h) {
  switch (kind) {
    case DELTAOPS_IDENTITY:
      return 1;
    case DELTAOPS_RELU:
      return h > 0;
    case DELTAOPS_GELU:
      return std::erfc(-h / std::sqrt(2.0)) / 2;
    case DELTAOPS_GELU_TANH:
      return sigmoid(2 * std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h));
    default:
      return sigmoid(h);
  }
}

namespace {

double gate_slope(int32_t kind, double h) {
  switch (kind) {
    case DELTAOPS_IDENTITY:
    case DELTAOPS_RELU:
      return 0;
    case DELTAOPS_GELU:
      return std::exp(-h * h / 2) / std::sqrt(2 * M_PI);
    case DELTAOPS_GELU_TANH: {
      const double g = gate(kind, h);
      return g * (1 - g) * 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * h * h);
    }
    default: {
      const double g = gate(kind, h);
      return g * (1 - g);
    }
  }
}

// How many roundings are in e^x: one, and x itself where it is rounded, which is gelu_tanh's 2u.
double exponent_error(int32_t kind, double h) {
  const double u = std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h);
  return kind == DELTAOPS_GELU_TANH ? 1 + 2 * std::fabs(u) : 1;
}

}  // namespace

// |act(h)| <= |h|, and no slope exceeds 1.13.
Sum activated(int32_t kind, Sum h) {
  if (kind == DELTAOPS_IDENTITY) return h;
  return {h.value * gate(kind, h.value), 2.2 * h.size};
}

Sum activated(int32_t kind, double h) {
  const double value = h * gate(kind, h);
  return {value, std::fabs(value) * exponent_error(kind, h)};
}

// Near its zero it is the difference of two larger terms.
Sum slope(int32_t kind, double h) {
  Sum sum;
  sum.add(gate(kind, h), 1);
  sum.add(h, gate_slope(kind, h));
  sum.size *= exponent_error(kind, h);
  return sum;
}

// Float sums in blocks stay far below 64 roundings; the result is rounded once more, to its dtype.
double error_bound(Sum want, int dtype) {
  const double bound = 64 * 0x1p-24 * want.size + 1e-30;
  return dtype == DELTAOPS_BF16 ? bound + 0x1p-8 * std::fabs(want.value) : bound;
}

void check_value(const Array &got, int64_t r, int64_t col, Sum want, const char *what,
                 const std::string &name) {
  const double value = got.at(r, col);
  const double bound = error_bound(want, got.matrix().dtype);
  CHECK(std::fabs(value - want.value) <= bound, "%s[%lld, %lld] is %.9g, not %.9g +- %.3g (%s)",
        what, static_cast<long long>(r), static_cast<long long>(col), value, want.value, bound,
        name.c_str());
}

namespace {

std::unique_ptr<Buffer> packed(const deltaops_matrix &weight, int threads) {
  int64_t bytes = 0;
  CHECK(deltaops_cpu_packed_bytes(&weight, &bytes) == DELTAOPS_OK, "%s", deltaops_last_error());
  auto buffer = std::make_unique<Buffer>(bytes);
  CHECK(deltaops_cpu_pack_weight(&weight, buffer->data(), bytes, threads) == DELTAOPS_OK, "%s",
        deltaops_last_error());
  return buffer;
}

deltaops_status forward_of(Layer *layer) {
  const auto args = layer->forward();
  return deltaops_cpu_delta_linear_forward(&args);
}

deltaops_status backward_of(Layer *layer) {
  const auto args = layer->backward();
  return deltaops_cpu_delta_linear_backward(&args);
}

}  // namespace

deltaops_matrix transposed(const deltaops_matrix &m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype, m.reserved};
}

std::string Case::name() const {
  std::string text =
      "M=" + std::to_string(M) + " N=" + std::to_string(N) + " K=" + std::to_string(K) +
      (dtype == DELTAOPS_BF16 ? " bf16" : " f32") + (adapters == DELTAOPS_BF16 ? "/bf16" : "/f32") +
      " layout=" + std::to_string(static_cast<int>(weight)) +
      " threads=" + std::to_string(threads) + (bias ? " bias" : "") + (s ? " s" : "") +
      (packed ? " packed" : "") + (routed ? " routed" : "") + " seed=" + std::to_string(seed);
  for (const BranchSpec &branch : branches)
    text += " r" + std::to_string(branch.rank) + "/" + std::to_string(branch.threshold) + "/act" +
            std::to_string(branch.activation) + (branch.bias ? "/bias" : "");
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
    branch_bias_.emplace_back(1, spec.rank, c.adapters, Layout::kDense, &rng_);
    grad_a_.emplace_back(spec.rank, c.K, c.adapters, Layout::kDense, &rng_);
    grad_b_.emplace_back(c.N, spec.rank, c.adapters, Layout::kDense, &rng_);
    grad_branch_bias_.emplace_back(1, spec.rank, c.adapters, Layout::kDense, &rng_);
  }
  for (Array *array : {&x_, &weight_, &bias_, &grad_y_}) array->fill(&rng_);
  for (size_t i = 0; i < a_.size(); ++i) {
    a_[i].fill(&rng_);
    b_[i].fill(&rng_);
    branch_bias_[i].fill(&rng_);
    const bool biased = c.branches[i].bias;
    branches.push_back({a_[i].matrix(), b_[i].matrix(),
                        biased ? branch_bias_[i].matrix() : deltaops_matrix{},
                        0.5f + static_cast<float>(i), c.branches[i].threshold,
                        static_cast<uint32_t>(i), c.branches[i].activation});
    grad_a_list.push_back(grad_a_[i].matrix());
    grad_b_list.push_back(grad_b_[i].matrix());
    grad_branch_bias_list.push_back(biased ? grad_branch_bias_[i].matrix() : deltaops_matrix{});
  }
  if (c.routed)
    for (int64_t m = 0; m < c.M; ++m)
      adapter_.push_back(static_cast<int32_t>(rng_.below(static_cast<int64_t>(a_.size()) + 1)) - 1);
}

void Layer::pack() {
  packed_ = packed(weight_.matrix(), c.threads);
  packed_transposed_ = packed(transposed(weight_.matrix()), c.threads);
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
  if (packed_) args.packed_weight = packed_->data(), args.packed_bytes = packed_->bytes();
  if (c.routed) args.adapter = adapter_.data();
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
  args.grad_branch_bias = grad_branch_bias_list.data();
  if (packed_transposed_)
    args.packed_weight = packed_transposed_->data(),
    args.packed_bytes = packed_transposed_->bytes();
  if (c.routed) args.adapter = adapter_.data();
  return args;
}

bool Layer::has(int64_t m, size_t i) const {
  return !c.routed || adapter_[static_cast<size_t>(m)] == static_cast<int32_t>(i);
}

bool Layer::kept(int64_t m, int64_t k, size_t i) const {
  return has(m, i) &&
         deltaops_draw(k, m, static_cast<uint32_t>(i), c.seed) >= c.branches[i].threshold;
}

// What dropout multiplies the kept elements by; nothing is kept where it is 0.
double Layer::scale(size_t i) const {
  const double kept = 65536.0 - c.branches[i].threshold;
  return kept > 0 ? 65536.0 / kept : 0.0;
}

void Layer::check_forward() const {
  const std::string name = c.name();
  std::vector<Sum> up(static_cast<size_t>(ranks_));  // s_i * act(H_i)
  for (int64_t m = 0; m < c.M; ++m) {
    size_t at = 0;
    for (size_t i = 0; i < a_.size(); ++i)
      for (int64_t q = 0; q < a_[i].rows(); ++q, ++at) {
        Sum h, scaled;
        if (c.branches[i].bias && has(m, i)) h.add(branch_bias_[i].at(0, q), 1);
        for (int64_t k = 0; k < c.K; ++k)
          if (kept(m, k, i)) h.add(scale(i) * x_.at(m, k), a_[i].at(q, k));
        scaled.add(activated(c.branches[i].activation, h), branches[i].scaling);
        up[at] = scaled;
        const Sum &saved = c.branches[i].activation == DELTAOPS_IDENTITY ? scaled : h;
        if (c.s) check_value(s_, m, static_cast<int64_t>(at), saved, "s", name);
      }
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      if (c.bias) sum.add(bias_.at(0, n), 1);
      for (int64_t k = 0; k < c.K; ++k) sum.add(x_.at(m, k), weight_.at(n, k));
      at = 0;
      for (const Array &b : b_)
        for (int64_t q = 0; q < b.cols(); ++q, ++at) sum.add(up[at], b.at(n, q));
      check_value(y_, m, n, sum, "y", name);
    }
  }
  CHECK(y_.only_elements_changed() && s_.only_elements_changed(),
        "forward wrote beside its outputs (%s)", c.name().c_str());
  check_inputs();
}

void Layer::check_backward() const {
  const std::string name = c.name();
  // The gradient of H_i: dh[i][m * rank + q] = s_i act'(H_i[m, q]) sum_n grad_y[m, n] b_i[n, q].
  // Past an activation H_i is what s holds: as good as exact here, since it has been checked. up:
  // s_i * act(H_i), what B_i multiplies.
  std::vector<std::vector<Sum>> dh(a_.size());
  std::vector<std::vector<Sum>> up(a_.size());
  int64_t column = 0;
  for (size_t i = 0; i < a_.size(); column += a_[i].rows(), ++i)
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t q = 0; q < a_[i].rows(); ++q) {
        const int32_t kind = c.branches[i].activation;
        const double s = s_.at(m, column + q), scaling = branches[i].scaling;
        Sum scaled;
        if (kind == DELTAOPS_IDENTITY)
          scaled.add(s, 1);
        else
          scaled.add(activated(kind, s), scaling);
        up[i].push_back(scaled);
        const Sum step = slope(kind, kind == DELTAOPS_IDENTITY ? 0 : s);
        Sum sum;
        if (has(m, i))
          for (int64_t n = 0; n < c.N; ++n) sum.add(scaling * grad_y_.at(m, n), b_[i].at(n, q));
        dh[i].push_back({sum.value * step.value, sum.size * step.size});
      }
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t k = 0; k < c.K; ++k) {
      Sum sum;
      for (int64_t n = 0; n < c.N; ++n) sum.add(grad_y_.at(m, n), weight_.at(n, k));
      for (size_t i = 0; i < a_.size(); ++i)
        if (kept(m, k, i))
          for (int64_t q = 0; q < a_[i].rows(); ++q)
            sum.add(dh[i][static_cast<size_t>(m * a_[i].rows() + q)], scale(i) * a_[i].at(q, k));
      check_value(grad_x_, m, k, sum, "grad_x", name);
    }
  for (size_t i = 0; i < a_.size(); ++i)
    for (int64_t q = 0; q < a_[i].rows(); ++q) {
      const auto at = [&](int64_t m) { return static_cast<size_t>(m * a_[i].rows() + q); };
      for (int64_t k = 0; k < c.K; ++k) {
        Sum sum;
        for (int64_t m = 0; m < c.M; ++m)
          if (kept(m, k, i)) sum.add(dh[i][at(m)], scale(i) * x_.at(m, k));
        check_value(grad_a_[i], q, k, sum, "grad_a", name);
      }
      for (int64_t n = 0; n < c.N; ++n) {
        Sum sum;
        for (int64_t m = 0; m < c.M; ++m) sum.add(up[i][at(m)], grad_y_.at(m, n));
        check_value(grad_b_[i], n, q, sum, "grad_b", name);
      }
      if (!c.branches[i].bias) continue;
      Sum sum;
      for (int64_t m = 0; m < c.M; ++m) sum.add(dh[i][at(m)], 1);
      check_value(grad_branch_bias_[i], 0, q, sum, "grad_branch_bias", name);
    }
  if (c.bias)
    for (int64_t n = 0; n < c.N; ++n) {
      Sum sum;
      for (int64_t m = 0; m < c.M; ++m) sum.add(grad_y_.at(m, n), 1);
      check_value(grad_bias_, 0, n, sum, "grad_bias", name);
    }
  each_output([&](const Array &array) {
    CHECK(array.only_elements_changed(), "backward wrote beside its outputs (%s)",
          c.name().c_str());
  });
  check_inputs();
}

void Layer::check_inputs() const {
  bool same = x_.untouched() && weight_.untouched() && bias_.untouched() && grad_y_.untouched();
  for (const auto *arrays : {&a_, &b_, &branch_bias_})
    for (const Array &array : *arrays) same = same && array.untouched();
  CHECK(same, "an input was written (%s)", c.name().c_str());
}

template <class F>
void Layer::each_output(const F &f) const {
  for (const Array *array : {&y_, &s_, &grad_x_, &grad_bias_}) f(*array);
  for (const auto *arrays : {&grad_a_, &grad_b_, &grad_branch_bias_})
    for (const Array &array : *arrays) f(array);
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

void check_passes(Layer *layer) {
  const std::string name = layer->c.name();
  CHECK(forward_of(layer) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), name.c_str());
  layer->check_forward();
  if (layer->c.s) {
    CHECK(backward_of(layer) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), name.c_str());
    layer->check_backward();
  }
  if (!layer->c.packed) return;
  const std::string want = layer->output_bits();
  layer->restore_outputs();
  layer->pack();
  CHECK(forward_of(layer) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), name.c_str());
  if (layer->c.s)
    CHECK(backward_of(layer) == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), name.c_str());
  CHECK(layer->output_bits() == want, "a packed weight gave other bits (%s)", name.c_str());
  layer->check_inputs();
}

Case random_case(Rng *rng) {
  const auto size = [&] { return rng->one_in(12) ? 0 : 1 + rng->below(rng->one_in(8) ? 90 : 20); };
  Case c = {};
  c.M = size(), c.N = size(), c.K = rng->one_in(20) ? 1025 + rng->below(40) : size();
  for (int64_t left = rng->below(4); left > 0; --left) {
    const uint32_t thresholds[] = {0, 0, 6554, 65535, 65536};
    const int64_t rank = 1 + rng->below(rng->one_in(6) ? 40 : 9);
    const uint32_t threshold = thresholds[rng->below(5)];
    const int32_t activation = rng->one_in(2) ? 0 : static_cast<int32_t>(rng->below(5));
    c.branches.push_back({rank, threshold, activation, rng->one_in(3)});
  }
  c.dtype = rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32;
  c.adapters = rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32;
  c.weight = static_cast<Layout>(rng->below(3));
  c.threads = 1 + static_cast<int>(rng->below(3));
  c.bias = !rng->one_in(4);
  c.s = !rng->one_in(4);
  c.packed = rng->one_in(2);
  c.seed = rng->next();
  c.routed = c.seed % 3 == 0;
  return c;
}

}  // namespace test
