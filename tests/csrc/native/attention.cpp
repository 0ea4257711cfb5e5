// attention.cpp: random calls of attention, most of them with a prefix, against double.
//
// Every tensor has memory of its own that ends where its last element does, so that sanitizers see
// what is read beside it, and teams of one to three threads share the work.

#include "layer.h"

namespace test {
namespace {

struct Sizes {
  int64_t B, group, Hkv, Lq, Lk, D, P;
  int dtype, prefix;  // dtypes
  bool causal;
  int threads;
  int64_t H() const { return group * Hkv; }
  std::string name() const {
    const auto size = [](int64_t n) { return std::to_string(n) + " "; };
    return "attention " + size(B) + size(H()) + size(Hkv) + size(Lq) + size(Lk) + size(D) + "P " +
           size(P) + (causal ? "causal " : "") + "dtypes " + size(dtype) + size(prefix) +
           "threads " + std::to_string(threads);
  }
};

Sizes random_sizes(Rng *rng) {
  Sizes s = {};
  s.B = rng->below(4), s.group = 1 + rng->below(3), s.Hkv = 1 + rng->below(3);
  s.Lq = rng->below(rng->one_in(4) ? 130 : 20), s.Lk = rng->below(rng->one_in(4) ? 150 : 30);
  s.D = 1 + rng->below(20);
  s.P = rng->one_in(4) ? 0 : rng->below(rng->one_in(4) ? 140 : 20);
  s.dtype = static_cast<int>(rng->below(2)), s.prefix = static_cast<int>(rng->below(2));
  s.causal = rng->one_in(2);
  if (s.causal) s.Lk = s.Lq;
  s.threads = 1 + static_cast<int>(rng->below(3));
  return s;
}

// [B, L, H, D] in memory, tokens sometimes apart.
class Heads {
 public:
  Heads(int64_t B, int64_t H, int64_t L, int64_t D, int dtype, Rng *rng)
      : L_(L),
        D_(D),
        all_(B * L, H * D, dtype, rng->one_in(2) ? Layout::kDense : Layout::kPadded, rng) {}
  deltaops_heads view() const {
    const deltaops_matrix &m = all_.matrix();
    return {m.data, {L_ * m.row_stride, D_, m.row_stride}};
  }
  double at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return all_.at(b * L_ + i, h * D_ + d);
  }
  void check(int64_t b, int64_t h, int64_t i, int64_t d, Sum want, const char *what,
             const std::string &name) const {
    check_value(all_, b * L_ + i, h * D_ + d, want, what, name);
  }
  Array *operator->() { return &all_; }

 private:
  int64_t L_, D_;
  Array all_;
};

using Table = std::vector<Sum>;  // [rows][D]

class Attention {
 public:
  Attention(const Sizes &sizes, Rng *rng)
      : s(sizes),
        q(s.B, s.H(), s.Lq, s.D, s.dtype, rng),
        k(s.B, s.Hkv, s.Lk, s.D, s.dtype, rng),
        v(s.B, s.Hkv, s.Lk, s.D, s.dtype, rng),
        dy(s.B, s.H(), s.Lq, s.D, s.dtype, rng),
        pk(1, s.Hkv, s.P, s.D, s.prefix, rng),
        pv(1, s.Hkv, s.P, s.D, s.prefix, rng),
        y(s.B, s.H(), s.Lq, s.D, s.dtype, rng),
        dq(s.B, s.H(), s.Lq, s.D, s.dtype, rng),
        dk(s.B, s.Hkv, s.Lk, s.D, s.dtype, rng),
        dv(s.B, s.Hkv, s.Lk, s.D, s.dtype, rng),
        dpk(1, s.Hkv, s.P, s.D, s.prefix, rng),
        dpv(1, s.Hkv, s.P, s.D, s.prefix, rng),
        lse(s.B * s.H(), s.Lq, DELTAOPS_F32, Layout::kDense, rng),
        scale(static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)))),
        way(static_cast<int>(rng->below(3))) {
    for (Heads *t : {&q, &k, &v, &dy, &pk, &pv}) (*t)->fill(rng);
    const int64_t each = way == 1 ? s.Lq * s.Lk : s.Lq;  // one byte for each key, or for all
    mask.reset(new uint8_t[static_cast<size_t>(s.B * each)]);
    for (int64_t i = 0; i < s.B * each; ++i) mask[static_cast<size_t>(i)] = !rng->one_in(3);
  }

  void call(int threads) {
    deltaops_attention_forward_args f = {};
    f.struct_size = sizeof f;
    set(&f, threads);
    f.lse = static_cast<float *>(lse.matrix().data);
    CHECK(deltaops_cpu_attention_forward(&f) == DELTAOPS_OK, "%s", deltaops_last_error());
    deltaops_attention_backward_args b = {};
    b.struct_size = sizeof b;
    set(&b, threads);
    b.lse = f.lse, b.grad_y = dy.view();
    b.grad_q = dq.view(), b.grad_k = dk.view(), b.grad_v = dv.view();
    b.grad_prefix_k = dpk.view(), b.grad_prefix_v = dpv.view();
    CHECK(deltaops_cpu_attention_backward(&b) == DELTAOPS_OK, "%s", deltaops_last_error());
    for (Heads *t : {&q, &k, &v, &dy, &pk, &pv})
      CHECK((*t)->untouched(), "inputs written (%s)", s.name().c_str());
    for (Heads *t : outputs())
      CHECK((*t)->only_elements_changed(), "written beside the outputs (%s)", s.name().c_str());
  }

  std::string bits() {
    std::string all = lse.bits();
    for (Heads *t : outputs()) all += (*t)->bits();
    return all;
  }

  void check() {
    const auto rows = [&](int64_t count) { return Table(static_cast<size_t>(count * s.D)); };
    const int64_t keys = s.P + s.Lk;
    Table prefix_k = rows(s.Hkv * s.P), prefix_v = prefix_k;
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t kv = 0; kv < s.Hkv; ++kv) {
        Table grad_k = rows(keys), grad_v = grad_k;
        for (int64_t h = kv * s.group; h < (kv + 1) * s.group; ++h)
          for (int64_t i = 0; i < s.Lq; ++i) query(b, h, kv, i, &grad_k, &grad_v);
        for (int64_t j = 0; j < keys; ++j)
          for (int64_t d = 0; d < s.D; ++d) {
            const Sum gk = grad_k[place(j, d)], gv = grad_v[place(j, d)];
            if (j < s.P) {
              prefix_k[place(kv * s.P + j, d)].add(gk, 1);
              prefix_v[place(kv * s.P + j, d)].add(gv, 1);
            } else {
              dk.check(b, kv, j - s.P, d, gk, "grad_k", s.name());
              dv.check(b, kv, j - s.P, d, gv, "grad_v", s.name());
            }
          }
      }
    for (int64_t kv = 0; kv < s.Hkv; ++kv)
      for (int64_t j = 0; j < s.P; ++j)
        for (int64_t d = 0; d < s.D; ++d) {
          dpk.check(0, kv, j, d, prefix_k[place(kv * s.P + j, d)], "grad_prefix_k", s.name());
          dpv.check(0, kv, j, d, prefix_v[place(kv * s.P + j, d)], "grad_prefix_v", s.name());
        }
  }

  Sizes s;

 private:
  std::vector<Heads *> outputs() { return {&y, &dq, &dk, &dv, &dpk, &dpv}; }
  size_t place(int64_t row, int64_t d) const { return static_cast<size_t>(row * s.D + d); }

  template <class Args>
  void set(Args *args, int threads) {
    const int64_t sizes[] = {s.B, s.H(), s.Hkv, s.Lq, s.Lk, s.D};
    std::copy(sizes, sizes + 6, args->sizes);
    args->num_threads = threads;
    args->q = q.view(), args->k = k.view(), args->v = v.view(), args->y = y.view();
    args->prefix_k = pk.view(), args->prefix_v = pv.view(), args->prefix_length = s.P;
    if (way > 0) args->mask = mask.get();
    const int64_t last = way == 1 ? s.Lk : 1;
    const int64_t strides[] = {s.Lq * last, 0, last, way == 1 ? 1 : 0};
    std::copy(strides, strides + 4, args->mask_strides);
    args->scale = scale, args->causal = s.causal;
    args->dtype = s.dtype, args->prefix_dtype = s.prefix;
  }

  bool sees(int64_t b, int64_t i, int64_t j) const {
    if (j < s.P) return true;
    if (s.causal && j - s.P > i) return false;
    if (way == 0) return true;
    const int64_t at = way == 1 ? (b * s.Lq + i) * s.Lk + j - s.P : b * s.Lq + i;
    return mask[static_cast<size_t>(at)] != 0;
  }
  double key(int64_t b, int64_t kv, int64_t j, int64_t d) const {
    return j < s.P ? pk.at(0, kv, j, d) : k.at(b, kv, j - s.P, d);
  }
  double value(int64_t b, int64_t kv, int64_t j, int64_t d) const {
    return j < s.P ? pv.at(0, kv, j, d) : v.at(b, kv, j - s.P, d);
  }

  // Row i of y and of the gradient of q; what it gives to the keys and the values.
  void query(int64_t b, int64_t h, int64_t kv, int64_t i, Table *grad_k, Table *grad_v) {
    const int64_t keys = s.P + s.Lk;
    std::vector<double> p(static_cast<size_t>(keys));
    double total = 0, largest = 0;
    for (int64_t j = 0; j < keys; ++j) {
      if (!sees(b, i, j)) continue;
      Sum score;
      for (int64_t d = 0; d < s.D; ++d) score.add(scale * q.at(b, h, i, d), key(b, kv, j, d));
      largest = std::max(largest, score.size);  // of at most D: the maximum need not come off
      total += p[static_cast<size_t>(j)] = std::exp(score.value);
    }
    for (double &x : p) x = total > 0 ? x / total : 0;
    const double loose = 2 + 2 * largest;  // a score's error is relative in p
    Sum delta;
    for (int64_t d = 0; d < s.D; ++d) {
      Sum sum;
      for (int64_t j = 0; j < keys; ++j) sum.add(p[static_cast<size_t>(j)], value(b, kv, j, d));
      delta.add(sum, dy.at(b, h, i, d));
      y.check(b, h, i, d, {sum.value, loose * sum.size}, "y", s.name());
    }
    // Where it is taken from y, that has been rounded.
    if (s.dtype == DELTAOPS_BF16) delta.size *= 0x1p9;
    Table grad_q(static_cast<size_t>(s.D));
    for (int64_t j = 0; j < keys; ++j) {
      const double weight = p[static_cast<size_t>(j)];
      if (weight == 0) continue;
      Sum slope;
      for (int64_t d = 0; d < s.D; ++d) slope.add(dy.at(b, h, i, d), value(b, kv, j, d));
      const Sum ds = {scale * weight * (slope.value - delta.value),
                      scale * weight * loose * (slope.size + delta.size)};
      for (int64_t d = 0; d < s.D; ++d) {
        grad_q[static_cast<size_t>(d)].add(ds, key(b, kv, j, d));
        (*grad_k)[place(j, d)].add(ds, q.at(b, h, i, d));
        (*grad_v)[place(j, d)].add({weight, loose * weight}, dy.at(b, h, i, d));
      }
    }
    for (int64_t d = 0; d < s.D; ++d)
      dq.check(b, h, i, d, grad_q[static_cast<size_t>(d)], "grad_q", s.name());
  }

  Heads q, k, v, dy, pk, pv, y, dq, dk, dv, dpk, dpv;
  Array lse;
  float scale;
  int way;  // no mask, one of all keys, one byte for them all
  std::unique_ptr<uint8_t[]> mask;
};

}  // namespace

void attentions(uint64_t seed, int64_t count) {
  Rng rng = {seed};
  for (int64_t n = 0; n < count; ++n) {
    Attention one(random_sizes(&rng), &rng);
    one.call(one.s.threads);
    one.check();
    const std::string want = one.bits();
    one.call(3);
    CHECK(one.bits() == want, "another team gave other bits (%s)", one.s.name().c_str());
  }
}

}  // namespace test
