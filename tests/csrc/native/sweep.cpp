// sweep.cpp: odd shapes, strides, dtypes, ranks, dropout and teams against the double reference.

#include "ops.h"

namespace test {
namespace {

struct Shape {
  int64_t M, N, K;
};

// Empty sizes, one row, edges of every tile width, both sides of the dot path's limit of rows, more
// than one block of k, of the dots' too.
const Shape kShapes[] = {{0, 5, 3},     {4, 0, 3},    {4, 5, 0},    {1, 1, 1},
                         {1, 70, 65},   {8, 33, 64},  {9, 13, 31},  {17, 67, 515},
                         {3, 17, 1100}, {65, 20, 40}, {200, 9, 24}, {8, 35, 1701}};
// No rows, one of everything, edges of a vector, of a tile, of a block of rows and of 64 columns;
// and enough of it for a team of several.
struct OpShape {
  int64_t M, K, R;
};
const OpShape kOpShapes[] = {{0, 5, 3},   {1, 1, 1},     {2, 16, 4},  {7, 31, 33},
                             {13, 64, 8}, {33, 130, 17}, {200, 9, 2}, {150, 300, 24}};
const std::vector<BranchSpec> kBranches[] = {
    {},
    {{4, 0}},
    {{1, 6554}},
    {{8, 0}, {3, 30000}, {17, 0}, {5, 65536}},
    {{40, 0}, {16, 1}},
    {{5, 0, DELTAOPS_RELU, true}, {4, 0, DELTAOPS_IDENTITY, true}, {17, 9000, DELTAOPS_GELU}},
    {{3, 65536, DELTAOPS_SILU, true}, {33, 0, DELTAOPS_SILU}, {16, 1, DELTAOPS_GELU_TANH, true}}};

}  // namespace

void sweep(bool quick) {
  uint64_t seed = 0;
  for (const auto &branches : kBranches)
    for (const Shape &shape : kShapes)
      for (int kind = 0; kind < 3; ++kind) {
        ++seed;
        if (quick && seed % 3 != 0) continue;
        Case c = {shape.M,
                  shape.N,
                  shape.K,
                  branches,
                  kind == 0 ? DELTAOPS_F32 : DELTAOPS_BF16,
                  kind == 1 ? DELTAOPS_BF16 : DELTAOPS_F32,
                  static_cast<Layout>(seed % 3),
                  1 + static_cast<int>(seed / 3 % 3),
                  seed % 5 != 0,
                  true,
                  true,
                  seed,
                  seed % 4 == 1};
        Layer layer(c);
        check_passes(&layer);
      }
  groups(seed, quick ? 40 : 300);
  for (const Kind kind : kKinds)
    for (const OpShape &shape : kOpShapes)
      for (int round = 0; round < (quick ? 1 : 4); ++round) {
        const OpCase c = {kind, shape.M, shape.K, shape.R, 1 + round % 3, round == 0, seed += 7};
        check_passes(make(c).get());
      }
}

}  // namespace test
