// heads.cpp: the ops of tensors with their double references, straight from deltaops.h.

#include "ops.h"

namespace test {
namespace {

void copy_strides(const Tensor *from, int64_t *to, int count) {
  std::copy(from->strides(), from->strides() + count, to);
}

// ------------------------------------------------------------------------------------ rotary

deltaops_status rotary(const void *args) {
  return deltaops_cpu_rotary(static_cast<const deltaops_rotary_args *>(args));
}

class Rotary final : public Op {
 public:
  explicit Rotary(const OpCase &given) : Op(given) {
    B_ = c.whole ? 2 : rng_.below(4), H_ = c.whole ? 3 : c.K % 6;
    dtype_ = any_dtype();
    table_dtype_ = dtype_ == DELTAOPS_BF16 ? any_dtype() : DELTAOPS_F32;
    const int64_t all[] = {B_, H_, c.M, 2 * c.R}, table[] = {B_, 1, c.M, 2 * c.R};
    x_ = tensor(all, dtype_, Tensor::Use::kRead);
    cos_ = tensor(table, table_dtype_, Tensor::Use::kRead);
    sin_ = tensor_like(*cos_);
    y_ = tensor(all, dtype_, Tensor::Use::kWritten);
    grad_y_ = tensor(all, dtype_, Tensor::Use::kRead);
    grad_x_ = tensor(all, dtype_, Tensor::Use::kWritten);
    set(&forward, &f_, x_, y_, 0);
    set(&backward, &b_, grad_y_, grad_x_, 1);
  }

  void check_forward() const override {
    each([this](int64_t b, int64_t h, int64_t l, int64_t d) {
      const int64_t other = d < c.R ? d + c.R : d - c.R;
      Sum y;
      y.add(x_->at(b, h, l, d), cos_->at(b, 0, l, d));
      y.add(x_->at(b, h, l, other), d < c.R ? -sin_->at(b, 0, l, d) : sin_->at(b, 0, l, d));
      check(*y_, {b, h, l, d}, y, "y");
    });
  }

  void check_backward() const override {
    each([this](int64_t b, int64_t h, int64_t l, int64_t d) {
      const int64_t other = d < c.R ? d + c.R : d - c.R;
      const double sin = sin_->at(b, 0, l, other);
      Sum dx;
      dx.add(grad_y_->at(b, h, l, d), cos_->at(b, 0, l, d));
      dx.add(grad_y_->at(b, h, l, other), d < c.R ? sin : -sin);
      check(*grad_x_, {b, h, l, d}, dx, "grad_x");
    });
  }

 private:
  void set(Pass *pass, deltaops_rotary_args *args, const Tensor *x, const Tensor *y,
           int32_t back) const {
    *pass = pass_of(args, rotary, c.threads);
    std::copy(x->sizes(), x->sizes() + 4, args->sizes);
    args->x = x->data(), args->y = y->data(), args->cos = cos_->data(), args->sin = sin_->data();
    copy_strides(x, args->x_strides, 3), copy_strides(y, args->y_strides, 3);
    args->table_strides[0] = cos_->strides()[0], args->table_strides[1] = cos_->strides()[2];
    args->dtype = dtype_, args->table_dtype = table_dtype_, args->backward = back;
    pass->numbers = {{&args->dtype, 0, 1},
                     {&args->table_dtype, 0, dtype_},
                     {&args->backward, 0, 1},
                     {&args->reserved, 0, 0}};
    int64_t *const s = args->sizes, *const xs = args->x_strides, *const ys = args->y_strides,
                   *const ts = args->table_strides;
    pass->heads = {
        {{&args->x, false}, true, {s, s + 1, s + 2, s + 3}, {xs, xs + 1, xs + 2}, &args->dtype, 0},
        {{&args->y, true}, true, {s, s + 1, s + 2, s + 3}, {ys, ys + 1, ys + 2}, &args->dtype, 0}};
    for (const void **table : {&args->cos, &args->sin})
      pass->heads.push_back({{table, false},
                             H_ > 0,
                             {s, nullptr, s + 2, s + 3},
                             {ts, nullptr, ts + 1},
                             &args->table_dtype,
                             0});
    pass->sizes = {s, s + 1, s + 2, s + 3};
    pass->misfits = {[s] { s[3] = 0; }, [s] { ++s[3]; }};
  }

  template <class F>
  void each(const F &f) const {
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t h = 0; h < H_; ++h)
        for (int64_t l = 0; l < c.M; ++l)
          for (int64_t d = 0; d < 2 * c.R; ++d) f(b, h, l, d);
  }

  int64_t B_, H_;
  int dtype_, table_dtype_;
  Tensor *x_, *cos_, *sin_, *y_, *grad_y_, *grad_x_;
  deltaops_rotary_args f_ = {}, b_ = {};
};

// --------------------------------------------------------------------------------- attention

// Without tables nothing is turned.
deltaops_status attention(const deltaops_attention_forward_args *args,
                          const deltaops_rotary_tables *tables) {
  return tables ? deltaops_cpu_rotary_attention_forward(args, tables)
                : deltaops_cpu_attention_forward(args);
}
deltaops_status attention(const deltaops_attention_backward_args *args,
                          const deltaops_rotary_tables *tables) {
  return tables ? deltaops_cpu_rotary_attention_backward(args, tables)
                : deltaops_cpu_attention_backward(args);
}

class Attention final : public Op {
 public:
  explicit Attention(const OpCase &given) : Op(given) {
    const auto small = [this] { return c.whole || !rng_.one_in(15) ? 1 + rng_.below(3) : 0; };
    causal_ = rng_.one_in(3), turned_ = rng_.one_in(3);
    B_ = small(), Hkv_ = small(), group_ = 1 + rng_.below(3), H_ = Hkv_ * group_;
    Lq_ = c.M, Lk_ = causal_ || turned_ ? c.M : c.K, D_ = c.R + (turned_ ? c.R % 2 : 0);
    P_ = rng_.one_in(3) ? 0 : 1 + rng_.below(rng_.one_in(8) ? 140 : 12);
    dtype_ = any_dtype(), prefix_dtype_ = any_dtype();
    scale_ = static_cast<float>(rng_.one_in(3) ? rng_.unit() * 2 : 1 / std::sqrt(D_));
    if (turned_) angles();
    const int64_t queries[] = {B_, H_, Lq_, D_}, keys[] = {B_, Hkv_, Lk_, D_},
                  prefix[] = {1, Hkv_, P_, D_};
    q_ = tensor(queries, dtype_, Tensor::Use::kRead);
    k_ = tensor(keys, dtype_, Tensor::Use::kRead);
    v_ = tensor(keys, dtype_, Tensor::Use::kRead);
    if (P_ > 0) prefix_k_ = tensor(prefix, prefix_dtype_, Tensor::Use::kRead);
    if (P_ > 0) prefix_v_ = tensor(prefix, prefix_dtype_, Tensor::Use::kRead);
    if (rng_.one_in(2)) mask_ = mask({B_, H_, Lq_, Lk_});
    if (rng_.one_in(3)) {
      const int64_t pairs[] = {B_, H_, Lq_, Lk_};
      bias_ = tensor(pairs, DELTAOPS_F32, Tensor::Use::kMask);
      bias_->fill(&rng_);
    }
    y_ = saved_tensor(queries, dtype_);
    lse_ = saved(1, B_ * H_ * Lq_, true);
    grad_y_ = tensor(queries, dtype_, Tensor::Use::kRead);
    if (wanted(3)) grad_q_ = tensor(queries, dtype_, Tensor::Use::kWritten);
    if (wanted(3)) grad_k_ = tensor(keys, dtype_, Tensor::Use::kWritten);
    if (wanted(3)) grad_v_ = tensor(keys, dtype_, Tensor::Use::kWritten);
    if (P_ > 0 && wanted(3)) grad_prefix_k_ = tensor(prefix, prefix_dtype_, Tensor::Use::kWritten);
    if (P_ > 0 && wanted(3)) grad_prefix_v_ = tensor(prefix, prefix_dtype_, Tensor::Use::kWritten);

    forward = common(&f_);
    add(&forward, &f_.y, y_, f_.sizes, true, true);
    f_.lse = static_cast<float *>(lse_->matrix().data);
    add_lse(&forward, &f_.lse, f_.sizes, true);

    backward = common(&b_);
    add(&backward, &b_.grad_y, grad_y_, b_.sizes, true, false);
    add(&backward, &b_.y, y_, b_.sizes, true, false);
    b_.lse = static_cast<const float *>(lse_->matrix().data);
    add_lse(&backward, &b_.lse, b_.sizes, false);
    add(&backward, &b_.grad_q, grad_q_, b_.sizes, true, true);
    add(&backward, &b_.grad_k, grad_k_, b_.sizes, false, true);
    add(&backward, &b_.grad_v, grad_v_, b_.sizes, false, true);
    add_prefix(&backward, &b_.grad_prefix_k, grad_prefix_k_, &b_, true);
    add_prefix(&backward, &b_.grad_prefix_v, grad_prefix_v_, &b_, true);
  }

  void check_forward() const override {
    each_query([this](int64_t b, int64_t h, int64_t i) {
      std::vector<Sum> scores;
      double top = -INFINITY, roundings = 0;
      for (int64_t j = 0; j < keys(); ++j) {
        scores.push_back(score(b, h, i, j));
        if (!sees(b, h, i, j)) continue;
        top = std::max(top, scores.back().value);
        roundings = std::max(roundings, 1 + 2 * scores.back().size);
      }
      double sum = 0;
      std::vector<double> p;
      for (int64_t j = 0; j < keys(); ++j) {
        const bool seen = sees(b, h, i, j);
        p.push_back(seen ? std::exp(scores[static_cast<size_t>(j)].value - top) : 0);
        sum += p.back();
      }
      const int64_t row = (b * H_ + h) * Lq_ + i;
      if (sum == 0)
        CHECK(lse_->at(0, row) == INFINITY, "lse of a query that sees no key (%s)", name_.c_str());
      else
        check(*lse_, 0, row, {top + std::log(sum), std::fabs(top) + std::log(sum) + roundings},
              "lse");
      for (int64_t d = 0; d < D_; ++d) {
        Sum y;
        for (int64_t j = 0; j < keys(); ++j) {
          const double share = sum > 0 ? p[static_cast<size_t>(j)] / sum : 0;
          y.add(Sum{share, share * roundings * 2}, value(b, h / group_, j, d));
        }
        check(*y_, {b, h, i, d}, y, "y");
      }
    });
  }

  void check_backward() const override {
    const auto zeros = [this](int64_t heads, int64_t tokens) {
      return std::vector<Sum>(static_cast<size_t>(heads * tokens * D_));
    };
    std::vector<Sum> dk = zeros(B_ * Hkv_, keys()), dv = dk;
    each_query([&](int64_t b, int64_t h, int64_t i) {
      const int64_t kv = h / group_;
      const double lse = lse_->at(0, (b * H_ + h) * Lq_ + i);
      // rowsum(dY y), from the y that was saved, or what it is made of: rowsum(P dP). The second
      // knows nothing of the rounding of y.
      Sum delta;
      for (int64_t d = 0; d < D_; ++d) delta.add(grad_y_->at(b, h, i, d), y_->at(b, h, i, d));
      if (dtype_ == DELTAOPS_BF16) delta.size *= 1 + 0x1p-9 / (64 * 0x1p-24);
      std::vector<Sum> p(static_cast<size_t>(keys())), dp = p, dq(static_cast<size_t>(D_));
      for (int64_t j = 0; j < keys(); ++j) {
        if (!sees(b, h, i, j)) continue;
        const auto at = static_cast<size_t>(j);
        const Sum s = score(b, h, i, j);
        const double weight = std::exp(s.value - lse);
        p[at] = {weight, weight * (1 + 2 * s.size + std::fabs(lse))};
        for (int64_t d = 0; d < D_; ++d) dp[at].add(grad_y_->at(b, h, i, d), value(b, kv, j, d));
        delta.size += p[at].size * dp[at].size;
      }
      for (int64_t j = 0; j < keys(); ++j) {
        if (!sees(b, h, i, j)) continue;
        const auto at = static_cast<size_t>(j);
        const Sum ds = times(times(p[at], plus(dp[at], times(delta, -1))), scale_);
        for (int64_t d = 0; d < D_; ++d) {
          const size_t to = place(b, kv, j, d);
          Sum &of_query = dq[static_cast<size_t>(d)];
          of_query = plus(of_query, times(ds, key(b, kv, j, d)));
          dk[to] = plus(dk[to], times(ds, turned(*q_, b, h, i, d)));
          dv[to].add(p[at], grad_y_->at(b, h, i, d));
        }
      }
      for (int64_t d = 0; grad_q_ && d < D_; ++d)
        check(*grad_q_, {b, h, i, d},
              turned_back(b, i, d, [&](int64_t e) { return dq[static_cast<size_t>(e)]; }),
              "grad_q");
    });
    check_keys(dk, true, grad_prefix_k_, grad_k_, "grad_prefix_k", "grad_k");
    check_keys(dv, false, grad_prefix_v_, grad_v_, "grad_prefix_v", "grad_v");
  }

 private:
  // Of each token, by which queries and keys are turned.
  void angles() {
    const int32_t dtype = dtype_ == DELTAOPS_BF16 ? any_dtype() : DELTAOPS_F32;
    const int64_t table[] = {B_, 1, Lq_, D_};
    cos_ = tensor(table, dtype, Tensor::Use::kRead), sin_ = tensor_like(*cos_);
    tables_ = {cos_->data(), sin_->data(), {cos_->strides()[0], cos_->strides()[2]}, dtype, 0};
  }

  // The sizes, and what both directions read.
  template <class Args>
  Pass common(Args *args) {
    const auto call = [this](const void *given) {
      return attention(static_cast<const Args *>(given), turned_ ? &tables_ : nullptr);
    };
    Pass pass = pass_of(args, call, c.threads);
    int64_t *const s = args->sizes;
    const int64_t sizes[] = {B_, H_, Hkv_, Lq_, Lk_, D_};
    std::copy(sizes, sizes + 6, s);
    args->scale = scale_, args->causal = causal_, args->dtype = dtype_;
    pass.numbers = {{&args->causal, 0, 1}, {&args->dtype, 0, 1}, {&args->prefix_dtype, 0, 1}};
    pass.sizes = {s, s + 1, s + 2, s + 3, s + 4, s + 5};
    pass.misfits = {[s] { s[5] = 0; }, [s] { s[2] = s[1] + 2, ++s[1]; }};
    if (causal_ || turned_) pass.misfits.push_back([s] { ++s[3]; });
    if (turned_) add_tables(&pass, s);
    add(&pass, &args->q, q_, s, true, false);
    add(&pass, &args->k, k_, s, false, false);
    add(&pass, &args->v, v_, s, false, false);
    args->prefix_length = P_, args->prefix_dtype = prefix_dtype_;
    pass.sizes.push_back(&args->prefix_length);
    add_prefix(&pass, &args->prefix_k, prefix_k_, args, false);
    add_prefix(&pass, &args->prefix_v, prefix_v_, args, false);
    if (mask_) add_pairs(&pass, &args->mask, mask_, s, args->mask_strides);
    if (bias_ == nullptr) return pass;
    add_pairs(&pass, &args->bias, bias_, s, args->bias_strides);
    int64_t *const from = &args->bias_from;  // one of 0 would have columns that no field counts
    *from = P_;
    pass.misfits.push_back([from] { *from = -1; });
    return pass;
  }

  void add_tables(Pass *pass, int64_t *s) {
    pass->numbers.push_back({&tables_.dtype, 0, dtype_});
    pass->numbers.push_back({&tables_.reserved, 0, 0});
    pass->misfits.push_back([s] { ++s[5]; });
    int64_t *const strides = tables_.strides;
    for (const void **table : {&tables_.cos, &tables_.sin})
      pass->heads.push_back({{table, false},
                             H_ > 0,
                             {s, nullptr, s + 3, s + 5},
                             {strides, nullptr, strides + 1},
                             &tables_.dtype,
                             0});
  }

  template <class T>
  void add_pairs(Pass *pass, const T **field, const Tensor *tensor, int64_t *s, int64_t *strides) {
    *field = static_cast<const T *>(tensor->data());
    copy_strides(tensor, strides, 4);
    pass->misfits.push_back([strides] { strides[3] = 2; });
    pass->misfits.push_back([strides] { strides[3] = -1; });
    pass->heads.push_back({{field, false},
                           false,
                           {s, s + 1, s + 3, s + 4},
                           {strides, strides + 1, strides + 2, strides + 3},
                           nullptr,
                           sizeof(T)});
  }

  void add(Pass *pass, deltaops_heads *heads, const Tensor *tensor, int64_t *s, bool of_queries,
           bool written) {
    if (tensor == nullptr) return;
    heads->data = tensor->data();
    copy_strides(tensor, heads->strides, 3);
    pass->heads.push_back({{&heads->data, written},
                           !written || tensor == y_,
                           {s, of_queries ? s + 1 : s + 2, of_queries ? s + 3 : s + 4, s + 5},
                           {heads->strides, heads->strides + 1, heads->strides + 2},
                           &dtype_of(pass),
                           0});
  }

  template <class Args>
  void add_prefix(Pass *pass, deltaops_heads *heads, const Tensor *tensor, Args *args,
                  bool written) {
    if (tensor == nullptr) return;
    heads->data = tensor->data();
    copy_strides(tensor, heads->strides, 3);
    pass->heads.push_back({{&heads->data, written},
                           !written,
                           {nullptr, args->sizes + 2, &args->prefix_length, args->sizes + 5},
                           {nullptr, heads->strides + 1, heads->strides + 2},
                           &args->prefix_dtype,
                           0});
  }

  void add_lse(Pass *pass, void *field, int64_t *s, bool written) {
    pass->heads.push_back({{field, written}, !written, {s, s + 1, s + 3, nullptr}, {}, nullptr, 4});
  }

  const int32_t &dtype_of(const Pass *pass) const {
    return pass->args == &f_ ? f_.dtype : b_.dtype;
  }

  // Keys are counted from the first of the prefix, here and below.
  int64_t keys() const { return P_ + Lk_; }

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (j < P_) return true;
    return (!causal_ || j - P_ <= i) && (mask_ == nullptr || mask_->at(b, h, i, j - P_) != 0);
  }

  Sum key(int64_t b, int64_t kv, int64_t j, int64_t d) const {
    return j < P_ ? of(prefix_k_->at(0, kv, j, d)) : turned(*k_, b, kv, j - P_, d);
  }
  double value(int64_t b, int64_t kv, int64_t j, int64_t d) const {
    return j < P_ ? prefix_v_->at(0, kv, j, d) : v_->at(b, kv, j - P_, d);
  }

  // A query's or a key's element as scores have it.
  Sum turned(const Tensor &x, int64_t b, int64_t h, int64_t l, int64_t d) const {
    if (!turned_) return of(x.at(b, h, l, d));
    const int64_t other = d < D_ / 2 ? d + D_ / 2 : d - D_ / 2;
    const double sin = sin_->at(b, 0, l, d);
    Sum y;
    y.add(x.at(b, h, l, d), cos_->at(b, 0, l, d));
    y.add(x.at(b, h, l, other), d < D_ / 2 ? -sin : sin);
    return y;
  }

  // A gradient's element, of what was not turned yet; element e of the turned one is grad(e).
  template <class F>
  Sum turned_back(int64_t b, int64_t l, int64_t d, const F &grad) const {
    if (!turned_) return grad(d);
    const int64_t other = d < D_ / 2 ? d + D_ / 2 : d - D_ / 2;
    const double sin = sin_->at(b, 0, l, other);
    return plus(times(grad(d), cos_->at(b, 0, l, d)), times(grad(other), d < D_ / 2 ? sin : -sin));
  }

  Sum score(int64_t b, int64_t h, int64_t i, int64_t j) const {
    Sum s;
    for (int64_t d = 0; d < D_; ++d)
      s = plus(s, times(times(turned(*q_, b, h, i, d), scale_), key(b, h / group_, j, d)));
    if (bias_ && j >= P_) s.add(1, bias_->at(b, h, i, j - P_));
    return s;
  }

  // Of an element in what a gradient of all keys [B, Hkv, P + Lk, D] is gathered in.
  size_t place(int64_t b, int64_t kv, int64_t j, int64_t d) const {
    return static_cast<size_t>(((b * Hkv_ + kv) * keys() + j) * D_ + d);
  }

  // back: what `want` is of was turned, but for that of the prefix.
  void check_keys(const std::vector<Sum> &want, bool back, const Tensor *prefix, const Tensor *rest,
                  const char *prefix_name, const char *rest_name) const {
    for (int64_t kv = 0; kv < Hkv_; ++kv)
      for (int64_t j = 0; j < keys(); ++j)
        for (int64_t d = 0; d < D_; ++d) {
          Sum all;
          for (int64_t b = 0; b < B_; ++b) {
            const auto at = [&](int64_t e) { return want[place(b, kv, j, e)]; };
            if (j < P_)
              all = plus(all, at(d));
            else if (rest)
              check(*rest, {b, kv, j - P_, d}, back ? turned_back(b, j - P_, d, at) : at(d),
                    rest_name);
          }
          if (j < P_ && prefix) check(*prefix, {0, kv, j, d}, all, prefix_name);
        }
  }

  template <class F>
  void each_query(const F &f) const {
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t h = 0; h < H_; ++h)
        for (int64_t i = 0; i < Lq_; ++i) f(b, h, i);
  }

  int64_t B_, Hkv_, group_, H_, Lq_, Lk_, D_, P_;
  bool causal_, turned_;
  int dtype_, prefix_dtype_;
  float scale_;
  Tensor *q_, *k_, *v_, *y_, *grad_y_;
  Tensor *cos_ = nullptr, *sin_ = nullptr;
  Tensor *prefix_k_ = nullptr, *prefix_v_ = nullptr, *mask_ = nullptr, *bias_ = nullptr;
  Tensor *grad_q_ = nullptr, *grad_k_ = nullptr, *grad_v_ = nullptr, *grad_prefix_k_ = nullptr,
         *grad_prefix_v_ = nullptr;
  Array *lse_;
  deltaops_rotary_tables tables_ = {};
  deltaops_attention_forward_args f_ = {};
  deltaops_attention_backward_args b_ = {};
};

}  // namespace

std::unique_ptr<Op> make_rotary(const OpCase &c) { return std::make_unique<Rotary>(c); }
std::unique_ptr<Op> make_attention(const OpCase &c) { return std::make_unique<Attention>(c); }

}  // namespace test
