// ops.h: one random call of an op beside delta_linear with its memory, and what it must give, in
// double.
//
// A new op is a class in ops.cpp (of matrices) or heads.cpp (of tensors), a Kind with its name and
// a line in make(); sweep, fuzz and threads follow by themselves.

#ifndef DELTAOPS_TESTS_OPS_H
#define DELTAOPS_TESTS_OPS_H

#include <deque>
#include <functional>
#include <utility>

#include "layer.h"

namespace test {

// A matrix of a pass, and what is asked of it.
struct Slot {
  deltaops_matrix *view;  // in the struct of the pass
  bool written;
  bool needed;   // never absent
  bool free;     // f32 or bf16, as it likes
  bool dense;    // no gap between rows
  bool operand;  // by rows or by columns
};

// A number in the struct, and the values that it may have.
struct Number {
  int32_t *field;
  int32_t low, high;
};

// A pointer in the struct, of any type, never NULL.
struct Pointer {
  void *field;
  bool written;
  void set(const void *to) const { std::memcpy(field, &to, sizeof to); }
  void *get() const {
    void *to;
    std::memcpy(&to, field, sizeof to);
    return to;
  }
};

// A tensor of a pass that has its sizes from the struct, and up to four strides.
struct HeadsSlot {
  Pointer data;
  bool needed;              // never absent
  const int64_t *sizes[4];  // in the struct; NULL: 1
  int64_t *strides[4];      // in the struct; NULL: none; all of them NULL: contiguous
  const int32_t *dtype;     // in the struct; NULL: of `size` bytes
  int64_t size;

  int64_t count(int axis) const { return sizes[axis] ? *sizes[axis] : 1; }
  int64_t element() const { return dtype ? size_of(*dtype) : size; }
  bool has_elements() const {
    return data.get() && count(0) > 0 && count(1) > 0 && count(2) > 0 && count(3) > 0;
  }
};

// One direction of an op: its struct, and its parts. The first slot is the one that sizes come
// from. A pass has slots, or heads.
struct Pass {
  void *args;  // struct_size and num_threads come first
  size_t size;
  std::function<deltaops_status(const void *args)> function;
  std::vector<Slot> slots;
  std::vector<Number> numbers;
  std::vector<Pointer> pointers;
  std::vector<HeadsSlot> heads;
  std::vector<int64_t *> sizes;                // of the heads, in the struct
  std::vector<std::function<void()>> misfits;  // each makes sizes or strides that go with no tensor

  uint32_t *struct_size() const { return static_cast<uint32_t *>(args); }
  int32_t *threads() const { return static_cast<int32_t *>(args) + 1; }
  deltaops_status call() const { return function(args); }
};

enum class Kind { kBottleneck, kNormBias, kCrossEntropy, kGated, kRotary, kAttention };
constexpr Kind kKinds[] = {Kind::kBottleneck, Kind::kNormBias, Kind::kCrossEntropy,
                           Kind::kGated,      Kind::kRotary,   Kind::kAttention};

struct OpCase {
  Kind kind;
  // cross_entropy: K classes, no R. gated: no R. rotary: M tokens, 2 R elements, K for the heads.
  // attention: M queries, K keys, R elements; mostly with a prefix, some turned: M keys then.
  int64_t M, K, R;
  int threads;
  bool whole;  // nothing that may be absent is
  uint64_t seed;

  std::string name() const;
};

class Op {
 public:
  virtual ~Op() = default;

  Pass forward, backward;  // into this op's structs; spoil them and throw the op away
  std::vector<int64_t> targets;
  int64_t ignored = 0;  // the class that is none
  const OpCase c;

  virtual void check_forward() const = 0;
  virtual void check_backward() const = 0;  // for what forward has saved

  // From here on what the forward pass saves is an input.
  void keep_saved();
  void targets_changed() { targets_before_ = targets; }  // by the test itself
  void fill_inputs(const std::function<float()> &value);
  bool inputs_untouched() const;
  bool outputs_untouched() const;
  bool only_outputs_changed() const;
  void restore_outputs();
  std::string output_bits() const;
  // In some memory, or nothing to hold.
  bool holds(const deltaops_matrix &m) const;
  bool holds(const HeadsSlot &slot) const;

 protected:
  explicit Op(const OpCase &given) : c(given), rng_{given.seed} {}

  Array *input(int64_t rows, int64_t cols, int dtype, bool operand = false);
  Array *output(int64_t rows, int64_t cols, int dtype, bool dense = false);
  Array *saved(int64_t rows, int64_t cols, bool dense = false);
  Tensor *tensor(const int64_t (&sizes)[4], int dtype, Tensor::Use use);
  Tensor *tensor_like(const Tensor &other);
  Tensor *saved_tensor(const int64_t (&sizes)[4], int dtype);
  Tensor *mask(const int64_t (&sizes)[4]);
  int any_dtype() { return rng_.one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32; }
  bool wanted(int64_t n = 2) { return c.whole || !rng_.one_in(n); }
  void check(const Array &got, int64_t r, int64_t col, Sum want, const char *what) const {
    check_value(got, r, col, want, what, name_);
  }
  void check(const Tensor &got, const int64_t (&at)[4], Sum want, const char *what) const;

  Rng rng_;
  std::string name_ = c.name();
  std::vector<int64_t> targets_before_;

 private:
  bool holds(const void *data, double low, double high) const;

  std::deque<Array> arrays_;
  std::deque<Tensor> tensors_;
  std::vector<Memory *> inputs_, outputs_, saved_;
};

std::unique_ptr<Op> make(const OpCase &c);
std::unique_ptr<Op> make_rotary(const OpCase &c);
std::unique_ptr<Op> make_attention(const OpCase &c);
OpCase random_op(Kind kind, Rng *rng);

// Forward and backward: right, nothing else written, and the same bits for any team.
void check_passes(Op *op);

void fuzz_ops(uint64_t seed, int64_t calls);
// The parts of fuzz_ops for passes of heads.
bool spoil_heads(int way, Pass *pass, Rng *rng);
constexpr int kHeadsWays = 13;
void wild_heads(Pass *pass, Op *op, Rng *rng);
void no_heads();

// What every part of the fuzz draws from.
template <class T>
T &any_of(std::vector<T> &list, Rng *rng) {
  return list[static_cast<size_t>(rng->below(static_cast<int64_t>(list.size())))];
}
template <class T>
T *odd(T *pointer) {  // misaligned for every type here but a byte
  return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(pointer) | 1);
}
int64_t wild_number(Rng *rng);

// ------------------------------------------------------------------- what the references are made
// of

inline Sum of(double value) { return {value, std::fabs(value)}; }
inline Sum times(Sum a, Sum b) { return {a.value * b.value, a.size * b.size}; }
inline Sum plus(Sum a, Sum b) { return {a.value + b.value, a.size + b.size}; }
inline Sum times(Sum a, double b) { return times(a, of(b)); }

template <class Args>
Pass pass_of(Args *args, std::function<deltaops_status(const void *)> function, int threads) {
  args->struct_size = sizeof *args;
  args->num_threads = threads;
  return {args, sizeof *args, std::move(function), {}, {}, {}, {}, {}, {}};
}

}  // namespace test
#endif
