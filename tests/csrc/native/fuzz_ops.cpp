// fuzz_ops.cpp: fuzz.cpp's kinds of calls for the ops beside delta_linear; fuzz_heads.cpp has those
// parts that look into tensors.
//
//     valid     a random call; OK and right
//     numbers   the same with NaN, infinities, denormals and huge values among the inputs; OK, and
//               the same bits again
//     spoiled   one to three fields made wrong, each enough by itself: refused, nothing written
//     wild      a few fields replaced by any value; any status. No pointer claims more memory than
//               is there.

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace test {
namespace {

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max(),
                  kLeast = std::numeric_limits<int64_t>::min();

bool has_elements(const deltaops_matrix &m) { return m.data && m.rows > 0 && m.cols > 0; }

// Nothing in it overflows when it is multiplied.
bool sane(const deltaops_matrix &m) {
  constexpr int64_t kMuch = 1 << 20;
  return has_elements(m) && m.rows < kMuch && m.cols < kMuch && m.row_stride < kMuch &&
         m.row_stride > -kMuch;
}

// Makes the pass wrong in the way numbered `way`; false where it offers no place for it.
bool spoil(int way, Pass *pass, Op *op, Rng *rng) {
  const int64_t sizes[] = {-1, -7, kLeast, kLargest, (int64_t{1} << 40) + 1};
  const int64_t strides[] = {kLargest, kLeast, int64_t{1} << 61, -(int64_t{1} << 62)};
  const int32_t counts[] = {0, -1, 1025, std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
  Slot &slot = any_of(pass->slots, rng);
  deltaops_matrix *m = slot.view;
  const bool leads = &slot == &pass->slots[0];
  switch (way) {
    case 0:
      *pass->struct_size() = rng->one_in(2) ? 0 : static_cast<uint32_t>(pass->size) + 8;
      return true;
    case 1:
      *pass->threads() = counts[rng->below(5)];
      return true;
    case 2: {
      Number &number = any_of(pass->numbers, rng);
      const int32_t wrong[] = {number.low - 1, number.high + 1, std::numeric_limits<int32_t>::max(),
                               std::numeric_limits<int32_t>::min()};
      *number.field = wrong[rng->below(4)];
      return true;
    }
    case 3:
      m->reserved = -1;
      return true;
    case 4:
      m->dtype = rng->one_in(2) ? 2 : -1;
      return true;
    case 5:
      m->data = odd(m->data);
      return true;
    case 6:  // the others follow the first, and up follows down
      if (leads || slot.operand) return false;
      ++(rng->one_in(2) ? m->rows : m->cols);
      return true;
    case 7:
      (rng->one_in(2) ? m->rows : m->cols) = sizes[rng->below(5)];
      return true;
    case 8:
      (rng->one_in(2) ? m->row_stride : m->col_stride) = strides[rng->below(4)];
      return true;
    case 9:
      if (!slot.needed || !has_elements(*m)) return false;
      m->data = nullptr;
      return true;
    case 10:
      if (slot.free || leads) return false;
      m->dtype ^= 1;
      return true;
    case 11:  // rows that overlap, or with a gap where there may be none
      if (!sane(*m) || m->rows < 2 || !(slot.written || slot.dense)) return false;
      m->row_stride = slot.dense && rng->one_in(2) ? m->cols + 1 : m->cols - 1;
      return true;
    case 12:
      if (m->rows < 1 || m->cols < 2) return false;
      if (slot.operand && m->rows < 2) return false;
      m->col_stride = 3;
      if (slot.operand) m->row_stride = 2;
      return true;
    case 13: {  // an output that starts where another matrix does
      const deltaops_matrix *other = any_of(pass->slots, rng).view;
      if (!slot.written || other == m || !has_elements(*m) || !has_elements(*other)) return false;
      m->data = other->data;
      return true;
    }
    case 14: {  // an output in another's last row, or around its first element
      const deltaops_matrix *other = any_of(pass->slots, rng).view;
      if (!slot.written || other == m || !sane(*m) || !sane(*other)) return false;
      const int64_t size = other->dtype == DELTAOPS_BF16 ? 2 : 4;
      const int64_t step = rng->one_in(2) ? other->rows - 1 : 1 - m->rows;
      const int64_t stride =
          step > 0 ? other->row_stride * size : m->row_stride * (m->dtype == DELTAOPS_BF16 ? 2 : 4);
      if (step > 0 && stride < 0) return false;
      m->data = static_cast<unsigned char *>(other->data) + step * stride;
      return true;
    }
    case 15: {
      if (pass->pointers.empty()) return false;
      const Pointer &pointer = any_of(pass->pointers, rng);
      pointer.set(rng->one_in(2) ? nullptr : odd(pointer.get()));
      return true;
    }
    case 16: {  // the loss in a matrix, or a matrix over the targets or the gradient of the loss
      if (pass->pointers.empty() || !has_elements(*m)) return false;
      const Pointer &pointer = any_of(pass->pointers, rng);
      if (!slot.written && !pointer.written) return false;
      if (pointer.written)
        pointer.set(m->data);
      else
        m->data = pointer.get();
      return true;
    }
    default:
      if (op->targets.empty()) return false;
      do any_of(op->targets, rng) = rng->one_in(2) ? op->c.K + rng->below(3) : -1 - rng->below(99);
      while (std::all_of(op->targets.begin(), op->targets.end(), [&](int64_t target) {
        return (target >= 0 && target < op->c.K) || target == op->ignored;
      }));
      op->targets_changed();
      return true;
  }
}
constexpr int kMatrixWays = 18;

void refused(const Pass &pass, Op *op, const std::string &ways) {
  const deltaops_status status = pass.call();
  CHECK(status == DELTAOPS_INVALID_ARGUMENT, "status %d for ways%s (%s)", status, ways.c_str(),
        op->c.name().c_str());
  CHECK(deltaops_last_error()[0] != 0, "a refusal without a sentence, ways%s", ways.c_str());
  CHECK(op->outputs_untouched() && op->inputs_untouched(), "a refused call wrote, ways%s (%s)",
        ways.c_str(), op->c.name().c_str());
}

void spoiled(Op *op, Rng *rng) {
  Pass *pass = rng->one_in(2) ? &op->forward : &op->backward;
  const bool heads = !pass->heads.empty();
  const int count = heads ? kHeadsWays : kMatrixWays;
  int made = 0, way = 0;
  std::string ways;
  // In rising order, so that no way meets what it made wrong itself and none is taken twice.
  for (int left = 1 + static_cast<int>(rng->below(3)); left > 0 && way < count; --left) {
    way += static_cast<int>(rng->below(count - way));
    if (heads ? spoil_heads(way, pass, rng) : spoil(way, pass, op, rng))
      ++made, ways += " " + std::to_string(way);
    ++way;
  }
  if (made > 0) refused(*pass, op, ways);
}

// No struct at all, at an odd address, and one that ends after its first two fields.
void misplaced(Op *op, Rng *rng) {
  Pass pass = rng->one_in(2) ? op->forward : op->backward;
  pass.args = nullptr;
  refused(pass, op, ": NULL");
  std::vector<uint64_t> room(pass.size / sizeof(uint64_t) + 2);
  pass.args = odd(room.data());
  refused(pass, op, ": odd");
  const std::unique_ptr<uint32_t[]> small(new uint32_t[2]{8, 1});
  pass.args = small.get();
  refused(pass, op, ": short");
}

// Well formed but for their extent: no count that a body would make of it fits into int64.
void vast() {
  constexpr int64_t kMany = int64_t{1} << 40;
  alignas(8) static float memory[4];
  deltaops_norm_bias_backward_args norm = {};
  norm.struct_size = sizeof norm, norm.num_threads = 1, norm.norm = DELTAOPS_RMS_NORM;
  norm.grad_y = {memory, kMany, kMany, 0, 1, DELTAOPS_F32, 0};  // one row again and again
  norm.grad_bias = {memory, 1, kMany, kMany, 1, DELTAOPS_F32, 0};
  CHECK(deltaops_cpu_norm_bias_backward(&norm) == DELTAOPS_INVALID_ARGUMENT, "2^80 elements");
  deltaops_bottleneck_backward_args bottleneck = {};
  bottleneck.struct_size = sizeof bottleneck, bottleneck.num_threads = 1;
  bottleneck.grad_y = {nullptr, 0, kMany, kMany, 1, DELTAOPS_F32, 0};
  bottleneck.h = {nullptr, 0, kMany, kMany, 1, DELTAOPS_F32, 0};
  bottleneck.down = {memory, kMany, kMany, 0, 1, DELTAOPS_F32, 0};
  bottleneck.up = bottleneck.down;
  CHECK(deltaops_cpu_bottleneck_backward(&bottleneck) == DELTAOPS_INVALID_ARGUMENT, "2^80 steps");
}

// Rows of no class, all ignored: matrices without elements may be NULL.
void no_classes() {
  float state[4], loss = 1;
  const int64_t target[] = {-1, -1};
  deltaops_cross_entropy_forward_args forward = {};
  forward.struct_size = sizeof forward, forward.num_threads = 1;
  forward.logits = {nullptr, 2, 0, 0, 1, DELTAOPS_F32, 0};
  forward.target = target, forward.ignore_index = -1;
  forward.state = {state, 2, 2, 2, 1, DELTAOPS_F32, 0}, forward.loss = &loss;
  CHECK(deltaops_cpu_cross_entropy_forward(&forward) == DELTAOPS_OK && loss == 0, "%g", loss);
  deltaops_cross_entropy_backward_args backward = {};
  backward.struct_size = sizeof backward, backward.num_threads = 1;
  backward.logits = backward.grad_logits = forward.logits;
  backward.target = target, backward.ignore_index = -1;
  backward.state = forward.state, backward.grad_loss = &loss;
  CHECK(deltaops_cpu_cross_entropy_backward(&backward) == DELTAOPS_OK, "%s", deltaops_last_error());
}

void numbers(Op *op, Rng *rng) {
  const float edges[] = {NAN,     INFINITY, -INFINITY, 3e38f,  -3e38f, 1e-40f,
                         -1e-45f, 0.0f,     -0.0f,     1e-20f, 1e20f,  -130.0f};
  const int64_t rarely = 1 + rng->below(30);
  op->fill_inputs([&] {
    return rng->one_in(rarely) ? edges[rng->below(12)] : static_cast<float>(rng->unit());
  });
  std::string want;
  for (int round = 0; round < 2; ++round) {
    for (const Pass *pass : {&op->forward, &op->backward}) {
      CHECK(pass->call() == DELTAOPS_OK, "%s (%s)", deltaops_last_error(), op->c.name().c_str());
      CHECK(op->only_outputs_changed(), "written beside the outputs (%s)", op->c.name().c_str());
    }
    CHECK(round == 0 || op->output_bits() == want, "other bits again (%s)", op->c.name().c_str());
    want = op->output_bits();
    op->restore_outputs();
  }
}

// Changes some fields; what claims more memory than is there is taken away, a lie that no check can
// see through.
void wild_matrices(Pass *pass, Op *op, Rng *rng) {
  for (int64_t left = 1 + rng->below(3); left > 0; --left) {
    Slot &slot = any_of(pass->slots, rng);
    deltaops_matrix *m = slot.view;
    int64_t *const fields[] = {&m->rows, &m->cols, &m->row_stride, &m->col_stride};
    switch (rng->below(9)) {
      case 0:
        m->data = slot.written || rng->one_in(2) ? nullptr : any_of(pass->slots, rng).view->data;
        break;
      case 1:
        m->dtype = static_cast<int32_t>(rng->below(4)) - 1;
        break;
      case 2:
        *any_of(pass->numbers, rng).field = static_cast<int32_t>(wild_number(rng));
        break;
      case 3:
        *pass->threads() = rng->one_in(2) ? static_cast<int32_t>(wild_number(rng)) : 64;
        break;
      case 4:
        if (!op->targets.empty()) any_of(op->targets, rng) = wild_number(rng);
        op->targets_changed();
        break;
      case 5:  // a matrix of another shape
        m->rows = rng->below(4), m->cols = rng->below(4);
        break;
      default:
        *fields[rng->below(4)] = rng->one_in(2) ? wild_number(rng) : rng->below(20) - 4;
    }
  }
  for (Slot &slot : pass->slots)
    if (!op->holds(*slot.view)) slot.view->data = rng->one_in(2) ? nullptr : odd(slot.view->data);
  if (static_cast<int64_t>(op->targets.size()) < pass->slots[0].view->rows)
    for (const Pointer &pointer : pass->pointers)
      if (!pointer.written && pointer.get() == op->targets.data()) pointer.set(nullptr);
}

// Whether the call was OK.
bool wild(Op *op, Rng *rng) {
  Pass *pass = rng->one_in(2) ? &op->forward : &op->backward;
  pass->heads.empty() ? wild_matrices(pass, op, rng) : wild_heads(pass, op, rng);
  const deltaops_status status = pass->call();
  CHECK(status == DELTAOPS_OK || status == DELTAOPS_INVALID_ARGUMENT ||
            status == DELTAOPS_OUT_OF_MEMORY,
        "status %d of a wild call (%s)", status, op->c.name().c_str());
  CHECK(op->inputs_untouched(), "a wild call wrote its inputs (%s)", op->c.name().c_str());
  if (status == DELTAOPS_OK) return true;
  CHECK(deltaops_last_error()[0] != 0, "a refusal without a sentence");
  CHECK(op->outputs_untouched(), "a wild call that failed wrote (%s)", op->c.name().c_str());
  return false;
}

}  // namespace

void fuzz_ops(uint64_t seed, int64_t calls) {
  vast();
  no_classes();
  no_heads();
  Rng rng = {seed};
  for (const Kind kind : kKinds) {
    int64_t tried = 0, ok = 0;
    std::string name;
    for (int64_t i = 0; i < calls; ++i) {
      const std::unique_ptr<Op> op = make(random_op(kind, &rng));
      name = op->c.name().substr(0, op->c.name().find(' '));
      switch (rng.below(16)) {
        case 0:
        case 1:
          check_passes(op.get());
          break;
        case 2:
        case 3:
          numbers(op.get(), &rng);
          break;
        case 4:
          misplaced(op.get(), &rng);
          break;
        case 5:
        case 6:
        case 7:
        case 8:
          ++tried;
          ok += wild(op.get(), &rng);
          break;
        default:
          spoiled(op.get(), &rng);
      }
    }
    if (calls < 100) continue;  // too few to say anything
    std::printf("fuzz: %lld of %lld wild calls of %s were OK\n", static_cast<long long>(ok),
                static_cast<long long>(tried), name.c_str());
    CHECK(ok > 0, "every wild call of %s was refused: they test checks alone", name.c_str());
  }
}

}  // namespace test
