// xla_delta_linear.cpp: delta_linear for XLA's CPU client: one layer, or several of the same x.
//
// Operands come in the order of the functions' comments; deltaops/bindings/jax/layers.py
// builds them, and has checked shapes and dtypes.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

// Which operands of a layer there are, as bits of a number; x has the bit of the first layer.
enum Present : int32_t { kBias = 1, kSeed = 2, kAdapter = 4, kPacked = 8, kX = 16, kS = 32 };

// One layer beside x and what both directions write: its operands and settings.
struct Layer {
  View weight, bias, s, seed, adapter, packed;
  std::vector<View> a, b, branch_bias;
  Scales scaling;
  Numbers threshold, activation;
  bool transposed;

  bool dropout() const {
    for (int32_t t : threshold)
      if (t != 0) return true;
    return false;
  }

  // Whether all elements of a batch have the same parameters.
  bool shared() const {
    for (const View &v : {weight, bias, packed})
      if (v && !v.shared()) return false;
    for (const auto *views : {&a, &b, &branch_bias})
      for (const View &v : *views)
        if (!v.shared()) return false;
    return true;
  }

  std::vector<deltaops_branch> branches(const Item &item) const {
    std::vector<deltaops_branch> made(a.size());
    for (size_t i = 0; i < a.size(); ++i)
      made[i] = {item.matrix(a[i]),
                 item.matrix(b[i]),
                 branch_bias.empty() ? deltaops_matrix{} : item.row(branch_bias[i]),
                 scaling[i],
                 static_cast<uint32_t>(threshold[i]),
                 static_cast<uint32_t>(i),
                 activation[i]};
    return made;
  }

  // What both directions take; `made` is held by the caller.
  template <class Args>
  void fill(const Item &item, const std::vector<deltaops_branch> &made, int32_t num_threads,
            Args *call) const {
    call->struct_size = sizeof *call;
    call->num_threads = num_threads;
    call->weight = transposed ? item.transposed(weight) : item.matrix(weight);
    call->s = item.matrix(s);
    call->branches = made.data();
    call->num_branches = static_cast<int32_t>(made.size());
    call->seed = seed_of(item, seed);
    call->packed_weight = item.pointer(packed);
    call->packed_bytes = packed ? packed.elements : 0;
    call->adapter = static_cast<const int32_t *>(item.pointer(adapter));
  }
};

// Those of all layers: one number a layer, and one a branch, layer after layer.
struct Settings {
  Numbers present, transposed, counts;
  Scales scaling;
  Numbers threshold, activation;

  size_t layers() const { return counts.size(); }
  size_t count(size_t i) const { return static_cast<size_t>(counts[i]); }

  bool fit() const {
    size_t branches = 0;
    for (int32_t n : counts) {
      if (n < 0) return false;
      branches += static_cast<size_t>(n);
    }
    return counts.size() > 0 && present.size() == counts.size() &&
           transposed.size() == counts.size() && scaling.size() == branches &&
           threshold.size() == branches && activation.size() == branches;
  }

  // Without operands; its first branch is the at-th of all.
  Layer layer(size_t i, size_t at) const {
    Layer made = {};
    made.scaling = {scaling.begin() + at, count(i)};
    made.threshold = {threshold.begin() + at, count(i)};
    made.activation = {activation.begin() + at, count(i)};
    made.transposed = transposed[i] != 0;
    return made;
  }
};

constexpr char kMisfit[] = "delta_linear: settings must be one a layer and one a branch.";

// The batch as so many more rows, where its elements share everything but them: their result is
// the same, since no mask depends on the number of the row.
bool foldable(const Buffers &buffers, const std::vector<Layer> &layers, const View &x) {
  if (buffers.count() < 2) return false;
  const auto whole = [&](const View &v) {
    for (size_t i = 0; v && i < v.lead; ++i)
      if (v.dims[i] != buffers.batch()[i]) return false;
    return true;
  };
  for (const Layer &layer : layers)
    if (layer.dropout() || !layer.shared() || !whole(layer.adapter)) return false;
  return whole(x);
}

// x, each layer's weight, [bias], [seed], [adapter], [packed], a..., b..., bias... -> each y, each
// [s]
ffi::Error forward(ffi::RemainingArgs args, ffi::RemainingRets rets, Numbers present,
                   Numbers transposed, Numbers counts, Scales scaling, Numbers threshold,
                   Numbers activation, Numbers biased, int32_t num_threads) {
  Buffers buffers(args, rets);
  const Settings settings = {present, transposed, counts, scaling, threshold, activation};
  buffers.expect(settings.fit() && biased.size() == scaling.size(), kMisfit);
  if (!buffers.error().success()) return buffers.error();
  const View x = buffers.operand(2);
  std::vector<Layer> layers;
  size_t at = 0;
  for (size_t i = 0; i < settings.layers(); ++i) {
    Layer layer = settings.layer(i, at);
    layer.weight = buffers.operand(2);
    layer.bias = buffers.operand(1, present[i] & kBias);
    layer.seed = buffers.operand(1, present[i] & kSeed);
    layer.adapter = buffers.operand(1, present[i] & kAdapter);
    layer.packed = buffers.operand(1, present[i] & kPacked);
    layer.a = buffers.operands(settings.count(i), 2);
    layer.b = buffers.operands(settings.count(i), 2);
    for (size_t j = 0; j < settings.count(i); ++j)
      layer.branch_bias.push_back(buffers.operand(1, biased[at + j] != 0));
    at += settings.count(i);
    layers.push_back(std::move(layer));
  }
  std::vector<View> y(layers.size());
  for (View &one : y) one = buffers.result(2);
  for (size_t i = 0; i < layers.size(); ++i) layers[i].s = buffers.result(2, present[i] & kS);
  if (!buffers.error().success()) return buffers.error();

  const auto call = [&](const Item &item, int64_t repeats) {
    std::vector<std::vector<deltaops_branch>> made(layers.size());
    std::vector<deltaops_delta_linear_forward_args> calls(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      made[i] = layers[i].branches(item);
      layers[i].fill(item, made[i], num_threads, &calls[i]);
      calls[i].x = item.matrix(x);
      calls[i].bias = item.row(layers[i].bias);
      calls[i].y = item.matrix(y[i]);
      for (deltaops_matrix *rows : {&calls[i].x, &calls[i].y, &calls[i].s}) rows->rows *= repeats;
    }
    if (calls.size() == 1) return deltaops_cpu_delta_linear_forward(calls.data());
    return deltaops_cpu_delta_linear_group_forward(calls.data(),
                                                   static_cast<int32_t>(calls.size()));
  };
  if (foldable(buffers, layers, x)) {
    const deltaops_status status = call(Item(buffers.batch(), 0), buffers.count());
    return error_of(status, deltaops_last_error());
  }
  return for_each_item(buffers, [&](const Item &item) { return call(item, 1); });
}

// each grad_y, [x], each layer's weight, [s], [seed], [adapter], [packed], a..., b... -> the wanted
// ones of x and of each layer's bias, a..., b..., bias...
ffi::Error backward(ffi::RemainingArgs args, ffi::RemainingRets rets, Numbers present,
                    Numbers transposed, Numbers counts, Scales scaling, Numbers threshold,
                    Numbers activation, Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const Settings settings = {present, transposed, counts, scaling, threshold, activation};
  buffers.expect(settings.fit() && wanted.size() == 1 + settings.layers() + 3 * scaling.size(),
                 kMisfit);
  if (!buffers.error().success()) return buffers.error();
  const std::vector<View> grad_y = buffers.operands(settings.layers(), 2);
  const View x = buffers.operand(2, present[0] & kX);
  std::vector<Layer> layers;
  size_t at = 0;
  for (size_t i = 0; i < settings.layers(); ++i) {
    Layer layer = settings.layer(i, at);
    layer.weight = buffers.operand(2);
    layer.s = buffers.operand(2, present[i] & kS);
    layer.seed = buffers.operand(1, present[i] & kSeed);
    layer.adapter = buffers.operand(1, present[i] & kAdapter);
    layer.packed = buffers.operand(1, present[i] & kPacked);
    layer.a = buffers.operands(settings.count(i), 2);
    layer.b = buffers.operands(settings.count(i), 2);
    at += settings.count(i);
    layers.push_back(std::move(layer));
  }
  const View grad_x = buffers.result(2, wanted[0] != 0);
  std::vector<std::vector<View>> grads(layers.size());  // of bias, a..., b..., bias...
  size_t next = 1;
  for (size_t i = 0; i < layers.size(); ++i)
    for (size_t j = 0, count = settings.count(i); j < 1 + 3 * count; ++j) {
      const bool vector = j == 0 || j > 2 * count;
      grads[i].push_back(buffers.result(vector ? 1 : 2, wanted[next++] != 0));
    }
  return for_each_item(buffers, [&](const Item &item) {
    std::vector<std::vector<deltaops_branch>> made(layers.size());
    std::vector<std::vector<deltaops_matrix>> into(layers.size());
    std::vector<deltaops_delta_linear_backward_args> calls(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      const size_t count = settings.count(i);
      made[i] = layers[i].branches(item);
      layers[i].fill(item, made[i], num_threads, &calls[i]);
      for (size_t j = 1; j <= 3 * count; ++j)
        into[i].push_back(j > 2 * count ? item.row(grads[i][j]) : item.matrix(grads[i][j]));
      calls[i].grad_y = item.matrix(grad_y[i]);
      calls[i].x = item.matrix(x);
      if (i == 0) calls[i].grad_x = item.matrix(grad_x);
      calls[i].grad_bias = item.row(grads[i][0]);
      calls[i].grad_a = into[i].data();
      calls[i].grad_b = into[i].data() + count;
      calls[i].grad_branch_bias = into[i].data() + 2 * count;
    }
    if (calls.size() == 1) return deltaops_cpu_delta_linear_backward(calls.data());
    return deltaops_cpu_delta_linear_group_backward(calls.data(),
                                                    static_cast<int32_t>(calls.size()));
  });
}

}  // namespace

void add_delta_linear(Targets *targets) {
  add<forward>(targets, "delta_linear_forward", "present", "transposed", "counts", "scaling",
               "threshold", "activation", "biased", "num_threads");
  add<backward>(targets, "delta_linear_backward", "present", "transposed", "counts", "scaling",
                "threshold", "activation", "wanted", "num_threads");
}

}  // namespace deltaops_bindings
