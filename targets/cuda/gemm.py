"""The GEMM of codes in plain Triton: every architecture, and few rows on every architecture."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    a_scale_stride,
    has_bias,
    out_kind,
    group,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = float(a[m, k] · b[n, k]ᵀ) · a_scale[m] · b_scale[n] + bias[n].

    a: int8 or e4m3 [m, k]. b: the same [n, k]. a_scale: float32[m], or one for all where its stride
    is 0. b_scale and bias: float32[n]. out: float16, bfloat16 or float32 [m, n] for out_kind 0, 1,
    2. The sum of products is exact for int8; it is scaled in float32 and rounded once.
    """
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    width = group * tiles_n
    first = (tile // width) * group
    height = min(tiles_m - first, group)
    rows = (first + (tile % width) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = ((tile % width) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_ok = rows < m
    column_ok = columns < n
    a_at = a_ptr + rows.to(tl.int64)[:, None] * k + depth[None, :]
    b_at = b_ptr + columns.to(tl.int64)[None, :] * k + depth[:, None]
    INT8: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    ZERO: tl.constexpr = 0 if INT8 else 0.0
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, k, BLOCK_K):
        left = depth < k - start
        a = tl.load(a_at, row_ok[:, None] & left[None, :], ZERO)
        b = tl.load(b_at, column_ok[None, :] & left[:, None], ZERO)
        # Tensor cores of sm_90 add e4m3 products up in few bits: within a step, no further.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=0 if INT8 else BLOCK_K)
        a_at += BLOCK_K
        b_at += BLOCK_K

    a_scale = tl.load(a_scale_ptr + rows * a_scale_stride, row_ok, 0.0)
    b_scale = tl.load(b_scale_ptr + columns, column_ok, 0.0)
    value = acc.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
    if has_bias:
        value += tl.load(bias_ptr + columns, column_ok, 0.0)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if out_kind == 0:
        tl.store(out_ptr.to(tl.pointer_type(tl.float16)) + at, value.to(tl.float16), ok)
    elif out_kind == 1:
        tl.store(out_ptr.to(tl.pointer_type(tl.bfloat16)) + at, value.to(tl.bfloat16), ok)
    else:
        tl.store(out_ptr.to(tl.pointer_type(tl.float32)) + at, value, ok)
