"""The GEMM of codes on sm_90: bulk tensor copies, wgmma, and one warp that does nothing but load.

Written in Gluon, Triton's lower level, because the roles of the warps matter here. A block of
threads is one loader warp and CONSUMERS warpgroups of 64 or 128 output rows each. They share STAGES
buffers and nothing else: while one warpgroup writes its tile, the other keeps the tensor cores
busy, and the loader already fetches the next tile. Blocks are persistent: as many as the GPU has
multiprocessors, each taking every n-th tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _origin(
    tile,
    tiles_m,
    tiles_n,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    group,
):
    """First row and column of a tile: `group` rows of tiles at a time, so that blocks share B."""
    width = group * tiles_n
    first = (tile // width) * group
    height = min(tiles_m - first, group)
    row = (first + (tile % width) % height) * BLOCK_M
    column = ((tile % width) // height) * BLOCK_N
    return row, column


@gluon.jit
def _load(
    a_desc,
    b_desc,
    a_bufs,
    b_bufs,
    ready,
    empty,
    m,
    n,
    k,
    group,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,
):
    """The loader: fills stage after stage, tile after tile, as soon as all consumers left it."""
    ROWS: gl.constexpr = a_desc.block_shape[0]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    BLOCK_N: gl.constexpr = b_desc.block_shape[0]
    BLOCK_K: gl.constexpr = b_desc.block_shape[1]
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    tiles_n = (n + BLOCK_N - 1) // BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, group)
        # What lies past the last column is zero.
        ROUND: gl.constexpr = BLOCK_K * (PROMOTE if PROMOTE > 0 else 1)
        for at in range(0, (k + ROUND - 1) // ROUND * ROUND, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            for c in gl.static_range(CONSUMERS):
                tma.async_load(
                    a_desc,
                    [row + c * ROWS, at],
                    bar,
                    a_bufs.index(stage * CONSUMERS + c),
                )
            tma.async_load(b_desc, [column, at], bar, b_bufs.index(stage))
            step += 1


@gluon.jit
def _product(
    acc,
    use_acc,
    release,
    a_bufs,
    b_bufs,
    ready,
    empty,
    step,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Start the product of a stage, and wait for the one before it."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    acc = warpgroup_mma(
        a_bufs.index(stage * CONSUMERS + CONSUMER),
        b_bufs.index(stage).permute((1, 0)),
        acc,
        use_acc=use_acc,
        is_async=True,
    )
    acc = warpgroup_mma_wait(1, deps=[acc])
    # The product before this one is done: its buffers may be filled again.
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=release)
    return acc


@gluon.jit
def _multiply(
    out_desc,
    a_bufs,
    b_bufs,
    out_bufs,
    ready,
    empty,
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
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,
):
    """A consumer: its rows of every tile, summed, scaled and written.

    Sums of int8 products are exact. Tensor cores add those of e4m3 up in 14 bits or so, cutting off
    what is below: after PROMOTE stages, the sum is added to one in float32.
    """
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    BLOCK_N: gl.constexpr = b_bufs.shape[1]
    BLOCK_K: gl.constexpr = b_bufs.shape[2]
    INT8: gl.constexpr = a_bufs.dtype == gl.int8
    # Triton has no wider instruction for int8.
    WIDEST: gl.constexpr = 128 if INT8 else 256
    WIDTH: gl.constexpr = BLOCK_N if BLOCK_N < WIDEST else WIDEST
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    out_buf = out_bufs.index(CONSUMER)
    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    tiles_n = (n + BLOCK_N - 1) // BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, group)
        row += CONSUMER * ROWS
        acc = gl.zeros((ROWS, BLOCK_N), SUM, LAYOUT)
        if PROMOTE == 0:
            steps = (k + BLOCK_K - 1) // BLOCK_K
            for i in range(steps):
                acc = _product(
                    acc,
                    True,
                    i > 0,
                    a_bufs,
                    b_bufs,
                    ready,
                    empty,
                    step,
                    CONSUMER,
                    CONSUMERS,
                    STAGES,
                )
                step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        else:
            part = gl.zeros((ROWS, BLOCK_N), SUM, LAYOUT)
            for _ in range((k + BLOCK_K * PROMOTE - 1) // (BLOCK_K * PROMOTE)):
                for i in gl.static_range(PROMOTE):
                    part = _product(
                        part,
                        i > 0,
                        i > 0,
                        a_bufs,
                        b_bufs,
                        ready,
                        empty,
                        step,
                        CONSUMER,
                        CONSUMERS,
                        STAGES,
                    )
                    step += 1
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
                acc += part

        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        a_scale = gl.load(a_scale_ptr + rows * a_scale_stride, rows < m, 0.0)
        b_scale = gl.load(b_scale_ptr + columns, columns < n, 0.0)
        value = acc.to(gl.float32) * a_scale[:, None] * b_scale[None, :]
        if has_bias:
            value += gl.load(bias_ptr + columns, columns < n, 0.0)[None, :]
        if out_kind == 0:
            bits = value.to(gl.float16).to(gl.int16, bitcast=True)
        else:
            bits = value.to(gl.bfloat16).to(gl.int16, bitcast=True)
        tma.store_wait(0)
        out_buf.store(bits)
        fence_async_shared()
        # What lies past the last row or column is not written.
        tma.async_store(out_desc, [row, column], out_buf)
    tma.store_wait(0)


@gluon.jit
def gemm_hopper(
    a_desc,
    b_desc,
    out_desc,
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
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,
):
    """out[m, n] = float(a[m, k] · b[n, k]ᵀ) · a_scale[m] · b_scale[n] + bias[n].

    As ``gemm.gemm``, without float32 results: out_kind is 0 or 1.
    """
    gl.static_assert(gl.num_warps() == 4)
    ROWS: gl.constexpr = a_desc.block_shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_shape[0]
    BLOCK_K: gl.constexpr = b_desc.block_shape[1]
    a_bufs = gl.allocate_shared_memory(
        a_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], a_desc.layout
    )
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    out_bufs = gl.allocate_shared_memory(gl.int16, [CONSUMERS, ROWS, BLOCK_N], out_desc.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        out_desc,
                        a_bufs,
                        b_bufs,
                        out_bufs,
                        ready,
                        empty,
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
                        0,
                        CONSUMERS,
                        STAGES,
                        PROMOTE,
                    ),
                ),
                (
                    _load,
                    (
                        a_desc,
                        b_desc,
                        a_bufs,
                        b_bufs,
                        ready,
                        empty,
                        m,
                        n,
                        k,
                        group,
                        CONSUMERS,
                        STAGES,
                        PROMOTE,
                    ),
                ),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        out_desc,
                        a_bufs,
                        b_bufs,
                        out_bufs,
                        ready,
                        empty,
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
                        0,
                        CONSUMERS,
                        STAGES,
                        PROMOTE,
                    ),
                ),
                (
                    _multiply,
                    (
                        out_desc,
                        a_bufs,
                        b_bufs,
                        out_bufs,
                        ready,
                        empty,
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
                        1,
                        CONSUMERS,
                        STAGES,
                        PROMOTE,
                    ),
                ),
                (
                    _load,
                    (
                        a_desc,
                        b_desc,
                        a_bufs,
                        b_bufs,
                        ready,
                        empty,
                        m,
                        n,
                        k,
                        group,
                        CONSUMERS,
                        STAGES,
                        PROMOTE,
                    ),
                ),
            ],
            [4, 1],
            [232, 24],
        )
