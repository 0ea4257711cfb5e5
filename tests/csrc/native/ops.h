// ops.h: one random call of bottleneck, norm_bias or cross_entropy with its memory, and what it
// must give, in double.
//
// A new op is a class in ops.cpp and a Kind; sweep, fuzz and threads follow by themselves.

#ifndef DELTAOPS_TESTS_OPS_H
#define DELTAOPS_TESTS_OPS_H

#include <deque>
#include <functional>

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

// One direction of an op: its struct, and its parts. The first slot is the one that sizes come
// from.
struct Pass {
  void *args;  // struct_size and num_threads come first
  size_t size;
  deltaops_status (*function)(const void *args);
  std::vector<Slot> slots;
  std::vector<Number> numbers;
  std::vector<Pointer> pointers;

  uint32_t *struct_size() const { return static_cast<uint32_t *>(args); }
  int32_t *threads() const { return static_cast<int32_t *>(args) + 1; }
  deltaops_status call() const { return function(args); }
};

enum class Kind { kBottleneck, kNormBias, kCrossEntropy };
constexpr Kind kKinds[] = {Kind::kBottleneck, Kind::kNormBias, Kind::kCrossEntropy};

struct OpCase {
  Kind kind;
  int64_t M, K, R;  // cross_entropy: K classes, no R
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
  bool holds(const deltaops_matrix &m) const;  // in some array, or nothing to hold

 protected:
  explicit Op(const OpCase &given) : c(given), rng_{given.seed} {}

  Array *input(int64_t rows, int64_t cols, int dtype, bool operand = false);
  Array *output(int64_t rows, int64_t cols, int dtype, bool dense = false);
  Array *saved(int64_t rows, int64_t cols, bool dense = false);
  int any_dtype() { return rng_.one_in(2) ? DELTAOPS_BF16 : DELTAOPS_F32; }
  bool wanted(int64_t n = 2) { return c.whole || !rng_.one_in(n); }
  void check(const Array &got, int64_t r, int64_t col, Sum want, const char *what) const {
    check_value(got, r, col, want, what, name_);
  }

  Rng rng_;
  std::string name_ = c.name();
  std::vector<int64_t> targets_before_;

 private:
  std::deque<Array> memory_;
  std::vector<Array *> inputs_, outputs_, saved_;
};

std::unique_ptr<Op> make(const OpCase &c);
OpCase random_op(Kind kind, Rng *rng);

// Forward and backward: right, nothing else written, and the same bits for any team.
void check_passes(Op *op);

void fuzz_ops(uint64_t seed, int64_t calls);

}  // namespace test
#endif
