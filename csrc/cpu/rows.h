/* rows.h: the rows that a branch applies to, where each row of a batch has an adapter of its own.
 *
 * Rows are sorted by branch once a call, by counting, and ascend within a branch: its rows in any
 * block are a slice of its list. No row is moved in memory; passes over a branch's rows gather
 * those that are no neighbours.
 */
#ifndef DELTAOPS_CPU_ROWS_H
#define DELTAOPS_CPU_ROWS_H

#include "vec.h"

namespace deltaops {
namespace DELTAOPS_ISA {
namespace {

/* Ascending numbers of rows. */
struct Rows {
  const int64_t *list;
  int64_t count;
};

/* How many of them are below m. */
inline int64_t rows_below(const Rows &rows, int64_t m) {
  int64_t begin = 0, end = rows.count;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (rows.list[middle] < m)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

/* Those from `begin` to `end` - 1. */
inline Rows rows_between(const Rows &rows, int64_t begin, int64_t end) {
  const int64_t first = rows_below(rows, begin);
  return {rows.list + first, rows_below(rows, end) - first};
}

/* How many of them from the i-th on follow one another. */
inline int64_t neighbours(const Rows &rows, int64_t i) {
  int64_t count = 1;
  while (i + count < rows.count && rows.list[i + count] == rows.list[i] + count) ++count;
  return count;
}

/* The rows of branch i are order[ends[i - 1]] ... order[ends[i] - 1], from order[0] for the first.
 * adapter: M numbers of branches, or -1. */
inline void sort_rows(const int32_t *adapter, int64_t M, int64_t branches, int64_t *order,
                      int64_t *ends) {
  memset(ends, 0, static_cast<size_t>(branches) * sizeof *ends);
  for (int64_t m = 0; m < M; ++m)
    if (adapter[m] >= 0) ++ends[adapter[m]];
  int64_t before = 0;
  for (int64_t i = 0; i < branches; ++i) {  // where the branch starts, until its rows are in
    const int64_t count = ends[i];
    ends[i] = before;
    before += count;
  }
  for (int64_t m = 0; m < M; ++m)
    if (adapter[m] >= 0) order[ends[adapter[m]]++] = m;
}

}  // namespace
}  // namespace DELTAOPS_ISA
}  // namespace deltaops
#endif
