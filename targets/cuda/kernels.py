"""Kernels over rows: quantise, alone or fused with a norm or an activation.

One program per row of a [rows, columns] matrix in float16 or bfloat16, the whole row in registers
(BLOCK columns, a power of two), statistics in float32. Flags are arguments rather than constants:
these kernels wait for memory, a branch that all threads take alike costs nothing, and a library
with one kernel per flag would be ten times the size.

Codes are ``value * inverse``, rounded to int8 or, where `is_fp8`, to e4m3, halves to even. Per
token, inverse = 127 / max|row| and scale = max|row| / 127 (448 for e4m3), both correctly rounded; a
row below 2⁻¹⁰⁰ codes as zeros. With a static scale, inverse = 1 / scale and codes saturate at -128
and 127, or ±448. A row with a NaN has the scale NaN, one with an infinity the scale infinity: what
the float graph would show stays visible.

FP8 is whether the GPU has the instruction that rounds to e4m3, from compute capability 8.9 on.
"""

from __future__ import annotations

import triton
import triton.language as tl

RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU = tl.constexpr(4)
TINY = tl.constexpr(2.0**-100)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pack(value, inverse, SATURATE: tl.constexpr):
    """``rint(value * inverse)`` as int8, four at a time.

    Adding 1.5 · 2²³ rounds to an integer, halves to even, and leaves it in the lowest bits. The
    product is rounded by itself first (.rn instructions are not fused). Without SATURATE it must
    lie within int8.
    """
    clamp: tl.constexpr = (
        """
        max.f32 a, a, 0fC3000000; max.f32 b, b, 0fC3000000;
        max.f32 c, c, 0fC3000000; max.f32 d, d, 0fC3000000;
        min.f32 a, a, 0f42FE0000; min.f32 b, b, 0f42FE0000;
        min.f32 c, c, 0f42FE0000; min.f32 d, d, 0f42FE0000;
        """
        if SATURATE
        else ""
    )
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b32 low, high;
        mul.rn.f32 a, $1, $5; mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7; mul.rn.f32 d, $4, $8;
        """
        + clamp
        + """
        add.rn.f32 a, a, 0f4B400000; add.rn.f32 b, b, 0f4B400000;
        add.rn.f32 c, c, 0f4B400000; add.rn.f32 d, d, 0f4B400000;
        prmt.b32 low, a, b, 0x0040; prmt.b32 high, c, d, 0x0040;
        prmt.b32 $0, low, high, 0x5410;
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [value, inverse],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _pack_e4m3(value, inverse):
    """``value * inverse`` as e4m3, saturating, four at a time; the product is rounded first."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b16 low, high;
        mul.rn.f32 a, $1, $5; mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7; mul.rn.f32 d, $4, $8;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [value, inverse],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _write_codes(
    value, ok, at, row, codes_ptr, scale_ptr, static_ptr, is_static, is_fp8, FP8: tl.constexpr
):
    """Quantise a row of float32 values, 0 where not `ok`: codes, and its scale unless given."""
    if is_static:
        inverse = tl.math.div_rn(1.0, tl.load(static_ptr))
    else:
        largest = tl.reduce(tl.abs(value), 0, _larger)
        levels = tl.where(is_fp8 != 0, 448.0, 127.0) if FP8 else 127.0
        tl.store(scale_ptr + row, tl.math.div_rn(largest, levels))
        inverse = tl.where(largest < TINY, 0.0, tl.math.div_rn(levels, largest))
    if is_fp8:
        if FP8:
            tl.store(codes_ptr + at, _pack_e4m3(value, inverse), ok)
    elif is_static:
        tl.store(codes_ptr + at, _pack(value, inverse, True), ok)
    else:
        tl.store(codes_ptr + at, _pack(value, inverse, False), ok)


@triton.jit
def activation_rows(
    x_ptr,
    up_ptr,
    static_ptr,
    codes_ptr,
    scale_ptr,
    columns,
    x_stride,
    up_stride,
    kind,
    has_up,
    is_static,
    is_fp8,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    """codes[row] = quantised(kind(x[row]) * up[row]); kind 0 is x itself.

    x and up: T[rows, columns], rows `x_stride` and `up_stride` elements apart. codes: int8 or e4m3
    [rows, columns]. scale: float32[rows], written unless `is_static`; static: float32[1].
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    ok = at < columns
    value = tl.load(x_ptr + row * x_stride + at, ok, 0.0).to(tl.float32)
    if kind == RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif kind == GELU:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif kind == GELU_TANH:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-2.0 * inner))
    elif kind == SILU:
        value = value / (1.0 + tl.exp(-value))
    if has_up:
        value *= tl.load(up_ptr + row * up_stride + at, ok, 0.0).to(tl.float32)
    here = row * columns + at
    _write_codes(value, ok, here, row, codes_ptr, scale_ptr, static_ptr, is_static, is_fp8, FP8)


@triton.jit
def norm_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    static_ptr,
    codes_ptr,
    scale_ptr,
    sum_ptr,
    columns,
    epsilon,
    is_rms,
    has_residual,
    has_bias,
    has_sum,
    is_static,
    is_fp8,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    """codes[row] = quantised(norm(x[row] + residual[row])); the sum, rounded to T, is written too.

    x, residual and sum: T[rows, columns]. weight and bias: T[columns]. codes, scale and static as
    in ``activation_rows``.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    ok = at < columns
    here = row * columns + at
    rounded = tl.load(x_ptr + here, ok, 0.0)
    if has_residual:
        other = tl.load(residual_ptr + here, ok, 0.0).to(tl.float32)
        rounded = (rounded.to(tl.float32) + other).to(x_ptr.dtype.element_ty)
    if has_sum:
        tl.store(sum_ptr + here, rounded, ok)
    value = rounded.to(tl.float32)
    if is_rms == 0:
        value = tl.where(ok, value - tl.sum(value, 0) / columns, 0.0)
    variance = tl.sum(value * value, 0) / columns
    value = value * tl.rsqrt(variance + epsilon)
    value *= tl.load(weight_ptr + at, ok, 0.0).to(tl.float32)
    if has_bias:
        value += tl.load(bias_ptr + at, ok, 0.0).to(tl.float32)
    _write_codes(value, ok, here, row, codes_ptr, scale_ptr, static_ptr, is_static, is_fp8, FP8)
