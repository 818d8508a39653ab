"""Compile kernels ahead of time, without a GPU: Triton with an explicit target.

Triton is needed here and nowhere else: a library that is built runs without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from qcompile.targets.cuda.schema import Codes
from qcompile.targets.cuda.variants import Variant

from qcompile.errors import ConfigError

_ROW_SIGNATURES: Final = {
    "activation_rows": "x:*T up:*T static:*fp32 codes:*i8 scale:*fp32 columns:i32 x_stride:i64 "
    "up_stride:i64 kind:i32 has_up:i32 is_static:i32 is_fp8:i32",
    "norm_rows": "x:*T residual:*T weight:*T bias:*T static:*fp32 codes:*i8 scale:*fp32 sum:*T "
    "columns:i32 epsilon:fp32 is_rms:i32 has_residual:i32 has_bias:i32 has_sum:i32 "
    "is_static:i32 is_fp8:i32",
}
_GEMM_TAIL: Final = (
    "a_scale:*fp32 b_scale:*fp32 bias:*fp32 m:i32 n:i32 k:i32 a_scale_stride:i32 "
    "has_bias:i32 out_kind:i32 group:i32"
)
OLDEST_TRITON: Final = "3.9"

SOURCES: Final = ("aot.py", "kernels.py", "gemm.py", "gemm_hopper.py")
"""Modules that a cubin depends on, beside its variant and the version of Triton."""

_ELEMENTS: Final[dict[Codes, str]] = {"int8": "i8", "float8e4m3fn": "fp8e4nv"}
"""Of a GEMM, by Triton's names."""
_FIRST_FP8: Final = 89

_MULTIPLES: Final = ("columns", "n", "k", "x_stride", "up_stride")
"""Arguments that are multiples of 16, as pointers are: loads of 16 bytes depend on it."""


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        variant: what was compiled.
        entry: name of the function in the cubin.
        threads: of a block.
        shared: dynamic shared memory of a block, in bytes.
        boxes: shape of each tensor map's box, for kernels that load with bulk tensor copies.
        cubin: the code.
    """

    variant: Variant
    entry: str
    threads: int
    shared: int
    boxes: tuple[tuple[int, int], ...]
    cubin: bytes


def compile_all(variants: Iterable[Variant], cache: Path) -> Iterator[Binary]:
    """Every variant, compiled or from `cache`, in order.

    Raises:
        ConfigError: Triton is not installed.
    """
    source = hashlib.sha256(triton_version().encode())
    cache.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source.update((Path(__file__).parent / name).read_bytes())
    for variant in variants:
        key = hashlib.sha256(source.digest() + repr(variant).encode()).hexdigest()[:24]
        path = cache / f"{variant.name}-{key}.json"
        if not path.exists():
            _write_atomically(path, _compile(variant))
        stored = json.loads(path.read_text(encoding="utf-8"))
        yield Binary(
            variant=variant,
            entry=stored["entry"],
            threads=stored["threads"],
            shared=stored["shared"],
            boxes=tuple((rows, columns) for rows, columns in stored["boxes"]),
            cubin=bytes.fromhex(stored["cubin"]),
        )


def triton_version() -> str:
    """Of the Triton that compiles.

    Raises:
        ConfigError: it is not installed, or older than the kernels are written for.
    """
    hint = f'pip install "triton>={OLDEST_TRITON}"; only building needs it'
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "Triton is not installed: it compiles the CUDA kernels", hint=hint
        ) from error
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, OLDEST_TRITON.split("."))):
        raise ConfigError(f"Triton {found} is too old for the CUDA kernels", hint=hint)
    return found


def _compile(variant: Variant) -> str:
    # Line tables double the size of a cubin. Set before Triton reads it.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    import triton
    from triton.backends.compiler import GPUTarget

    options = {
        "num_warps": variant.warps,
        "maxnreg": variant.registers,
        "enable_fp_fusion": True,
    }
    if variant.tile is not None and not variant.tile.consumers:
        options["num_stages"] = variant.tile.stages
    source = _source(variant)
    with tempfile.TemporaryDirectory() as scratch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = scratch
        compiled = triton.compile(
            source, target=GPUTarget("cuda", variant.architecture, 32), options=options
        )
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise AssertionError(f"{variant.name} wants scratch memory, which nobody gives it")
    return json.dumps(
        {
            "entry": compiled.metadata.name,
            "threads": 32 * compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
            "boxes": [meta["block_size"] for meta in compiled.metadata.tensordesc_meta or ()],
            "cubin": compiled.asm["cubin"].hex(),
        }
    )


def _source(variant: Variant) -> Any:
    """The kernel with its signature and constants, as Triton's compiler takes it."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout

    tile = variant.tile
    element = _ELEMENTS[variant.codes]
    constants: dict[str, int]
    if tile is None:
        constants = {"BLOCK": variant.block, "FP8": variant.architecture >= _FIRST_FP8}
        signature = _ROW_SIGNATURES[variant.family].replace("*T", "*" + variant.dtype)
        module = "kernels"
    elif tile.consumers:
        constants = {
            "CONSUMERS": tile.consumers,
            "STAGES": tile.stages,
            "PROMOTE": tile.promote,
        }
        signature = f"a_desc:A b_desc:B out_desc:O {_GEMM_TAIL}"
        module = "gemm_hopper"
    else:
        constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
        signature = f"a:*{element} b:*{element} out:*i8 {_GEMM_TAIL}"
        module = "gemm"
    kernel = getattr(importlib.import_module(f"qcompile.targets.cuda.{module}"), variant.family)
    types: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, argument in enumerate(signature.split()):
        name, _, kind = argument.partition(":")
        if tile is not None and kind in ("A", "B", "O"):
            rows = tile.columns if kind == "B" else tile.rows
            columns = tile.columns if kind == "O" else tile.depth
            bits = 16 if kind == "O" else 8
            layout = NVMMASharedLayout(min(columns * bits // 8, 128), bits, 2)
            kind = f"tensordesc<{'i16' if kind == 'O' else element}[{rows}, {columns}],{layout!r}>"
        types[kernel.arg_names[index]] = kind
        if kind.startswith("*") or name in _MULTIPLES:
            attributes[(index,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(constants, "constexpr")
    kind_of_source = GluonASTSource if tile is not None and tile.consumers else ASTSource
    return kind_of_source(kernel, types, constants, attributes)


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
