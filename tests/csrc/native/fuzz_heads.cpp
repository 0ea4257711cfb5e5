// fuzz_heads.cpp: fuzz_ops.cpp's spoiled and wild calls where tensors have their sizes from the
// struct: rotary and attention.

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace test {
namespace {

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max(),
                  kLeast = std::numeric_limits<int64_t>::min();

int64_t *any_stride(const HeadsSlot &slot, Rng *rng) {
  std::vector<int64_t *> strides;
  for (int64_t *stride : slot.strides)
    if (stride) strides.push_back(stride);
  return strides.empty() ? nullptr : any_of(strides, rng);
}

// Bytes from the slot's data to one of its elements.
int64_t any_element(const HeadsSlot &slot, Rng *rng) {
  int64_t at = 0;
  for (int axis = 0; axis < 4; ++axis) {
    const int64_t index = rng->below(slot.count(axis));
    if (slot.strides[axis])
      at += index * *slot.strides[axis];
    else if (axis == 3)
      at += index;
  }
  return at * slot.element();
}

// Nothing in it is spoiled already.
bool sane(const HeadsSlot &slot) {
  constexpr int64_t kMuch = 1 << 20;
  for (const int64_t *stride : slot.strides)
    if (stride && (*stride > kMuch || *stride < -kMuch)) return false;
  for (int axis = 0; axis < 4; ++axis)
    if (slot.count(axis) > kMuch) return false;
  return slot.has_elements();
}

// Puts it at an odd address; false where that is none, or where nobody looks.
bool misalign(const HeadsSlot &slot) {
  if (slot.element() == 1 || (slot.dtype == nullptr && !slot.has_elements())) return false;
  slot.data.set(odd(slot.data.get()));
  return true;
}

}  // namespace

// Makes the pass wrong in the way numbered `way`; false where it offers no place for it.
bool spoil_heads(int way, Pass *pass, Rng *rng) {
  const int64_t sizes[] = {-1, -7, kLeast, kLargest, (int64_t{1} << 40) + 1};
  const int64_t strides[] = {kLargest, kLeast, int64_t{1} << 61, -(int64_t{1} << 62)};
  const int32_t counts[] = {0, -1, 1025, std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min()};
  const HeadsSlot &slot = any_of(pass->heads, rng), &other = any_of(pass->heads, rng);
  int64_t *stride = any_stride(slot, rng);
  switch (way) {
    case 0:
      *pass->struct_size() = rng->one_in(2) ? 0 : static_cast<uint32_t>(pass->size) + 8;
      return true;
    case 1:
      *pass->threads() = counts[rng->below(5)];
      return true;
    case 2: {
      const Number &number = any_of(pass->numbers, rng);
      const int32_t wrong[] = {number.low - 1, number.high + 1, std::numeric_limits<int32_t>::max(),
                               std::numeric_limits<int32_t>::min()};
      *number.field = wrong[rng->below(4)];
      return true;
    }
    case 3:  // rows that overlap, backwards or too near
      if (!slot.data.written || stride == nullptr || !slot.has_elements()) return false;
      for (int axis = 0; axis < 3; ++axis)
        if (slot.strides[axis] == stride && slot.count(axis) < 2) return false;
      *stride = rng->one_in(2) ? slot.count(3) - 1 : -*stride;
      return true;
    case 4:  // an output that starts where another tensor does
      if (!slot.data.written || &slot == &other || !sane(slot) || !sane(other)) return false;
      slot.data.set(other.data.get());
      return true;
    case 5: {  // an output that has one element in common with another tensor
      if (!slot.data.written || &slot == &other || !sane(slot) || !sane(other)) return false;
      slot.data.set(static_cast<unsigned char *>(other.data.get()) + any_element(other, rng) -
                    any_element(slot, rng));
      return true;
    }
    case 6:
      if (!slot.needed || !slot.has_elements()) return false;
      slot.data.set(nullptr);
      return true;
    case 7:
      return misalign(slot);
    case 8:  // too far for memory, in bounds for the checks, which go on and refuse the last one
      if (stride == nullptr || !misalign(pass->heads.back())) return false;
      *stride = rng->one_in(2) ? int64_t{1} << 53 : -(int64_t{1} << 53);
      return true;
    case 9:
      if (stride == nullptr) return false;
      *stride = strides[rng->below(4)];
      return true;
    case 10:
      any_of(pass->misfits, rng)();
      return true;
    default:
      *any_of(pass->sizes, rng) = sizes[rng->below(5)];
      return true;
  }
}

void wild_heads(Pass *pass, Op *op, Rng *rng) {
  for (int64_t left = 1 + rng->below(3); left > 0; --left) {
    const HeadsSlot &slot = any_of(pass->heads, rng);
    int64_t *stride = any_stride(slot, rng);
    switch (rng->below(8)) {
      case 0:
        slot.data.set(slot.data.written || rng->one_in(2) ? nullptr
                                                          : any_of(pass->heads, rng).data.get());
        break;
      case 1:
        *any_of(pass->numbers, rng).field = static_cast<int32_t>(wild_number(rng));
        break;
      case 2:
        *pass->threads() = rng->one_in(2) ? static_cast<int32_t>(wild_number(rng)) : 64;
        break;
      case 3:
      case 4:
        *any_of(pass->sizes, rng) = rng->one_in(2) ? wild_number(rng) : rng->below(9);
        break;
      default:
        if (stride) *stride = rng->one_in(2) ? wild_number(rng) : rng->below(40) - 8;
    }
  }
  for (const HeadsSlot &slot : pass->heads)
    if (!op->holds(slot))
      slot.data.set(slot.element() == 1 || rng->one_in(2) ? nullptr : odd(slot.data.get()));
}

// Tensors without elements may be NULL, whatever their strides.
void no_heads() {
  deltaops_rotary_args rotary = {};
  rotary.struct_size = sizeof rotary, rotary.num_threads = 1;
  rotary.sizes[0] = 2, rotary.sizes[2] = 3, rotary.sizes[3] = 4;
  for (int i = 0; i < 3; ++i) rotary.x_strides[i] = rotary.y_strides[i] = -9;
  CHECK(deltaops_cpu_rotary(&rotary) == DELTAOPS_OK, "%s", deltaops_last_error());

  float q[16] = {}, y[16], lse[4], grad_q[16];
  deltaops_attention_forward_args forward = {};
  forward.struct_size = sizeof forward, forward.num_threads = 1;
  const int64_t sizes[] = {2, 2, 2, 1, 0, 4};
  std::copy(sizes, sizes + 6, forward.sizes);
  forward.q = {q, {8, 4, 4}}, forward.y = {y, {8, 4, 4}};
  forward.k = forward.v = {nullptr, {-9, 7, 7}};
  forward.lse = lse, forward.scale = 1;
  CHECK(deltaops_cpu_attention_forward(&forward) == DELTAOPS_OK, "%s", deltaops_last_error());
  deltaops_attention_backward_args backward = {};
  backward.struct_size = sizeof backward, backward.num_threads = 1;
  std::copy(sizes, sizes + 6, backward.sizes);
  backward.grad_y = backward.q = forward.q, backward.k = backward.v = forward.k;
  backward.y = forward.y, backward.lse = lse, backward.grad_q = {grad_q, {8, 4, 4}};
  backward.scale = 1;
  CHECK(deltaops_cpu_attention_backward(&backward) == DELTAOPS_OK, "%s", deltaops_last_error());
  for (int i = 0; i < 16; ++i)
    CHECK(y[i] == 0 && grad_q[i] == 0 && lse[i / 4] == INFINITY, "a query without keys: %g", y[i]);
}

}  // namespace test
