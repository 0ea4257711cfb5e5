// lora.cpp: LoRA in C++, trained to copy another one; the frozen weight is packed once.
//
//     c++ -std=c++17 lora.cpp $(pkg-config --cflags --libs deltaops) -o lora && ./lora
//
// Ends with 1 where a call fails, or where the mean squared error has not come down to a tenth.

#include <deltaops.h>

#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

struct Matrix {
  int64_t rows, cols;
  std::vector<float> data;

  Matrix(int64_t rows, int64_t cols)
      : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}

  static Matrix normal(int64_t rows, int64_t cols, float deviation, std::mt19937 &random) {
    Matrix made(rows, cols);
    std::normal_distribution<float> draw(0.0f, deviation);
    for (float &value : made.data) value = draw(random);
    return made;
  }

  deltaops_matrix view() { return {data.data(), rows, cols, cols, 1, DELTAOPS_F32, 0}; }
};

void check(deltaops_status status) {
  if (status != DELTAOPS_OK) throw std::runtime_error(deltaops_last_error());
}

constexpr int kThreads = 2;

// One of the two orders in which a product reads the weight; the weight must not change meanwhile.
std::vector<char> packed(const deltaops_matrix &weight) {
  int64_t bytes = 0;
  check(deltaops_cpu_packed_bytes(&weight, &bytes));
  std::vector<char> memory(static_cast<size_t>(bytes));
  check(deltaops_cpu_pack_weight(&weight, memory.data(), bytes, kThreads));
  return memory;
}

class LoraLinear {
 public:
  LoraLinear(Matrix weight, Matrix a, Matrix b, float scaling)
      : a_(std::move(a)),
        b_(std::move(b)),
        grad_a_(a_.rows, a_.cols),
        grad_b_(b_.rows, b_.cols),
        s_(0, a_.rows),
        weight_(std::move(weight)),
        forward_order_(packed(weight_.view())) {
    branch_.scaling = scaling;
  }

  Matrix forward(Matrix &x) {
    Matrix y(x.rows, weight_.rows);
    s_ = Matrix(x.rows, a_.rows);
    branch_.a = a_.view();
    branch_.b = b_.view();
    deltaops_delta_linear_forward_args args = {};
    args.struct_size = sizeof args;
    args.num_threads = kThreads;
    args.x = x.view();
    args.weight = weight_.view();
    args.y = y.view();
    args.s = s_.view();
    args.branches = &branch_;
    args.num_branches = 1;
    args.packed_weight = forward_order_.data();
    args.packed_bytes = static_cast<int64_t>(forward_order_.size());
    check(deltaops_cpu_delta_linear_forward(&args));
    return y;
  }

  // The gradients of A and B, and a step of gradient descent. x has none: it is the input.
  void step(Matrix &grad_y, Matrix &x, float rate) {
    const deltaops_matrix grad_a = grad_a_.view(), grad_b = grad_b_.view();
    deltaops_delta_linear_backward_args args = {};
    args.struct_size = sizeof args;
    args.num_threads = kThreads;
    args.grad_y = grad_y.view();
    args.x = x.view();
    args.s = s_.view();
    args.branches = &branch_;
    args.num_branches = 1;
    args.grad_a = &grad_a;
    args.grad_b = &grad_b;
    check(deltaops_cpu_delta_linear_backward(&args));
    for (size_t i = 0; i < a_.data.size(); ++i) a_.data[i] -= rate * grad_a_.data[i];
    for (size_t i = 0; i < b_.data.size(); ++i) b_.data[i] -= rate * grad_b_.data[i];
  }

 private:
  Matrix a_, b_, grad_a_, grad_b_, s_, weight_;
  std::vector<char> forward_order_;
  deltaops_branch branch_ = {};
};

int train() {
  constexpr int64_t tokens = 128, inputs = 64, outputs = 48, rank = 4;
  constexpr float scaling = 2.0f, rate = 0.05f;
  std::mt19937 random(0);
  Matrix x = Matrix::normal(tokens, inputs, 1.0f, random);
  Matrix weight = Matrix::normal(outputs, inputs, 0.125f, random);
  Matrix a = Matrix::normal(rank, inputs, 0.125f, random);
  LoraLinear teacher(weight, a, Matrix::normal(outputs, rank, 0.25f, random), scaling);
  LoraLinear student(weight, Matrix::normal(rank, inputs, 0.125f, random), Matrix(outputs, rank),
                     scaling);
  const Matrix wanted = teacher.forward(x);
  float first = 0.0f, last = 0.0f;
  for (int i = 0; i < 300; ++i) {
    Matrix difference = student.forward(x);
    last = 0.0f;
    for (size_t j = 0; j < difference.data.size(); ++j) {
      float &d = difference.data[j];
      d -= wanted.data[j];
      last += d * d / static_cast<float>(tokens * outputs);
      d *= 1.0f / static_cast<float>(tokens);
    }
    if (i == 0) first = last;
    student.step(difference, x, rate);
  }
  std::printf("mean squared error %.2e -> %.2e\n", first, last);
  return last < 0.1f * first ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return train();
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
