// fuzz.cpp: random arguments; every call ends in a status, and a refused call writes nothing.
//
// Kinds of calls, from one deterministic stream of numbers:
//
//     valid     a random layer; OK and right
//     spoiled   the same with one to three fields made wrong, each enough by itself: refused
//     wild      fields that mostly fit together, some replaced by values that tend to break things;
//               any status, and no pointer claims more memory than is there (a lie that no check
//               can see through). How many come through is counted: a fuzz whose every call is
//               refused at the door tests nothing behind it.
//     packing   wild weights for packed_bytes, pack_weight and fingerprint
//     fixed     arguments that are wrong by themselves
//
// Compiled with DELTAOPS_LIBFUZZER and clang's -fsanitize=fuzzer, the bytes of an input replace the
// seed and the loop.

#include <algorithm>
#include <limits>

#include "layer.h"
#include "ops.h"

namespace test {
namespace {

using Forward = deltaops_delta_linear_forward_args;
using Backward = deltaops_delta_linear_backward_args;

deltaops_status call(const Forward &args) { return deltaops_cpu_delta_linear_forward(&args); }
deltaops_status call(const Backward &args) { return deltaops_cpu_delta_linear_backward(&args); }

// The matrices that a call needs; both optional and unused ones stay out.
std::vector<deltaops_matrix *> required(Forward *args) {
  return {&args->x, &args->weight, &args->y};
}
std::vector<deltaops_matrix *> required(Backward *args) {
  return {&args->grad_y, &args->weight, &args->grad_x};
}

bool has_elements(const deltaops_matrix &m) { return m.rows > 0 && m.cols > 0; }

// The matrices that a call writes, and those that it reads. The layer's lists are those of args.
using Matrices = std::vector<deltaops_matrix *>;
Matrices written(Forward *args, Layer *) { return {&args->y, &args->s}; }
Matrices read(Forward *args, Layer *layer) {
  Matrices all = {&args->x, &args->weight, &args->bias};
  for (deltaops_branch &branch : layer->branches)
    all.insert(all.end(), {&branch.a, &branch.b, &branch.bias});
  return all;
}
Matrices written(Backward *args, Layer *layer) {
  Matrices all = {&args->grad_x, &args->grad_bias};
  for (auto *list : {&layer->grad_a_list, &layer->grad_b_list, &layer->grad_branch_bias_list})
    for (deltaops_matrix &m : *list) all.push_back(&m);
  return all;
}
Matrices read(Backward *args, Layer *layer) {
  Matrices all = {&args->grad_y, &args->weight};
  for (deltaops_branch &branch : layer->branches) all.insert(all.end(), {&branch.a, &branch.b});
  if (!layer->branches.empty()) all.insert(all.end(), {&args->x, &args->s});  // else not read
  return all;
}

// The packed weight of the other direction.
void swap_packed(Forward *args, Layer *layer) {
  const Backward other = layer->backward();
  args->packed_weight = other.packed_weight, args->packed_bytes = other.packed_bytes;
}
void swap_packed(Backward *args, Layer *layer) {
  const Forward other = layer->forward();
  args->packed_weight = other.packed_weight, args->packed_bytes = other.packed_bytes;
}

// One of the lists of gradients, or a matrix in it.
bool spoil_gradients(Forward *, Layer *, Rng *) { return false; }
bool spoil_gradients(Backward *args, Layer *layer, Rng *rng) {
  const int which = static_cast<int>(rng->below(3));
  const deltaops_matrix **list = which == 0   ? &args->grad_a
                                 : which == 1 ? &args->grad_b
                                              : &args->grad_branch_bias;
  if (rng->one_in(3)) {
    *list = odd(*list);
    return true;
  }
  deltaops_matrix &m = (which == 0   ? layer->grad_a_list
                        : which == 1 ? layer->grad_b_list
                                     : layer->grad_branch_bias_list)
                           .back();
  if (m.data == nullptr) return false;
  switch (rng->below(5)) {
    case 0:
      m.data = odd(m.data);
      return true;
    case 1:
      ++(rng->one_in(2) ? m.rows : m.cols);
      return true;
    case 2:
      m.dtype = rng->one_in(2) ? 2 : -1;
      return true;
    case 3:
      if (m.rows < 2) return false;
      m.row_stride = m.cols + 1;  // contiguous is asked for
      return true;
    default:
      m.reserved = 1;
      return true;
  }
}

// Makes args wrong in the way numbered `way`; false where this layer offers no place for it.
template <class Args>
bool spoil(int way, Args *args, Layer *layer, Rng *rng) {
  const std::vector<deltaops_matrix *> all = required(args);
  deltaops_matrix *m = all[static_cast<size_t>(rng->below(static_cast<int64_t>(all.size())))];
  const int64_t sizes[] = {-1, -7, std::numeric_limits<int64_t>::min(),
                           std::numeric_limits<int64_t>::max(), (int64_t{1} << 40) + 1};
  const int64_t strides[] = {std::numeric_limits<int64_t>::max(),
                             std::numeric_limits<int64_t>::min(), int64_t{1} << 61,
                             -(int64_t{1} << 62)};
  const int32_t counts[] = {0, -1, 1025, std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
  const bool branched = !layer->branches.empty();
  switch (way) {
    case 0:
      args->struct_size = rng->one_in(2) ? 0 : static_cast<uint32_t>(sizeof *args) + 8;
      return true;
    case 1:
      args->num_threads = counts[rng->below(5)];
      return true;
    case 2:
      args->reserved = 1 + static_cast<int32_t>(rng->below(100));
      return true;
    case 3:
      m->reserved = -1;
      return true;
    case 4:
      m->dtype = rng->one_in(2) ? 2 : -1;
      return true;
    case 5:  // odd for both dtypes
      m->data = odd(m->data);
      return true;
    case 6:
      (rng->one_in(2) ? m->rows : m->cols) = sizes[rng->below(5)];
      return true;
    case 7:
      (rng->one_in(2) ? m->row_stride : m->col_stride) = strides[rng->below(4)];
      return true;
    case 8:  // no output may be absent by accident, so inputs only
      m = all[static_cast<size_t>(rng->below(2))];
      if (!has_elements(*m)) return false;
      m->data = nullptr;
      return true;
    case 9:
      if (!branched) return false;
      args->branches = nullptr;
      return true;
    case 10:
      args->num_branches = rng->one_in(2) ? -1 : std::numeric_limits<int32_t>::max();
      return true;
    case 11:
      if (!branched) return false;
      layer->branches.back().drop_threshold = 65537 + static_cast<uint32_t>(rng->below(1 << 20));
      return true;
    case 12:
      if (!branched) return false;
      layer->branches.back().activation = rng->one_in(2) ? -1 : DELTAOPS_SILU + 1;
      return true;
    case 13: {
      if (!branched) return false;
      deltaops_branch &branch = layer->branches.back();
      (rng->one_in(2) ? branch.a.rows : branch.b.cols) = rng->one_in(2) ? 0 : -3;
      return true;
    }
    case 14:
      if (!branched) return false;
      layer->branches.front().a.dtype ^= 1;  // no longer that of b
      return true;
    case 15: {  // rows that overlap in an output
      deltaops_matrix *out = all[2];
      if (out->rows < 2 || out->cols < 1) return false;
      out->row_stride = out->cols - 1 - rng->below(2);
      return true;
    }
    case 16:  // a weight without a unit stride
      if (all[1]->rows < 2 || all[1]->cols < 2) return false;
      all[1]->row_stride = 2, all[1]->col_stride = 3;
      return true;
    case 17:
      if (!branched || !has_elements(layer->branches.back().b)) return false;
      layer->branches.back().b.data = nullptr;
      return true;
    case 18:  // an odd address for the list itself
      if (!branched) return false;
      args->branches = odd(args->branches);
      return true;
    case 19: {
      if (!branched) return false;
      deltaops_matrix &bias = layer->branches.back().bias;
      if (bias.data == nullptr) return false;
      const int64_t kind = rng->below(4);
      if (kind == 0) bias.data = odd(bias.data);
      if (kind == 1) bias.dtype ^= 1;  // no longer that of a and b
      if (kind == 2) ++bias.cols;
      if (kind == 3) bias.rows = 2;
      return true;
    }
    case 20: {
      Matrices outputs = written(args, layer), others = read(args, layer);
      others.insert(others.end(), outputs.begin(), outputs.end());
      const auto any = [rng](const Matrices &list) {
        return list[static_cast<size_t>(rng->below(static_cast<int64_t>(list.size())))];
      };
      deltaops_matrix *output = any(outputs), *other = any(others);
      if (output == other || !output->data || !other->data) return false;
      if (!has_elements(*output) || !has_elements(*other)) return false;
      output->data = other->data;
      return true;
    }
    case 21:
      return branched && spoil_gradients(args, layer, rng);
    case 22:
      if (args->packed_weight == nullptr) return false;
      static_cast<unsigned char *>(const_cast<void *>(args->packed_weight))[rng->below(64)] ^=
          static_cast<unsigned char>(1 << rng->below(8));
      return true;
    case 23: {
      const int64_t packed = args->packed_bytes;
      const int64_t wrong[] = {packed + 4, packed - 4, -1, std::numeric_limits<int64_t>::min(),
                               std::numeric_limits<int64_t>::max()};
      args->packed_bytes = wrong[rng->below(5)];
      return true;
    }
    case 24:
      if (args->packed_weight == nullptr) return false;
      args->packed_weight = odd(args->packed_weight);
      return true;
    case 25: {
      if (layer->c.M == 0) return false;
      layer->wrong_adapter.assign(static_cast<size_t>(layer->c.M), -1);
      const auto row = static_cast<size_t>(rng->below(layer->c.M));
      layer->wrong_adapter[row] = rng->one_in(2) ? -2 : static_cast<int32_t>(args->num_branches);
      args->adapter = layer->wrong_adapter.data();
      return true;
    }
    default:
      if (args->packed_weight == nullptr || layer->c.N == layer->c.K) return false;
      swap_packed(args, layer);
      return true;
  }
}
constexpr int kWays = 27;

template <class Args>
void spoiled(Args args, Layer *layer, Rng *rng) {
  int made = 0, way = 0;
  std::string ways;
  // In rising order, so that no way meets what it made wrong itself and none is taken twice.
  for (int left = 1 + static_cast<int>(rng->below(3)); left > 0 && way < kWays; --left) {
    way += static_cast<int>(rng->below(kWays - way));
    if (spoil(way, &args, layer, rng)) {
      ++made;
      ways += " " + std::to_string(way);
    }
    ++way;
  }
  if (made == 0) return;
  const deltaops_status status = call(args);
  CHECK(status == DELTAOPS_INVALID_ARGUMENT, "status %d for ways%s (%s)", status, ways.c_str(),
        layer->c.name().c_str());
  CHECK(deltaops_last_error()[0] != 0, "a refusal without a sentence, ways%s", ways.c_str());
  CHECK(layer->outputs_untouched(), "a refused call wrote, ways%s (%s)", ways.c_str(),
        layer->c.name().c_str());
  layer->check_inputs();
}

// Memory for wild calls: a block for each output and one that all inputs share; pointers into the
// middle, for either sign of a stride.
constexpr int64_t kHalf = 1 << 12, kOutputs = 9;
alignas(64) unsigned char wild_input[2 * kHalf], wild_outputs[kOutputs][2 * kHalf];

bool canary(const unsigned char *block, size_t bytes) {
  return block[0] == 0xFF && std::memcmp(block, block + 1, bytes - 1) == 0;
}

// A size that fits, now and then one that does not.
int64_t wild_size(Rng *rng) { return rng->one_in(40) ? wild_number(rng) : rng->below(20); }

// [rows, cols] by rows or, where `columns` allows it, by columns; or something else.
deltaops_matrix wild_matrix(unsigned char *block, int64_t rows, int64_t cols, int32_t dtype,
                            bool columns, Rng *rng) {
  columns = columns && rng->one_in(2);
  deltaops_matrix m = {block + kHalf, rows, cols, columns ? 1 : cols, columns ? rows : 1, dtype, 0};
  if (rng->one_in(24)) {
    int64_t *const fields[] = {&m.rows, &m.cols, &m.row_stride, &m.col_stride};
    *fields[rng->below(4)] = wild_number(rng);
  }
  if (rng->one_in(60)) m.dtype = static_cast<int32_t>(rng->below(4)) - 1;
  const auto reach = [](int64_t count, int64_t stride) {
    return std::fabs(static_cast<double>(count) * static_cast<double>(stride));
  };
  const double elements = reach(m.rows, m.row_stride) + reach(m.cols, m.col_stride) + 1;
  const bool fits = 4 * elements <= static_cast<double>(kHalf);
  if (!fits || rng->one_in(60)) m.data = rng->one_in(2) ? nullptr : block + kHalf + 1;
  return m;
}

// Calls that were made and those that were OK.
struct Depth {
  int64_t calls = 0, ok = 0;
  void count(deltaops_status status) { ++calls, ok += status == DELTAOPS_OK; }
};
struct Depths {
  Depth forward, backward, packing;
} depths;

void any_status(deltaops_status status) {
  CHECK(status == DELTAOPS_OK || status == DELTAOPS_INVALID_ARGUMENT ||
            status == DELTAOPS_OUT_OF_MEMORY,
        "status %d of a wild call", status);
  CHECK(status == DELTAOPS_OK || deltaops_last_error()[0] != 0, "a refusal without a sentence");
}

template <class Args>
void wild_call(const Args &args, Depth *depth) {
  const deltaops_status status = call(args);
  any_status(status);
  depth->count(status);
  CHECK(canary(wild_input, sizeof wild_input), "a wild call wrote its inputs");
  if (status == DELTAOPS_OK)
    std::memset(wild_outputs, 0xFF, sizeof wild_outputs);
  else
    CHECK(canary(wild_outputs[0], sizeof wild_outputs),
          "a wild call that failed wrote its outputs");
}

constexpr int64_t kMuch = 1 << 20;  // bytes: larger weights are not packed here

// Every function that takes a weight by itself.
void wild_packing(const deltaops_matrix &weight, Rng *rng) {
  const deltaops_matrix *asked = rng->one_in(20) ? nullptr : &weight;
  int64_t bytes = -7;
  const deltaops_status sized =
      deltaops_cpu_packed_bytes(asked, rng->one_in(20) ? nullptr : &bytes);
  any_status(sized);
  CHECK((sized == DELTAOPS_OK) == (bytes != -7), "a size of %lld with status %d",
        static_cast<long long>(bytes), sized);
  uint64_t hash = 0, again = 0;
  const deltaops_status hashed = deltaops_cpu_fingerprint(asked, rng->one_in(20) ? nullptr : &hash);
  any_status(hashed);
  if (hashed == DELTAOPS_OK)
    CHECK(deltaops_cpu_fingerprint(asked, &again) == DELTAOPS_OK && again == hash,
          "a fingerprint that is another one a moment later");
  else
    CHECK(hash == 0, "a refused fingerprint");

  if (sized != DELTAOPS_OK) bytes = 64;
  if (bytes > kMuch) return;
  CHECK(bytes >= 64, "%lld bytes packed", static_cast<long long>(bytes));
  const Buffer packed(bytes);
  const int32_t teams[] = {1, 2, 3, 64, 0, -1, std::numeric_limits<int32_t>::max()};
  const int32_t team = rng->one_in(4) ? teams[rng->below(7)] : 2;
  const int64_t given = rng->one_in(12) ? wild_number(rng) : bytes;
  void *to = packed.data();
  if (rng->one_in(12)) to = nullptr;
  if (rng->one_in(12)) to = odd(to);
  // A size that happens to be right must be that of the buffer.
  const deltaops_status status =
      deltaops_cpu_pack_weight(asked, to, sized == DELTAOPS_OK ? given : bytes, team);
  any_status(status);
  depths.packing.count(status);
  if (status != DELTAOPS_OK) CHECK(packed.untouched(), "a refused packing wrote");
  CHECK(canary(wild_input, sizeof wild_input), "packing wrote its input");
}

// A packed weight for the call: right, wrong, or none. `memory` keeps it.
template <class Args>
void wild_packed(const deltaops_matrix &weight, Args *args, std::unique_ptr<Buffer> *memory,
                 Rng *rng) {
  int64_t bytes = 0;
  if (rng->one_in(2) || deltaops_cpu_packed_bytes(&weight, &bytes) != DELTAOPS_OK || bytes > kMuch)
    return;
  *memory = std::make_unique<Buffer>(bytes);
  unsigned char *data = (*memory)->data();
  if (!rng->one_in(8))
    CHECK(deltaops_cpu_pack_weight(&weight, data, bytes, 1) == DELTAOPS_OK, "%s",
          deltaops_last_error());
  if (rng->one_in(8)) data[rng->below(64)] ^= 1;
  args->packed_weight = rng->one_in(16) ? odd(data) : data;
  args->packed_bytes = rng->one_in(16) ? wild_number(rng) : bytes;
}

void wild(Rng *rng) {
  const int32_t dtype = rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32;
  const int64_t M = wild_size(rng), N = wild_size(rng), K = wild_size(rng);
  int64_t used = 0, ranks = 0;
  const auto in = [&](int64_t rows, int64_t cols, int32_t type, bool columns = false) {
    return wild_matrix(wild_input, rows, cols, type, columns, rng);
  };
  const auto out = [&](int64_t rows, int64_t cols, int32_t type) {
    return wild_matrix(wild_outputs[used++], rows, cols, type, false, rng);
  };
  const auto unless = [&](int64_t n, const deltaops_matrix &m) {
    return rng->one_in(n) ? deltaops_matrix{} : m;
  };
  const auto kind = [&] { return rng->one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32; };

  std::vector<deltaops_branch> branches(static_cast<size_t>(rng->below(3)));
  std::vector<deltaops_matrix> grad_a, grad_b, grad_branch_bias;
  for (deltaops_branch &branch : branches) {
    const int32_t type = kind();
    const int64_t rank = rng->one_in(40) ? wild_number(rng) : 1 + rng->below(9);
    // A sum beyond int64 is refused for its parts; here it only has to be a number.
    ranks = static_cast<int64_t>(static_cast<uint64_t>(ranks) + static_cast<uint64_t>(rank));
    branch = {in(rank, K, type, true),
              in(N, rank, type, true),
              unless(2, in(1, rank, type)),
              static_cast<float>(rng->unit()),
              rng->one_in(2) ? 0 : static_cast<uint32_t>(rng->below(65538)),
              static_cast<uint32_t>(rng->next()),
              rng->one_in(24) ? static_cast<int32_t>(wild_number(rng))
                              : static_cast<int32_t>(rng->below(5))};
    grad_a.push_back(unless(3, out(rank, K, kind())));
    grad_b.push_back(unless(3, out(N, rank, kind())));
    grad_branch_bias.push_back(unless(3, out(1, rank, kind())));
  }
  const int32_t threads = rng->one_in(20) ? static_cast<int32_t>(wild_number(rng))
                                          : 1 + static_cast<int32_t>(rng->below(4));
  const auto count = static_cast<int32_t>(branches.size());
  const auto list = [&](const std::vector<deltaops_matrix> &grads) {
    return rng->one_in(4) ? nullptr : rng->one_in(40) ? odd(grads.data()) : grads.data();
  };
  std::unique_ptr<Buffer> memory;
  const deltaops_matrix weight = in(N, K, dtype, true);
  if (rng->one_in(8)) return wild_packing(weight, rng);
  if (rng->one_in(2)) {
    Forward args = {sizeof(Forward),
                    threads,
                    in(M, K, dtype),
                    weight,
                    unless(2, in(1, N, dtype)),
                    out(M, N, dtype),
                    unless(2, out(M, ranks, DELTAOPS_F32)),
                    branches.data(),
                    count,
                    0,
                    rng->next(),
                    nullptr,
                    0,
                    nullptr};
    wild_packed(weight, &args, &memory, rng);
    wild_call(args, &depths.forward);
  } else {
    Backward args = {sizeof(Backward),
                     threads,
                     in(M, N, dtype),
                     unless(6, in(M, K, dtype)),
                     unless(6, weight),
                     unless(6, in(M, ranks, DELTAOPS_F32)),
                     branches.data(),
                     count,
                     0,
                     rng->next(),
                     unless(4, out(M, K, dtype)),
                     unless(3, out(1, N, kind())),
                     list(grad_a),
                     list(grad_b),
                     list(grad_branch_bias),
                     nullptr,
                     0,
                     nullptr};
    wild_packed(transposed(weight), &args, &memory, rng);
    wild_call(args, &depths.backward);
  }
}

void mask(Rng *rng) {
  const int64_t edges[] = {0,
                           -1,
                           3,
                           int64_t{1} << 33,
                           std::numeric_limits<int64_t>::max(),
                           std::numeric_limits<int64_t>::min()};
  const int64_t M = edges[rng->below(6)], K = edges[rng->below(6)];
  uint8_t keep[9];
  std::memset(keep, 7, sizeof keep);
  const bool fits = M >= 0 && K >= 0 && (M == 0 || K == 0 || (M == 3 && K == 3));
  const uint32_t threshold = static_cast<uint32_t>(rng->below(65600));
  const deltaops_status status =
      deltaops_cpu_dropout_mask(fits ? keep : nullptr, M, K, rng->next(), 1, threshold);
  CHECK((status == DELTAOPS_OK) == (fits && threshold <= 65536), "status %d for M=%lld K=%lld",
        status, static_cast<long long>(M), static_cast<long long>(K));
  if (status != DELTAOPS_OK || M * K == 0)
    CHECK(std::all_of(keep, keep + 9, [](uint8_t k) { return k == 7; }), "an unasked mask");
}

void fma_peak(Rng *rng) {
  const int32_t dtypes[] = {-1, 2, std::numeric_limits<int32_t>::max()};
  const int64_t steps[] = {0, -1, std::numeric_limits<int64_t>::min(),
                           std::numeric_limits<int64_t>::max(), (int64_t{1} << 40) + 1};
  const int32_t teams[] = {0, -1, 1025, std::numeric_limits<int32_t>::max(),
                           std::numeric_limits<int32_t>::min()};
  const int64_t wrong = rng->below(4);  // 3: none
  const int32_t dtype = wrong == 0 ? dtypes[rng->below(3)] : static_cast<int32_t>(rng->below(2));
  const int64_t done = deltaops_cpu_fma_peak(dtype, wrong == 1 ? steps[rng->below(5)] : 1,
                                             wrong == 2 ? teams[rng->below(5)] : 2);
  CHECK(wrong == 3 ? done > 0 : done == -1, "fma_peak returned %lld", static_cast<long long>(done));
  CHECK(wrong == 3 || std::strstr(deltaops_last_error(), "fma_peak"), "a refusal without a name");
}

void one(Rng *rng) {
  switch (rng->below(16)) {
    case 0:
    case 1: {
      Layer layer(random_case(rng));
      return check_passes(&layer);
    }
    case 2:
      CHECK(deltaops_cpu_delta_linear_forward(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_delta_linear_backward(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_set_isa(nullptr) == DELTAOPS_INVALID_ARGUMENT, "NULL");
      CHECK(deltaops_cpu_isa_name(static_cast<int32_t>(rng->below(100)) - 200) == nullptr, "-");
      fma_peak(rng);
      return mask(rng);
    case 3:
    case 4:
    case 5:
    case 6:
    case 7: {
      Layer layer(random_case(rng));
      if (layer.c.packed) layer.pack();
      return rng->one_in(2) ? spoiled(layer.forward(), &layer, rng)
                            : spoiled(layer.backward(), &layer, rng);
    }
    default:
      return wild(rng);
  }
}

}  // namespace

int64_t wild_number(Rng *rng) {
  const int64_t edges[] = {0,
                           1,
                           2,
                           3,
                           -1,
                           1 << 16,
                           int64_t{1} << 40,
                           int64_t{1} << 62,
                           std::numeric_limits<int64_t>::max(),
                           std::numeric_limits<int64_t>::min()};
  return edges[rng->below(10)];
}

void fuzz(uint64_t seed, int64_t calls) {
  std::memset(wild_input, 0xFF, sizeof wild_input);
  std::memset(wild_outputs, 0xFF, sizeof wild_outputs);
  Rng rng = {seed};
  depths = {};
  std::printf("fuzz: %lld calls, seed %llu\n", static_cast<long long>(calls),
              static_cast<unsigned long long>(seed));
  for (int64_t i = 0; i < calls; ++i) one(&rng);
  fuzz_ops(seed, (calls + 3) / 4);
  if (calls < 100) return;  // too few to say anything
  const auto report = [](const char *what, const Depth &depth) {
    std::printf("fuzz: %lld of %lld wild calls of %s were OK\n", static_cast<long long>(depth.ok),
                static_cast<long long>(depth.calls), what);
    CHECK(depth.ok > 0, "every wild call of %s was refused: they test checks alone", what);
  };
  report("forward", depths.forward);
  report("backward", depths.backward);
  report("pack_weight", depths.packing);
}

}  // namespace test

#if defined(DELTAOPS_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint64_t seed = 0;
  std::memcpy(&seed, data, size < sizeof seed ? size : sizeof seed);
  test::fuzz(seed, 1);
  return 0;
}
#endif
