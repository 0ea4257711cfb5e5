"""What the kernels share: which tile a program computes, and how a tile is read."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(program, tile_rows, tile_cols, GROUP: tl.constexpr):
    """(row, column) of a program's tile. GROUP rows of tiles go down together before the next
    column, so that what they read of both operands is still in L2."""
    in_group = GROUP * tile_cols
    first = (program // in_group) * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def load_tile(base, row, col, row_stride, col_stride, rows, cols):
    """Tile [row, col] of a matrix [rows, cols], zero outside it: padded rank lanes, ragged edges
    and unread partners of a product must all be zero, masking the store would be too late."""
    offset = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(base + offset, mask=inside, other=0.0)


@triton.jit
def add_product(acc, left, right):
    """``acc + left right``. Float32 products of a block are summed apart before they join: a single
    sum over K would round once for each term. By fma: of a product and a sum Triton would make a
    product with that accumulator again."""
    if left.dtype == tl.float32:
        return tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, acc)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def is_own(adapter, row, rows, number):
    """Whether each row of a tile has the adapter ``number``; none has it outside the matrix."""
    return tl.load(adapter + row, mask=row < rows, other=-1) == number


@triton.jit
def store_tile(base, row, col, row_stride, col_stride, rows, cols, value):
    """Round ``value`` once to the element type of ``base`` and store what is inside the matrix."""
    offset = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=inside)
