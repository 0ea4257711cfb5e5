// xla_views.h: XLA's buffers as the core's matrices, and the axes that vmap puts before theirs.
//
// jax.ffi's vmap_method="expand_dims" gives every operand the same number of axes in front, each of
// the size of the batch or, where the operand is not batched, of 1. So a handler loops over the
// batch and needs no copy of what its elements share. A failed check is kept, and the rest skipped.

#ifndef DELTAOPS_BINDINGS_XLA_VIEWS_H
#define DELTAOPS_BINDINGS_XLA_VIEWS_H

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "deltaops.h"
#include "xla/ffi/api/ffi.h"

namespace deltaops_bindings {

namespace ffi = xla::ffi;

constexpr int32_t kBytes = -1;  // a dtype that no matrix has: seeds, numbers, masks, packed memory

// One operand or result: `own` axes behind those of the batch; data is null where it is absent.
struct View {
  char *data = nullptr;
  const int64_t *dims = nullptr;
  size_t lead = 0;
  int32_t dtype = kBytes;
  int64_t width = 1;     // bytes an element
  int64_t elements = 1;  // of its own axes

  explicit operator bool() const { return data != nullptr; }
  int64_t size(size_t axis) const { return dims[lead + axis]; }

  // Whether all elements of the batch share it.
  bool shared() const {
    for (size_t i = 0; i < lead; ++i)
      if (dims[i] != 1) return false;
    return true;
  }

  // Where the i-th element of a batch of these sizes has it.
  char *at(const std::vector<int64_t> &batch, int64_t i) const {
    int64_t offset = 0, step = elements * width;
    for (size_t axis = lead; axis-- > 0;) {
      if (dims[axis] != 1) offset += i % batch[axis] * step;
      i /= batch[axis];
      step *= dims[axis];
    }
    return data + offset;
  }
};

class Buffers {
 public:
  Buffers(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  // The next operand, where `there`.
  View operand(size_t own, bool there = true) {
    if (!there || !error_.success()) return {};
    const size_t number = next_operand_++;
    return view("operand", number, args_.get<ffi::AnyBuffer>(number), own);
  }

  View result(size_t own, bool there = true) {
    if (!there || !error_.success()) return {};
    const size_t number = next_result_++;
    auto found = rets_.get<ffi::AnyBuffer>(number);
    if (found.has_error()) return failed(found.error());
    return view("result", number, ffi::ErrorOr<ffi::AnyBuffer>(**found), own);
  }

  std::vector<View> operands(size_t count, size_t own) {
    std::vector<View> found(count);
    for (View &one : found) one = operand(own);
    return found;
  }

  void expect(bool holds, const char *sentence) {
    if (!holds && error_.success()) error_ = ffi::Error::InvalidArgument(sentence);
  }

  const ffi::Error &error() const { return error_; }
  // The sizes in front, of every operand and result alike.
  const std::vector<int64_t> &batch() const { return batch_; }
  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : batch_) product *= size;
    return product;
  }

 private:
  View failed(ffi::Error error) {
    error_ = std::move(error);
    return {};
  }

  View view(const char *kind, size_t number, const ffi::ErrorOr<ffi::AnyBuffer> &found,
            size_t own) {
    if (found.has_error()) return failed(found.error());
    const auto dims = found->dimensions();
    const std::string who = std::string(kind) + " " + std::to_string(number);
    if (dims.size() < own)
      return failed(ffi::Error::InvalidArgument("deltaops: " + who + " has too few axes."));
    View v;
    v.lead = dims.size() - own;
    v.dims = dims.begin();
    for (size_t i = 0; i < own; ++i) v.elements *= v.size(i);
    const ffi::DataType type = found->element_type();
    v.dtype = type == ffi::F32 ? DELTAOPS_F32 : type == ffi::BF16 ? DELTAOPS_BF16 : kBytes;
    v.width = static_cast<int64_t>(ffi::ByteWidth(type));
    // an empty buffer may have no memory, and null would say that it is absent
    static char nothing alignas(64)[64];
    v.data = static_cast<char *>(found->untyped_data());
    if (v.data == nullptr) v.data = nothing;
    if (next_operand_ + next_result_ == 1 && number == 0) batch_.assign(v.lead, 1);
    if (v.lead != batch_.size())
      return failed(ffi::Error::InvalidArgument("deltaops: " + who + " has another batch."));
    for (size_t i = 0; i < v.lead; ++i) {
      if (v.dims[i] == 1) continue;
      if (batch_[i] != 1 && batch_[i] != v.dims[i])
        return failed(ffi::Error::InvalidArgument("deltaops: " + who + " has another batch."));
      batch_[i] = v.dims[i];
    }
    return v;
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t next_operand_ = 0, next_result_ = 0;
  std::vector<int64_t> batch_;
  ffi::Error error_;
};

// Element i of a batch, as the core takes it; absent where the view is.
class Item {
 public:
  Item(const std::vector<int64_t> &batch, int64_t i) : batch_(batch), i_(i) {}

  void *pointer(const View &v) const { return v ? v.at(batch_, i_) : nullptr; }

  // [rows, cols] of a view's own two axes.
  deltaops_matrix matrix(const View &v) const {
    if (!v) return {};
    return {pointer(v), v.size(0), v.size(1), v.size(1), 1, v.dtype, 0};
  }

  deltaops_matrix transposed(const View &v) const {
    if (!v) return {};
    return {pointer(v), v.size(1), v.size(0), 1, v.size(1), v.dtype, 0};
  }

  // [1, n] of a view's one axis.
  deltaops_matrix row(const View &v) const {
    if (!v) return {};
    return {pointer(v), 1, v.size(0), v.size(0), 1, v.dtype, 0};
  }

 private:
  const std::vector<int64_t> &batch_;
  int64_t i_;
};

// Two words of a key of jax.random; 0 where it is absent.
inline uint64_t seed_of(const Item &item, const View &seed) {
  const auto *words = static_cast<const uint32_t *>(item.pointer(seed));
  return words == nullptr ? 0 : static_cast<uint64_t>(words[1]) << 32 | words[0];
}

inline ffi::Error error_of(deltaops_status status, const char *said) {
  switch (status) {
    case DELTAOPS_OK:
      return ffi::Error::Success();
    case DELTAOPS_INVALID_ARGUMENT:
      return ffi::Error::InvalidArgument(said);
    case DELTAOPS_OUT_OF_MEMORY:
      return {ffi::ErrorCode::kResourceExhausted, said};
    default:
      return {ffi::ErrorCode::kUnimplemented, said};
  }
}

// One call for each element of the batch; the first failure ends it with what the library said.
template <class Call>
ffi::Error for_each_item(const Buffers &buffers, Call call,
                         const char *(*last_error)() = deltaops_last_error) {
  if (!buffers.error().success()) return buffers.error();
  for (int64_t i = 0; i < buffers.count(); ++i) {
    const deltaops_status status = call(Item(buffers.batch(), i));
    if (status != DELTAOPS_OK) return error_of(status, last_error());
  }
  return ffi::Error::Success();
}

}  // namespace deltaops_bindings

#endif
