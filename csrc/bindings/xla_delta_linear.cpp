// xla_delta_linear.cpp: delta_linear for XLA's CPU client.
//
// Operands come in the order of the functions' comments; deltaops/bindings/jax/linear.py
// builds them, and has checked shapes and dtypes.

#include "xla_module.h"
#include "xla_views.h"

namespace deltaops_bindings {

namespace {

// The branches' settings and operands.
struct Branches {
  std::vector<View> a, b, bias;
  Scales scaling;
  Numbers threshold, activation;

  bool dropout() const {
    for (int32_t t : threshold)
      if (t != 0) return true;
    return false;
  }

  bool shared() const {
    for (const auto *views : {&a, &b, &bias})
      for (const View &v : *views)
        if (!v.shared()) return false;
    return true;
  }

  std::vector<deltaops_branch> of(const Item &item) const {
    std::vector<deltaops_branch> made(a.size());
    for (size_t i = 0; i < a.size(); ++i)
      made[i] = {item.matrix(a[i]),
                 item.matrix(b[i]),
                 bias.empty() ? deltaops_matrix{} : item.row(bias[i]),
                 scaling[i],
                 static_cast<uint32_t>(threshold[i]),
                 static_cast<uint32_t>(i),
                 activation[i]};
    return made;
  }
};

// Which operands there are, as bits of one attribute.
enum Present : int32_t { kBias = 1, kSeed = 2, kAdapter = 4, kPacked = 8, kX = 16, kS = 32 };

bool settings_fit(const Branches &branches, const Numbers &biased) {
  const size_t count = branches.scaling.size();
  return branches.threshold.size() == count && branches.activation.size() == count &&
         biased.size() == count;
}

// The batch as so many more rows, where its elements share everything but them: their result is
// the same, since no mask depends on the number of the row.
bool foldable(const Buffers &buffers, const Branches &branches, std::initializer_list<View> rows,
              std::initializer_list<View> rest) {
  if (buffers.count() < 2 || branches.dropout() || !branches.shared()) return false;
  for (const View &v : rest)
    if (v && !v.shared()) return false;
  for (const View &v : rows) {
    if (!v) continue;
    for (size_t i = 0; i < v.lead; ++i)
      if (v.dims[i] != buffers.batch()[i]) return false;
  }
  return true;
}

// x, weight, [bias], [seed], [adapter], [packed], a..., b..., bias... -> y, [s]
ffi::Error forward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                   bool transposed, Scales scaling, Numbers threshold, Numbers activation,
                   Numbers biased, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View x = buffers.operand(2), weight = buffers.operand(2);
  const View bias = buffers.operand(1, present & kBias);
  const View seed = buffers.operand(1, present & kSeed);
  const View adapter = buffers.operand(1, present & kAdapter);
  const View packed = buffers.operand(1, present & kPacked);
  Branches branches = {buffers.operands(scaling.size(), 2),
                       buffers.operands(scaling.size(), 2),
                       {},
                       scaling,
                       threshold,
                       activation};
  buffers.expect(settings_fit(branches, biased), "delta_linear: settings must be one a branch.");
  for (int32_t there : biased) branches.bias.push_back(buffers.operand(1, there != 0));
  const View y = buffers.result(2), s = buffers.result(2, present & kS);
  if (!buffers.error().success()) return buffers.error();

  const bool fold = foldable(buffers, branches, {x, y, s, adapter}, {weight, bias, packed});
  const auto call = [&](const Item &item, int64_t repeats) {
    const std::vector<deltaops_branch> made = branches.of(item);
    deltaops_delta_linear_forward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.x = item.matrix(x);
    call.weight = transposed ? item.transposed(weight) : item.matrix(weight);
    call.bias = item.row(bias);
    call.y = item.matrix(y);
    call.s = item.matrix(s);
    for (deltaops_matrix *rows : {&call.x, &call.y, &call.s}) rows->rows *= repeats;
    call.branches = made.data();
    call.num_branches = static_cast<int32_t>(made.size());
    call.seed = seed_of(item, seed);
    call.packed_weight = item.pointer(packed);
    call.packed_bytes = packed ? packed.elements : 0;
    call.adapter = static_cast<const int32_t *>(item.pointer(adapter));
    return deltaops_cpu_delta_linear_forward(&call);
  };
  if (fold) {
    const deltaops_status status = call(Item(buffers.batch(), 0), buffers.count());
    return error_of(status, deltaops_last_error());
  }
  return for_each_item(buffers, [&](const Item &item) { return call(item, 1); });
}

// grad_y, weight, [x], [s], [seed], [adapter], [packed], a..., b... -> the wanted ones of x, bias,
// a..., b..., bias...
ffi::Error backward(ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t present,
                    bool transposed, Scales scaling, Numbers threshold, Numbers activation,
                    Numbers wanted, int32_t num_threads) {
  Buffers buffers(args, rets);
  const View grad_y = buffers.operand(2), weight = buffers.operand(2);
  const View x = buffers.operand(2, present & kX), s = buffers.operand(2, present & kS);
  const View seed = buffers.operand(1, present & kSeed);
  const View adapter = buffers.operand(1, present & kAdapter);
  const View packed = buffers.operand(1, present & kPacked);
  const size_t count = scaling.size();
  const Branches branches = {
      buffers.operands(count, 2), buffers.operands(count, 2), {}, scaling, threshold, activation};
  buffers.expect(
      threshold.size() == count && activation.size() == count && wanted.size() == 2 + 3 * count,
      "delta_linear: settings must be one a branch.");
  if (!buffers.error().success()) return buffers.error();
  std::vector<View> grads(wanted.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const bool vector = i == 1 || i >= 2 + 2 * count;
    grads[i] = buffers.result(vector ? 1 : 2, wanted[i] != 0);
  }
  return for_each_item(buffers, [&](const Item &item) {
    const std::vector<deltaops_branch> made = branches.of(item);
    std::vector<deltaops_matrix> into(3 * count);
    for (size_t i = 0; i < 2 * count; ++i) into[i] = item.matrix(grads[2 + i]);
    for (size_t i = 2 * count; i < 3 * count; ++i) into[i] = item.row(grads[2 + i]);
    deltaops_delta_linear_backward_args call = {};
    call.struct_size = sizeof call;
    call.num_threads = num_threads;
    call.grad_y = item.matrix(grad_y);
    call.x = item.matrix(x);
    call.weight = transposed ? item.transposed(weight) : item.matrix(weight);
    call.s = item.matrix(s);
    call.branches = made.data();
    call.num_branches = static_cast<int32_t>(count);
    call.seed = seed_of(item, seed);
    call.grad_x = item.matrix(grads[0]);
    call.grad_bias = item.row(grads[1]);
    call.grad_a = into.data();
    call.grad_b = into.data() + count;
    call.grad_branch_bias = into.data() + 2 * count;
    call.packed_weight = item.pointer(packed);
    call.packed_bytes = packed ? packed.elements : 0;
    call.adapter = static_cast<const int32_t *>(item.pointer(adapter));
    return deltaops_cpu_delta_linear_backward(&call);
  });
}

}  // namespace

void add_delta_linear(Targets *targets) {
  add<forward>(targets, "delta_linear_forward", "present", "transposed", "scaling", "threshold",
               "activation", "biased", "num_threads");
  add<backward>(targets, "delta_linear_backward", "present", "transposed", "scaling", "threshold",
                "activation", "wanted", "num_threads");
}

}  // namespace deltaops_bindings
