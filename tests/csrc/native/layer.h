// layer.h: one random call of the C ABI with its memory, and what it must give, in double.
//
// A new field or op is a member of Layer, a line in its forward()/backward() and a term in expect*;
// sweep, fuzz and threads follow by themselves.

#ifndef DELTAOPS_TESTS_LAYER_H
#define DELTAOPS_TESTS_LAYER_H

#include "memory.h"
#include "philox.h"

namespace test {

struct BranchSpec {
  int64_t rank;
  uint32_t threshold;
  int32_t activation = DELTAOPS_IDENTITY;
  bool bias = false;
};

struct Case {
  int64_t M, N, K;
  std::vector<BranchSpec> branches;
  int dtype, adapters;
  Layout weight;
  int threads;
  bool bias, s;
  bool packed;  // once more with the weight packed
  uint64_t seed;
  bool routed = false;  // each row has one branch, or none

  std::string name() const;
};

// A value and the sum of the magnitudes that went into it: what rounding errors are relative to.
struct Sum {
  double value = 0, size = 0;
  void add(double a, double b) { value += a * b, size += std::fabs(a * b); }
  void add(Sum a, double b) { value += a.value * b, size += a.size * std::fabs(b); }
};

// How far from it a value may be that is stored as dtype.
double error_bound(Sum want, int dtype);

// Stops where got[r, col] is not what is wanted; `name` is the case's.
void check_value(const Array &got, int64_t r, int64_t col, Sum want, const char *what,
                 const std::string &name);

// An activation is h * gate(h).
double gate(int32_t kind, double h);
Sum activated(int32_t kind, Sum h);     // act(h) where h has a rounding error of its own
Sum activated(int32_t kind, double h);  // of an exact h
Sum slope(int32_t kind, double h);      // act'(h) of an exact h

deltaops_matrix transposed(const deltaops_matrix &m);

class Layer {
 public:
  explicit Layer(const Case &c);

  // From here on forward() and backward() pass packed weights, made for the ISA in use.
  void pack();

  // Both hold pointers into this layer.
  deltaops_delta_linear_forward_args forward();
  deltaops_delta_linear_backward_args backward();

  void check_forward() const;   // y and s right, nothing else written
  void check_backward() const;  // gradients right, nothing else written; s must be that of forward
  void check_inputs() const;
  bool outputs_untouched() const;
  void restore_outputs();
  std::string output_bits() const;

  Case c;
  std::vector<deltaops_branch> branches;
  std::vector<deltaops_matrix> grad_a_list, grad_b_list, grad_branch_bias_list;
  std::vector<int32_t> wrong_adapter;  // for who spoils a call

 private:
  bool has(int64_t m, size_t i) const;
  bool kept(int64_t m, int64_t k, size_t i) const;
  double scale(size_t i) const;
  template <class F>
  void each_output(const F &f) const;

  Rng rng_;
  Array x_, weight_, bias_, y_, s_, grad_y_, grad_x_, grad_bias_;
  std::vector<Array> a_, b_, branch_bias_, grad_a_, grad_b_, grad_branch_bias_;
  std::unique_ptr<Buffer> packed_, packed_transposed_;
  int64_t ranks_;
  std::vector<int32_t> adapter_;
};

// Forward and, with the s that it has made, backward: right, and the same bits from packed weights.
void check_passes(Layer *layer);

// A random small case: every path of the core is reached by some of them.
Case random_case(Rng *rng);

// The parts of the program; each stops it at the first thing that is wrong.
void sweep(bool quick);
void groups(uint64_t seed, int64_t count);
void fuzz(uint64_t seed, int64_t calls);
void threads(int rounds);

}  // namespace test
#endif
