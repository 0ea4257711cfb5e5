// layer.h: one random call of the C ABI with its memory, and what it must give, in double.
//
// A new field or op is a member of Layer, a line in its forward()/backward() and a term in expect*;
// sweep, fuzz and threads follow by themselves.

#ifndef DELTAOPS_TESTS_LAYER_H
#define DELTAOPS_TESTS_LAYER_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "deltaops.h"
#include "philox.h"

namespace test {

// Stops the program: a test that goes on after a wrong result hides which one was first.
#define CHECK(holds, ...)                                              \
  do {                                                                 \
    if (!(holds)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #holds); \
      std::fprintf(stderr, __VA_ARGS__);                               \
      std::fprintf(stderr, "\n");                                      \
      std::exit(1);                                                    \
    }                                                                  \
  } while (0)

// splitmix64: the same numbers on every machine.
struct Rng {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(limit));
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1.0; }  // [-1, 1)
};

// The last two are for inputs: the rows from the last to the first, and one row again and again.
enum class Layout { kDense, kPadded, kColumns, kReversed, kRepeated };

// A matrix in a block of its own. The block ends where the last element does and starts a few
// elements before the first, so data has the alignment of an element and no more. What lies between
// is a canary. Without AddressSanitizer, which watches the edges itself, so do guards around it.
class Array {
 public:
  Array(int64_t rows, int64_t cols, int dtype, Layout layout, Rng *rng) {
    const int64_t size = dtype == DELTAOPS_BF16 ? 2 : 4;
    const int64_t inner = layout == Layout::kColumns ? rows : cols;
    const int64_t outer = layout == Layout::kColumns ? cols : rows;
    int64_t stride = inner + (layout == Layout::kDense ? 0 : 1 + rng->below(9));
    if (layout == Layout::kRepeated) stride = 0;
    const int64_t elements = inner && outer ? (outer - 1) * stride + inner : 0;
#if defined(__SANITIZE_ADDRESS__)
    constexpr int64_t kGuard = 0;
#else
    constexpr int64_t kGuard = 128;
#endif
    const int64_t before = kGuard + size * rng->below(16);
    guard_ = static_cast<size_t>(kGuard);
    bytes_ = static_cast<size_t>(before + elements * size + kGuard);
    block_.reset(static_cast<unsigned char *>(std::malloc(bytes_ ? bytes_ : 1)));
    std::memset(block_.get(), 0xFF, bytes_);  // as f32 and as bf16: NaN
    const bool by_columns = layout == Layout::kColumns;
    m_ = {block_.get() + before,   rows,  cols, by_columns ? 1 : stride,
          by_columns ? stride : 1, dtype, 0};
    if (layout == Layout::kReversed && elements) {
      m_.data = block_.get() + before + (outer - 1) * stride * size;
      m_.row_stride = -stride;
    }
    remember();
  }

  const deltaops_matrix &matrix() const { return m_; }
  int64_t rows() const { return m_.rows; }
  int64_t cols() const { return m_.cols; }

  double at(int64_t r, int64_t c) const {
    uint32_t bits = 0;
    if (m_.dtype == DELTAOPS_BF16) {
      uint16_t half;
      std::memcpy(&half, element(r, c), sizeof half);
      bits = uint32_t{half} << 16;
    } else {
      std::memcpy(&bits, element(r, c), sizeof bits);
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Random values within +-scale.
  void fill(Rng *rng, double scale = 1) {
    fill([&] { return static_cast<float>(scale * rng->unit()); });
  }

  // What value() gives; bf16 by cutting, which is exact enough for inputs.
  template <class F>
  void fill(const F &value_of) {
    for (int64_t r = 0; r < m_.rows; ++r)
      for (int64_t c = 0; c < m_.cols; ++c) {
        const float value = value_of();
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (m_.dtype == DELTAOPS_BF16)
          std::memcpy(element(r, c), &half, sizeof half);
        else
          std::memcpy(element(r, c), &bits, sizeof bits);
      }
    remember();
  }

  void remember() { before_.assign(block_.get(), block_.get() + bytes_); }
  void restore() { std::copy(before_.begin(), before_.end(), block_.get()); }
  bool untouched() const {
    return bytes_ == 0 || std::memcmp(block_.get(), before_.data(), bytes_) == 0;
  }

  // Nothing but elements has changed.
  bool only_elements_changed() const {
    std::vector<unsigned char> now(block_.get(), block_.get() + bytes_);
    const size_t size = m_.dtype == DELTAOPS_BF16 ? 2 : 4;
    for (int64_t r = 0; r < m_.rows; ++r)
      for (int64_t c = 0; c < m_.cols; ++c) {
        const auto offset = static_cast<size_t>(element(r, c) - block_.get());
        std::memcpy(now.data() + offset, before_.data() + offset, size);
      }
    return now == before_;
  }

  // Whether all that m claims lies between the guards.
  bool holds(const deltaops_matrix &m) const {
    const double size = m.dtype == DELTAOPS_BF16 ? 2 : 4;
    const double down = (static_cast<double>(m.rows) - 1) * static_cast<double>(m.row_stride);
    const double across = (static_cast<double>(m.cols) - 1) * static_cast<double>(m.col_stride);
    const auto *start = static_cast<const unsigned char *>(m.data), *block = block_.get();
    if (start < block + guard_ || start > block + bytes_ - guard_) return false;
    const auto at = static_cast<double>(start - block), guard = static_cast<double>(guard_);
    const double low = at + size * (std::min(down, 0.0) + std::min(across, 0.0));
    const double high = at + size * (std::max(down, 0.0) + std::max(across, 0.0) + 1);
    return low >= guard && high <= static_cast<double>(bytes_) - guard;
  }

  std::string bits() const {
    return std::string(reinterpret_cast<const char *>(block_.get()), bytes_);
  }

 private:
  struct Free {
    void operator()(unsigned char *p) const { std::free(p); }
  };

  unsigned char *element(int64_t r, int64_t c) const {
    const int64_t size = m_.dtype == DELTAOPS_BF16 ? 2 : 4;
    return static_cast<unsigned char *>(m_.data) + (r * m_.row_stride + c * m_.col_stride) * size;
  }

  std::unique_ptr<unsigned char, Free> block_;
  size_t bytes_, guard_;
  deltaops_matrix m_;
  std::vector<unsigned char> before_;
};

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

  std::string name() const;
};

// A value and the sum of the magnitudes that went into it: what rounding errors are relative to.
struct Sum {
  double value = 0, size = 0;
  void add(double a, double b) { value += a * b, size += std::fabs(a * b); }
  void add(Sum a, double b) { value += a.value * b, size += a.size * std::fabs(b); }
};

// Stops where got[r, col] is not what is wanted; `name` is the case's.
void check_value(const Array &got, int64_t r, int64_t col, Sum want, const char *what,
                 const std::string &name);

// An activation is h * gate(h).
double gate(int32_t kind, double h);
Sum activated(int32_t kind, Sum h);     // act(h) where h has a rounding error of its own
Sum activated(int32_t kind, double h);  // of an exact h
Sum slope(int32_t kind, double h);      // act'(h) of an exact h

// Bytes that end where their block does and have the alignment of a float and no more; 0xFF at
// first, and a float of it before them.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : bytes_(bytes), block_(new unsigned char[static_cast<size_t>(bytes) + kBefore]) {
    std::memset(block_.get(), 0xFF, static_cast<size_t>(bytes) + kBefore);
  }
  unsigned char *data() const { return block_.get() + kBefore; }
  int64_t bytes() const { return bytes_; }
  bool untouched() const {
    for (size_t i = 0; i < static_cast<size_t>(bytes_) + kBefore; ++i)
      if (block_[i] != 0xFF) return false;
    return true;
  }

 private:
  static constexpr size_t kBefore = 4;
  int64_t bytes_;
  std::unique_ptr<unsigned char[]> block_;
};

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

 private:
  bool kept(int64_t m, int64_t k, size_t i) const;
  double scale(size_t i) const;
  template <class F>
  void each_output(const F &f) const;

  Rng rng_;
  Array x_, weight_, bias_, y_, s_, grad_y_, grad_x_, grad_bias_;
  std::vector<Array> a_, b_, branch_bias_, grad_a_, grad_b_, grad_branch_bias_;
  std::unique_ptr<Buffer> packed_, packed_transposed_;
  int64_t ranks_;
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
