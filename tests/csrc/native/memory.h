// memory.h: the memory of random calls, its guards, and the numbers that it is made from.

#ifndef DELTAOPS_TESTS_MEMORY_H
#define DELTAOPS_TESTS_MEMORY_H

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

// Elements of f32, of bf16 or of a byte in a block of their own. The block ends where the last
// element does and starts a few elements before the first, so data has the alignment of an element
// and no more. What lies between is a canary. Without AddressSanitizer, which watches the edges
// itself, so do guards around it.
class Memory {
 public:
  int64_t size() const { return size_; }  // bytes of an element

  // Random values within +-scale.
  void fill(Rng *rng, double scale = 1) {
    fill([&] { return static_cast<float>(scale * rng->unit()); });
  }

  // What value_of() gives; bf16 by cutting, which is exact enough for inputs; a byte: 0 or 1.
  template <class F>
  void fill(const F &value_of) {
    for (const size_t offset : elements_) {
      const float value = value_of();
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      unsigned char *to = block_.get() + offset;
      if (size_ == 1)
        *to = value != 0;
      else if (size_ == 2)
        std::memcpy(to, &half, sizeof half);
      else
        std::memcpy(to, &bits, sizeof bits);
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
    for (const size_t offset : elements_)
      std::memcpy(now.data() + offset, before_.data() + offset, static_cast<size_t>(size_));
    return now == before_;
  }

  // Whether the bytes from data + low to data + high - 1 lie between the guards.
  bool holds(const void *data, double low, double high) const {
    const auto *start = static_cast<const unsigned char *>(data), *block = block_.get();
    if (start < block + guard_ || start > block + bytes_ - guard_) return false;
    const auto at = static_cast<double>(start - block), guard = static_cast<double>(guard_);
    return at + low >= guard && at + high <= static_cast<double>(bytes_) - guard;
  }

  std::string bits() const {
    return std::string(reinterpret_cast<const char *>(block_.get()), bytes_);
  }

 protected:
  // For `span` elements of `size` bytes; returns where the first of them lies.
  unsigned char *allocate(int64_t span, int64_t size, Rng *rng) {
#if defined(__SANITIZE_ADDRESS__)
    constexpr int64_t kGuard = 0;
#else
    constexpr int64_t kGuard = 128;
#endif
    const int64_t before = kGuard + size * rng->below(16);
    size_ = size;
    guard_ = static_cast<size_t>(kGuard);
    bytes_ = static_cast<size_t>(before + span * size + kGuard);
    block_.reset(static_cast<unsigned char *>(std::malloc(bytes_ ? bytes_ : 1)));
    std::memset(block_.get(), 0xFF, bytes_);  // as f32 and as bf16: NaN
    return block_.get() + before;
  }

  void add_element(const unsigned char *at) {
    elements_.push_back(static_cast<size_t>(at - block_.get()));
  }

  double value(const unsigned char *at) const {
    if (size_ == 1) return *at;
    uint32_t bits = 0;
    if (size_ == 2) {
      uint16_t half;
      std::memcpy(&half, at, sizeof half);
      bits = uint32_t{half} << 16;
    } else {
      std::memcpy(&bits, at, sizeof bits);
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  struct Free {
    void operator()(unsigned char *p) const { std::free(p); }
  };

  std::unique_ptr<unsigned char, Free> block_;
  size_t bytes_ = 0, guard_ = 0;
  int64_t size_ = 0;
  std::vector<size_t> elements_;  // where they start in the block
  std::vector<unsigned char> before_;
};

inline int64_t size_of(int dtype) { return dtype == DELTAOPS_BF16 ? 2 : 4; }

// The last two are for inputs: the rows from the last to the first, and one row again and again.
enum class Layout { kDense, kPadded, kColumns, kReversed, kRepeated };

class Array : public Memory {
 public:
  Array(int64_t rows, int64_t cols, int dtype, Layout layout, Rng *rng) {
    const int64_t inner = layout == Layout::kColumns ? rows : cols;
    const int64_t outer = layout == Layout::kColumns ? cols : rows;
    int64_t stride = inner + (layout == Layout::kDense ? 0 : 1 + rng->below(9));
    if (layout == Layout::kRepeated) stride = 0;
    const int64_t span = inner && outer ? (outer - 1) * stride + inner : 0;
    unsigned char *first = allocate(span, size_of(dtype), rng);
    const bool by_columns = layout == Layout::kColumns;
    m_ = {first, rows, cols, by_columns ? 1 : stride, by_columns ? stride : 1, dtype, 0};
    if (layout == Layout::kReversed && span) {
      m_.data = first + (outer - 1) * stride * size();
      m_.row_stride = -stride;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) add_element(element(r, c));
    remember();
  }

  const deltaops_matrix &matrix() const { return m_; }
  int64_t rows() const { return m_.rows; }
  int64_t cols() const { return m_.cols; }
  double at(int64_t r, int64_t c) const { return value(element(r, c)); }

 private:
  unsigned char *element(int64_t r, int64_t c) const {
    return static_cast<unsigned char *>(m_.data) + (r * m_.row_stride + c * m_.col_stride) * size();
  }

  deltaops_matrix m_;
};

// [B, H, L, D] with D elements side by side and the other three in any order, gaps between them;
// where it is read some of them backwards or broadcast. The stride of a size of 1 is any number.
class Tensor : public Memory {
 public:
  enum class Use { kRead, kWritten, kMask };

  Tensor(const int64_t (&sizes)[4], int64_t size, Use use, Rng *rng) {
    std::copy(sizes, sizes + 4, sizes_);
    const bool one_byte = use == Use::kMask && rng->one_in(4);  // for the whole of a row
    strides_[3] = one_byte ? 0 : 1;
    int64_t end = one_byte ? 1 : sizes[3];
    int axes[3] = {0, 1, 2};
    for (int64_t i = 0; i < 3; ++i) std::swap(axes[i], axes[i + rng->below(3 - i)]);
    for (const int axis : axes) {
      int64_t &stride = strides_[axis];
      stride = end + (rng->one_in(2) ? 0 : rng->below(9));
      const int64_t kind = use == Use::kWritten ? 4 : rng->below(use == Use::kMask ? 4 : 10);
      if (sizes[axis] < 2) {
        if (rng->one_in(3)) stride = rng->below(2001) - 1000;
      } else if (kind < 2) {
        stride = 0;
      } else {
        end += (sizes[axis] - 1) * stride;
        if (kind == 2) stride = -stride;
      }
    }
    place(size, rng);
  }

  // Memory of its own, laid out like another's.
  Tensor(const Tensor &other, Rng *rng) {
    std::copy(other.sizes_, other.sizes_ + 4, sizes_);
    std::copy(other.strides_, other.strides_ + 4, strides_);
    place(other.size(), rng);
  }

  void *data() const { return data_; }
  const int64_t *sizes() const { return sizes_; }
  const int64_t *strides() const { return strides_; }
  double at(int64_t b, int64_t h, int64_t l, int64_t d) const { return value(element(b, h, l, d)); }

 private:
  unsigned char *element(int64_t b, int64_t h, int64_t l, int64_t d) const {
    return data_ + (b * strides_[0] + h * strides_[1] + l * strides_[2] + d * strides_[3]) * size();
  }

  void place(int64_t size, Rng *rng) {
    int64_t low = 0, high = 0;
    for (int axis = 0; axis < 4; ++axis) {
      const int64_t reach = (sizes_[axis] - 1) * strides_[axis];
      low += std::min(reach, int64_t{0}), high += std::max(reach, int64_t{0});
    }
    const bool empty = std::find(sizes_, sizes_ + 4, 0) != sizes_ + 4;
    data_ = empty ? allocate(0, size, rng) : allocate(high - low + 1, size, rng) - low * size;
    for (int64_t b = 0; b < sizes_[0]; ++b)
      for (int64_t h = 0; h < sizes_[1]; ++h)
        for (int64_t l = 0; l < sizes_[2]; ++l)
          for (int64_t d = 0; d < sizes_[3]; ++d) add_element(element(b, h, l, d));
    remember();
  }

  unsigned char *data_;
  int64_t sizes_[4], strides_[4];
};

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

}  // namespace test
#endif
