// ops.cpp: the ops of matrices beside delta_linear with their double references, straight from
// deltaops.h.

#include "ops.h"

namespace test {
namespace {

deltaops_matrix view(const Array *array) { return array ? array->matrix() : deltaops_matrix{}; }

double at(const Array *array, int64_t r, int64_t col, double absent) {
  return array ? array->at(r, col) : absent;
}

void add(Pass *pass, deltaops_matrix *view, Slot slot) {
  if (view->data == nullptr && !slot.needed) return;
  slot.view = view;
  pass->slots.push_back(slot);
}
//                          view  written needed free  dense operand
constexpr Slot kRead = {nullptr, false, true, false, false, false};
constexpr Slot kVector = {nullptr, false, false, true, false, false};
constexpr Slot kOperand = {nullptr, false, true, true, false, true};
constexpr Slot kWritten = {nullptr, true, true, false, false, false};
constexpr Slot kMaybeRead = {nullptr, false, false, false, false, false};
constexpr Slot kMaybeWritten = {nullptr, true, false, false, false, false};
constexpr Slot kGradient = {nullptr, true, false, true, true, false};

// ------------------------------------------------------------------------------------- norms

// A normalized row: n, with the size that its rounding errors are relative to.
struct Row {
  Sum mean, rstd;
  std::vector<Sum> n;
};

Row normalized(const Array &x, int64_t m, int32_t norm, double eps) {
  const auto K = static_cast<double>(x.cols());
  Row row;
  double spread = 0;
  for (int64_t k = 0; k < x.cols(); ++k) row.mean.add(x.at(m, k), 1 / K);
  const double reach = row.mean.size;
  if (norm == DELTAOPS_RMS_NORM) row.mean = {};
  for (int64_t k = 0; k < x.cols(); ++k)
    spread += (x.at(m, k) - row.mean.value) * (x.at(m, k) - row.mean.value) / K;
  const double rstd = 1 / std::sqrt(spread + eps);
  row.rstd = {rstd, rstd * (1 + reach * rstd)};
  for (int64_t k = 0; k < x.cols(); ++k) {
    const double n = (x.at(m, k) - row.mean.value) * rstd;
    row.n.push_back(
        {n, (std::fabs(x.at(m, k)) + reach) * rstd + std::fabs(n) * (1 + reach * rstd)});
  }
  return row;
}

// The same from saved statistics, which are exact here.
Row saved_row(const Array &x, const Array &stats, int64_t m) {
  Row row = {of(stats.at(m, 0)), of(stats.at(m, 1)), {}};
  for (int64_t k = 0; k < x.cols(); ++k)
    row.n.push_back(times(plus(of(x.at(m, k)), of(-row.mean.value)), row.rstd));
  return row;
}

// dx of a row from dy.
std::vector<Sum> norm_backward(const Row &row, const std::vector<Sum> &dy, const Array *gamma,
                               int32_t norm) {
  const auto K = static_cast<double>(dy.size());
  std::vector<Sum> g, dx;
  Sum mean_g, mean_gn;
  for (size_t k = 0; k < dy.size(); ++k) {
    g.push_back(times(dy[k], at(gamma, 0, static_cast<int64_t>(k), 1)));
    if (norm == DELTAOPS_LAYER_NORM) mean_g.add(g[k], 1 / K);
    mean_gn.add(times(g[k], row.n[k]), 1 / K);
  }
  for (size_t k = 0; k < dy.size(); ++k) {
    const Sum inner = plus(plus(g[k], times(mean_g, -1)), times(times(row.n[k], mean_gn), -1));
    dx.push_back(times(row.rstd, inner));
  }
  return dx;
}

// -------------------------------------------------------------------------------- bottleneck

deltaops_status bottleneck_forward(const void *args) {
  return deltaops_cpu_bottleneck_forward(
      static_cast<const deltaops_bottleneck_forward_args *>(args));
}
deltaops_status bottleneck_backward(const void *args) {
  return deltaops_cpu_bottleneck_backward(
      static_cast<const deltaops_bottleneck_backward_args *>(args));
}

class Bottleneck final : public Op {
 public:
  explicit Bottleneck(const OpCase &given) : Op(given) {
    const int64_t M = c.M, K = c.K, R = c.R;
    const int dtype = any_dtype();
    norm_ = static_cast<int32_t>(rng_.below(3));
    activation_ = static_cast<int32_t>(rng_.below(5));
    const bool norm = norm_ != DELTAOPS_NO_NORM;
    x_ = input(M, K, dtype);
    residual_is_x_ = rng_.one_in(2);
    if (!residual_is_x_ && wanted()) residual_ = input(M, K, dtype);
    if (wanted()) gamma_ = input(1, K, any_dtype());
    if (wanted()) beta_ = input(1, K, any_dtype());
    down_ = input(R, K, any_dtype(), true);
    if (wanted()) down_bias_ = input(1, R, any_dtype());
    up_ = input(K, R, any_dtype(), true);
    if (wanted()) up_bias_ = input(1, K, any_dtype());
    y_ = output(M, K, dtype);
    h_ = saved(M, R);
    if (norm) stats_ = saved(M, 2);
    grad_y_ = input(M, K, dtype);
    if (wanted()) grad_x_ = output(M, K, dtype);
    if (norm && wanted()) grad_gamma_ = output(1, K, any_dtype());
    if (norm && wanted()) grad_beta_ = output(1, K, any_dtype());
    if (wanted()) grad_down_ = output(R, K, any_dtype(), true);
    if (wanted()) grad_down_bias_ = output(1, R, any_dtype());
    if (wanted()) grad_up_ = output(K, R, any_dtype(), true);
    if (wanted()) grad_up_bias_ = output(1, K, any_dtype());
    const bool past_norm = norm && (grad_x_ || grad_gamma_ || grad_beta_);
    const bool x_read = grad_down_ || past_norm;

    f_.x = view(x_), f_.residual = view(residual_is_x_ ? x_ : residual_);
    f_.gamma = view(gamma_), f_.beta = view(beta_);
    f_.down = view(down_), f_.down_bias = view(down_bias_);
    f_.up = view(up_), f_.up_bias = view(up_bias_);
    f_.y = view(y_), f_.h = view(h_), f_.stats = view(stats_);
    f_.scaling = scaling_, f_.eps = eps_, f_.activation = activation_, f_.norm = norm_;
    forward = pass_of(&f_, bottleneck_forward, c.threads);
    forward.numbers = {{&f_.activation, 0, 4}, {&f_.norm, 0, 2}};
    add(&forward, &f_.x, kRead);
    add(&forward, &f_.y, kWritten);
    add(&forward, &f_.down, kOperand);
    add(&forward, &f_.up, kOperand);
    add(&forward, &f_.residual, kMaybeRead);
    for (deltaops_matrix *m : {&f_.gamma, &f_.beta, &f_.down_bias, &f_.up_bias})
      add(&forward, m, kVector);
    add(&forward, &f_.h, kMaybeWritten);
    add(&forward, &f_.stats, kMaybeWritten);

    b_.grad_y = view(grad_y_), b_.x = view(x_), b_.h = view(h_), b_.stats = view(stats_);
    b_.gamma = f_.gamma, b_.beta = f_.beta, b_.down = f_.down, b_.up = f_.up;
    b_.grad_x = view(grad_x_), b_.grad_gamma = view(grad_gamma_), b_.grad_beta = view(grad_beta_);
    b_.grad_down = view(grad_down_), b_.grad_down_bias = view(grad_down_bias_);
    b_.grad_up = view(grad_up_), b_.grad_up_bias = view(grad_up_bias_);
    b_.scaling = scaling_, b_.activation = activation_, b_.norm = norm_;
    b_.residual_is_x = residual_is_x_;
    if (!x_read) b_.x = {}, b_.stats = {};
    backward = pass_of(&b_, bottleneck_backward, c.threads);
    backward.numbers = {{&b_.activation, 0, 4}, {&b_.norm, 0, 2}, {&b_.residual_is_x, 0, 1}};
    add(&backward, &b_.grad_y, kRead);
    add(&backward, &b_.h, kRead);
    add(&backward, &b_.down, kOperand);
    add(&backward, &b_.up, kOperand);
    if (x_read) add(&backward, &b_.x, kRead);
    if (x_read && norm) add(&backward, &b_.stats, kRead);
    for (deltaops_matrix *m : {&b_.gamma, &b_.beta}) add(&backward, m, kVector);
    add(&backward, &b_.grad_x, kMaybeWritten);
    for (deltaops_matrix *m : {&b_.grad_gamma, &b_.grad_beta, &b_.grad_down, &b_.grad_down_bias,
                               &b_.grad_up, &b_.grad_up_bias})
      add(&backward, m, kGradient);
  }

  void check_forward() const override {
    for (int64_t m = 0; m < c.M; ++m) {
      const Row row = norm_ ? normalized(*x_, m, norm_, eps_) : Row{};
      if (norm_) {
        check(*stats_, m, 0, row.mean, "mean");
        check(*stats_, m, 1, row.rstd, "rstd");
      }
      std::vector<Sum> act;
      for (int64_t q = 0; q < c.R; ++q) {
        Sum h = of(at(down_bias_, 0, q, 0));
        for (int64_t k = 0; k < c.K; ++k) h.add(input_of(row, m, k), down_->at(q, k));
        check(*h_, m, q, h, "h");
        act.push_back(times(activated(activation_, h), scaling_));
      }
      for (int64_t k = 0; k < c.K; ++k) {
        Sum y = of(at(up_bias_, 0, k, 0));
        y.add(at(residual_is_x_ ? x_ : residual_, m, k, 0), 1);
        for (int64_t q = 0; q < c.R; ++q) y.add(act[static_cast<size_t>(q)], up_->at(k, q));
        check(*y_, m, k, y, "y");
      }
    }
  }

  void check_backward() const override {
    const auto zeros = [](int64_t n) { return std::vector<Sum>(static_cast<size_t>(n)); };
    std::vector<Sum> gamma = zeros(c.K), beta = zeros(c.K), down_bias = zeros(c.R),
                     up_bias = zeros(c.K), down = zeros(c.R * c.K), up = zeros(c.K * c.R);
    for (int64_t m = 0; m < c.M; ++m) {
      const bool x_read = b_.x.data != nullptr || c.K == 0;
      const Row row = norm_ && x_read ? saved_row(*x_, *stats_, m) : Row{};
      std::vector<Sum> dh, dz;
      for (int64_t q = 0; q < c.R; ++q) {
        Sum sum;
        for (int64_t k = 0; k < c.K; ++k) sum.add(grad_y_->at(m, k), up_->at(k, q));
        const double h = h_->at(m, q);
        dh.push_back(times(times(sum, scaling_), slope(activation_, h)));
        down_bias[static_cast<size_t>(q)].add(dh.back(), 1);
        for (int64_t k = 0; k < c.K; ++k) {
          const auto at_qk = static_cast<size_t>(q * c.K + k);
          if (x_read) down[at_qk].add(times(dh.back(), input_of(row, m, k)), 1);
          up[static_cast<size_t>(k * c.R + q)].add(times(activated(activation_, h), scaling_),
                                                   grad_y_->at(m, k));
        }
      }
      for (int64_t k = 0; k < c.K; ++k) {
        Sum sum;
        for (int64_t q = 0; q < c.R; ++q) sum.add(dh[static_cast<size_t>(q)], down_->at(q, k));
        dz.push_back(sum);
        up_bias[static_cast<size_t>(k)].add(grad_y_->at(m, k), 1);
        beta[static_cast<size_t>(k)].add(sum, 1);
        if (norm_ && x_read)
          gamma[static_cast<size_t>(k)].add(times(sum, row.n[static_cast<size_t>(k)]), 1);
      }
      if (grad_x_) {
        std::vector<Sum> dx = norm_ ? norm_backward(row, dz, gamma_, norm_) : dz;
        for (int64_t k = 0; k < c.K; ++k) {
          Sum &sum = dx[static_cast<size_t>(k)];
          if (residual_is_x_) sum.add(grad_y_->at(m, k), 1);
          check(*grad_x_, m, k, sum, "grad_x");
        }
      }
    }
    const auto all = [this](const Array *got, const std::vector<Sum> &want, const char *what) {
      for (size_t i = 0; got && i < want.size(); ++i)
        check(*got, static_cast<int64_t>(i) / got->cols(), static_cast<int64_t>(i) % got->cols(),
              want[i], what);
    };
    all(grad_gamma_, gamma, "grad_gamma"), all(grad_beta_, beta, "grad_beta");
    all(grad_down_, down, "grad_down"), all(grad_down_bias_, down_bias, "grad_down_bias");
    all(grad_up_, up, "grad_up"), all(grad_up_bias_, up_bias, "grad_up_bias");
  }

 private:
  // What Down multiplies: x, or n * gamma + beta.
  Sum input_of(const Row &row, int64_t m, int64_t k) const {
    if (!norm_) return of(x_->at(m, k));
    return plus(times(row.n[static_cast<size_t>(k)], at(gamma_, 0, k, 1)), of(at(beta_, 0, k, 0)));
  }

  static constexpr float scaling_ = 0.75f, eps_ = 1e-3f;
  int32_t norm_, activation_;
  bool residual_is_x_;
  Array *x_ = nullptr, *residual_ = nullptr, *gamma_ = nullptr, *beta_ = nullptr, *down_ = nullptr,
        *down_bias_ = nullptr, *up_ = nullptr, *up_bias_ = nullptr, *y_ = nullptr, *h_ = nullptr,
        *stats_ = nullptr, *grad_y_ = nullptr, *grad_x_ = nullptr, *grad_gamma_ = nullptr,
        *grad_beta_ = nullptr, *grad_down_ = nullptr, *grad_down_bias_ = nullptr,
        *grad_up_ = nullptr, *grad_up_bias_ = nullptr;
  deltaops_bottleneck_forward_args f_ = {};
  deltaops_bottleneck_backward_args b_ = {};
};

// --------------------------------------------------------------------------------- norm_bias

deltaops_status norm_bias_forward(const void *args) {
  return deltaops_cpu_norm_bias_forward(static_cast<const deltaops_norm_bias_forward_args *>(args));
}
deltaops_status norm_bias_backward(const void *args) {
  return deltaops_cpu_norm_bias_backward(
      static_cast<const deltaops_norm_bias_backward_args *>(args));
}

class NormBias final : public Op {
 public:
  explicit NormBias(const OpCase &given) : Op(given) {
    const int64_t M = c.M, K = c.K;
    const int dtype = any_dtype();
    norm_ = static_cast<int32_t>(rng_.below(3));
    const bool norm = norm_ != DELTAOPS_NO_NORM;
    x_ = input(M, K, dtype);
    if (wanted()) gamma_ = input(1, K, any_dtype());
    if (wanted()) bias_ = input(1, K, any_dtype());
    y_ = output(M, K, dtype);
    if (norm) stats_ = saved(M, 2);
    grad_y_ = input(M, K, dtype);
    if (wanted()) grad_x_ = output(M, K, dtype);
    if (wanted()) grad_gamma_ = output(1, K, any_dtype());
    if (wanted()) grad_bias_ = output(1, K, any_dtype());
    x_read_ = grad_gamma_ || (norm && grad_x_);

    f_.x = view(x_), f_.gamma = view(gamma_), f_.bias = view(bias_);
    f_.y = view(y_), f_.stats = view(stats_);
    f_.eps = eps_, f_.norm = norm_;
    forward = pass_of(&f_, norm_bias_forward, c.threads);
    forward.numbers = {{&f_.norm, 0, 2}};
    add(&forward, &f_.x, kRead);
    add(&forward, &f_.y, kWritten);
    add(&forward, &f_.gamma, kVector);
    add(&forward, &f_.bias, kVector);
    if (norm) add(&forward, &f_.stats, kMaybeWritten);

    b_.grad_y = view(grad_y_), b_.gamma = f_.gamma;
    if (x_read_) b_.x = f_.x, b_.stats = f_.stats;
    b_.grad_x = view(grad_x_), b_.grad_gamma = view(grad_gamma_), b_.grad_bias = view(grad_bias_);
    b_.norm = norm_;
    backward = pass_of(&b_, norm_bias_backward, c.threads);
    backward.numbers = {{&b_.norm, 0, 2}, {&b_.reserved, 0, 0}};
    add(&backward, &b_.grad_y, kRead);
    if (x_read_) add(&backward, &b_.x, kRead);
    if (x_read_ && norm) add(&backward, &b_.stats, kRead);
    add(&backward, &b_.gamma, kVector);
    add(&backward, &b_.grad_x, kMaybeWritten);
    add(&backward, &b_.grad_gamma, kGradient);
    add(&backward, &b_.grad_bias, kGradient);
  }

  void check_forward() const override {
    for (int64_t m = 0; m < c.M; ++m) {
      const Row row = norm_ ? normalized(*x_, m, norm_, eps_) : Row{};
      if (norm_) {
        check(*stats_, m, 0, row.mean, "mean");
        check(*stats_, m, 1, row.rstd, "rstd");
      }
      for (int64_t k = 0; k < c.K; ++k)
        check(*y_, m, k, plus(times(n(row, m, k), at(gamma_, 0, k, 1)), of(at(bias_, 0, k, 0))),
              "y");
    }
  }

  void check_backward() const override {
    std::vector<Sum> gamma(static_cast<size_t>(c.K)), bias(static_cast<size_t>(c.K));
    for (int64_t m = 0; m < c.M; ++m) {
      std::vector<Sum> dy;
      const Row row = x_read_ && norm_ ? saved_row(*x_, *stats_, m) : Row{};
      for (int64_t k = 0; k < c.K; ++k) {
        const auto i = static_cast<size_t>(k);
        dy.push_back(of(grad_y_->at(m, k)));
        if (x_read_) gamma[i].add(times(dy[i], n(row, m, k)), 1);
        bias[i].add(dy[i], 1);
      }
      if (!grad_x_) continue;
      if (norm_) dy = norm_backward(row, dy, gamma_, norm_);
      for (int64_t k = 0; k < c.K; ++k) {
        const Sum &dx = dy[static_cast<size_t>(k)];
        check(*grad_x_, m, k, norm_ ? dx : times(dx, at(gamma_, 0, k, 1)), "grad_x");
      }
    }
    for (int64_t k = 0; k < c.K; ++k) {
      if (grad_gamma_) check(*grad_gamma_, 0, k, gamma[static_cast<size_t>(k)], "grad_gamma");
      if (grad_bias_) check(*grad_bias_, 0, k, bias[static_cast<size_t>(k)], "grad_bias");
    }
  }

 private:
  // What gamma multiplies.
  Sum n(const Row &row, int64_t m, int64_t k) const {
    return norm_ ? row.n[static_cast<size_t>(k)] : of(x_->at(m, k));
  }

  static constexpr float eps_ = 1e-5f;
  int32_t norm_;
  bool x_read_;
  Array *x_ = nullptr, *gamma_ = nullptr, *bias_ = nullptr, *y_ = nullptr, *stats_ = nullptr,
        *grad_y_ = nullptr, *grad_x_ = nullptr, *grad_gamma_ = nullptr, *grad_bias_ = nullptr;
  deltaops_norm_bias_forward_args f_ = {};
  deltaops_norm_bias_backward_args b_ = {};
};

// ----------------------------------------------------------------------------- cross_entropy

deltaops_status cross_entropy_forward(const void *args) {
  return deltaops_cpu_cross_entropy_forward(
      static_cast<const deltaops_cross_entropy_forward_args *>(args));
}
deltaops_status cross_entropy_backward(const void *args) {
  return deltaops_cpu_cross_entropy_backward(
      static_cast<const deltaops_cross_entropy_backward_args *>(args));
}

class CrossEntropy final : public Op {
 public:
  explicit CrossEntropy(const OpCase &given) : Op(given) {
    const int64_t M = c.M, V = c.K;
    const int dtype = any_dtype();
    const int32_t reduction = static_cast<int32_t>(rng_.below(2));
    ignored = rng_.one_in(3) && V > 0 ? rng_.below(V) : -100;
    for (int64_t m = 0; m < M; ++m) {
      const bool skip = V == 0 || rng_.one_in(5);
      targets.push_back(skip ? ignored : rng_.below(V));
      counted_ += targets.back() != ignored;
    }
    targets_before_ = targets;
    x_ = input(M, V, dtype);
    x_->fill(&rng_, 12);
    state_ = saved(M, 2, true);
    loss_ = output(1, 1, DELTAOPS_F32);
    grad_loss_ = input(1, 1, DELTAOPS_F32);
    grad_x_ = output(M, V, dtype);
    mean_ = reduction == DELTAOPS_MEAN;

    f_.logits = view(x_), f_.target = targets.data(), f_.ignore_index = ignored;
    f_.reduction = reduction, f_.state = view(state_);
    f_.loss = static_cast<float *>(loss_->matrix().data);
    forward = pass_of(&f_, cross_entropy_forward, c.threads);
    forward.numbers = {{&f_.reduction, 0, 1}, {&f_.reserved, 0, 0}};
    add(&forward, &f_.logits, kRead);
    add(&forward, &f_.state, {nullptr, true, true, false, true, false});
    forward.pointers = {{&f_.loss, true}};
    if (M > 0) forward.pointers.push_back({&f_.target, false});

    b_.logits = f_.logits, b_.target = f_.target, b_.ignore_index = ignored;
    b_.reduction = reduction, b_.state = f_.state, b_.grad_logits = view(grad_x_);
    b_.grad_loss = static_cast<const float *>(grad_loss_->matrix().data);
    backward = pass_of(&b_, cross_entropy_backward, c.threads);
    backward.numbers = {{&b_.reduction, 0, 1}, {&b_.reserved, 0, 0}};
    add(&backward, &b_.logits, kRead);
    add(&backward, &b_.state, {nullptr, false, true, false, true, false});
    add(&backward, &b_.grad_logits, kWritten);
    backward.pointers = {{&b_.grad_loss, false}};
    if (M > 0) backward.pointers.push_back({&b_.target, false});
  }

  void check_forward() const override {
    Sum loss;
    for (int64_t m = 0; m < c.M; ++m) {
      const int64_t target = targets[static_cast<size_t>(m)];
      if (target == ignored) continue;
      double top = -INFINITY;
      Sum sum;
      for (int64_t v = 0; v < c.K; ++v) top = std::max(top, x_->at(m, v));
      for (int64_t v = 0; v < c.K; ++v) {
        const double p = std::exp(x_->at(m, v) - top);
        sum = plus(sum, {p, p * (1 + std::fabs(x_->at(m, v)) + std::fabs(top))});
      }
      check(*state_, m, 0, of(top), "maximum");
      check(*state_, m, 1, {1 / sum.value, sum.size / (sum.value * sum.value)}, "1 / sum");
      const double log = std::log(sum.value);
      const Sum row = {log, std::fabs(log) + sum.size / sum.value};
      loss = plus(loss, plus(row, plus(of(top), of(-x_->at(m, target)))));
    }
    if (mean_ && counted_ == 0) return;  // NaN: another test's
    check(*loss_, 0, 0, times(loss, mean_ ? 1.0 / static_cast<double>(counted_) : 1), "loss");
  }

  void check_backward() const override {
    const double g = grad_loss_->at(0, 0) / (mean_ ? static_cast<double>(counted_) : 1);
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t v = 0; v < c.K; ++v) {
        const int64_t target = targets[static_cast<size_t>(m)];
        const double x = x_->at(m, v), top = state_->at(m, 0);
        const double p = std::exp(x - top) * state_->at(m, 1);
        Sum want = {p, p * (1 + std::fabs(x) + std::fabs(top))};
        if (v == target) want = plus(want, of(-1));
        if (target == ignored) want = {};
        check(*grad_x_, m, v, target == ignored ? want : times(want, g), "grad_logits");
      }
  }

 private:
  bool mean_;
  int64_t counted_ = 0;
  Array *x_ = nullptr, *state_ = nullptr, *loss_ = nullptr, *grad_loss_ = nullptr,
        *grad_x_ = nullptr;
  deltaops_cross_entropy_forward_args f_ = {};
  deltaops_cross_entropy_backward_args b_ = {};
};

// ------------------------------------------------------------------------------------- gated

deltaops_status gated_forward(const void *args) {
  return deltaops_cpu_gated_forward(static_cast<const deltaops_gated_forward_args *>(args));
}
deltaops_status gated_backward(const void *args) {
  return deltaops_cpu_gated_backward(static_cast<const deltaops_gated_backward_args *>(args));
}

class Gated final : public Op {
 public:
  explicit Gated(const OpCase &given) : Op(given) {
    const int64_t M = c.M, K = c.K;
    const int dtype = any_dtype();
    activation_ = static_cast<int32_t>(rng_.below(5));
    gate_ = input(M, K, dtype);
    gate_->fill(&rng_, 6);
    const bool alone = rng_.one_in(4);  // the activation, without up
    if (!alone) up_ = input(M, K, dtype);
    y_ = output(M, K, dtype);
    grad_y_ = input(M, K, dtype);
    if (wanted()) grad_gate_ = output(M, K, dtype);
    if (!alone && wanted()) grad_up_ = output(M, K, dtype);

    f_.gate = view(gate_), f_.up = view(up_), f_.y = view(y_);
    f_.activation = activation_;
    forward = pass_of(&f_, gated_forward, c.threads);
    forward.numbers = {{&f_.activation, 0, 4}, {&f_.reserved, 0, 0}};
    add(&forward, &f_.gate, kRead);
    if (up_) add(&forward, &f_.up, kRead);
    add(&forward, &f_.y, kWritten);

    b_.grad_y = view(grad_y_), b_.gate = f_.gate;
    if (grad_gate_) b_.up = f_.up;
    b_.grad_gate = view(grad_gate_), b_.grad_up = view(grad_up_);
    b_.activation = activation_;
    backward = pass_of(&b_, gated_backward, c.threads);
    backward.numbers = {{&b_.activation, 0, 4}, {&b_.reserved, 0, 0}};
    add(&backward, &b_.grad_y, kRead);
    add(&backward, &b_.gate, kRead);
    if (grad_gate_ && up_) add(&backward, &b_.up, kRead);
    add(&backward, &b_.grad_gate, kMaybeWritten);
    add(&backward, &b_.grad_up, kMaybeWritten);
  }

  void check_forward() const override {
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t k = 0; k < c.K; ++k)
        check(*y_, m, k, times(activated(activation_, gate_->at(m, k)), at(up_, m, k, 1)), "y");
  }

  void check_backward() const override {
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t k = 0; k < c.K; ++k) {
        const double gate = gate_->at(m, k), dy = grad_y_->at(m, k);
        if (grad_up_) check(*grad_up_, m, k, times(activated(activation_, gate), dy), "grad_up");
        if (grad_gate_)
          check(*grad_gate_, m, k, times(times(slope(activation_, gate), at(up_, m, k, 1)), dy),
                "grad_gate");
      }
  }

 private:
  int32_t activation_;
  Array *gate_ = nullptr, *up_ = nullptr, *y_ = nullptr, *grad_y_ = nullptr, *grad_gate_ = nullptr,
        *grad_up_ = nullptr;
  deltaops_gated_forward_args f_ = {};
  deltaops_gated_backward_args b_ = {};
};

}  // namespace

std::unique_ptr<Op> make(const OpCase &c) {
  switch (c.kind) {
    case Kind::kBottleneck:
      return std::make_unique<Bottleneck>(c);
    case Kind::kNormBias:
      return std::make_unique<NormBias>(c);
    case Kind::kCrossEntropy:
      return std::make_unique<CrossEntropy>(c);
    case Kind::kGated:
      return std::make_unique<Gated>(c);
    case Kind::kRotary:
      return make_rotary(c);
    default:
      return make_attention(c);
  }
}

}  // namespace test
