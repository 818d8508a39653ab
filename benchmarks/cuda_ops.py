"""INT8 and FP8 GEMMs of the CUDA library against the provider's float16 MatMul, on the GPU at hand.

    python -m benchmarks.cuda_ops [--library PATH] [--json PATH] [--repeats N] [--provider]

For every shape, four graphs of the same layers, each layer with weights of its own, and the right
column once more in FP8:

    gemm     MatMul                        MatMulInt8, activations already codes
    alone    MatMul                        QuantizeInt8, MatMulInt8
    norm     LayerNormalization, MatMul    LayerNormInt8, MatMulInt8
    relu     Relu, MatMul                  ActivationInt8, MatMulInt8

`--provider` adds ONNX Runtime's own GemmFloat8 to `gemm`, without scales per token and channel.

Inputs and outputs are bound to GPU memory; the sessions run in turns in one
process, every run is synchronised, and the medians are compared. `captured` is the same under CUDA
graph capture, where the host's time for a node does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

ROWS: Final = (1, 16, 64, 256, 2048, 8192)
WEIGHTS: Final = ((4096, 4096), (4096, 16384), (16384, 4096))
"""Input and output channels."""
KINDS: Final = ("gemm", "alone", "norm", "relu")
BYTES_OF_WEIGHTS: Final = 400e6
"""Of int8, in one graph: several times the GPU's cache, so that no weight stays in it."""


CODES: Final = {"int8": ("Int8", "int8"), "fp8": ("Fp8", "float8e4m3fn")}
"""Suffix of the operators, and type of the codes."""
PROVIDER: Final = "GemmFloat8"
E4M3: Final = 17
"""ONNX's number of it; ONNX Runtime takes its bytes."""


def text_of(kind: str, m: int, k: int, n: int, layers: int, side: str) -> str:
    """The graph as ONNX text: `layers` independent layers on one input."""
    inputs = [f"float16[{m}, {k}] x"]
    outputs, body = [], []
    coded = side in CODES
    suffix, element = CODES.get(side, ("", "float8e4m3fn"))
    if kind == "gemm" and side != "float16":
        inputs = [f"{element}[{m}, {k}] codes", f"float[{m}, 1] scale"]
    for i in range(layers):
        outputs.append(f"float16[{m}, {n}] y{i}")
        source = {"gemm": "x", "alone": "x", "norm": f"h{i}", "relu": f"h{i}"}[kind]
        if kind == "norm":
            inputs += [f"float16[{k}] g{i}", f"float16[{k}] b{i}"]
        if side == PROVIDER:
            inputs += [f"{element}[{n}, {k}] w{i}", f"float[1] s{i}"]
            inputs = [item for item in inputs if item != f"float[{m}, 1] scale"]
            options = "transA=0, transB=1, dtype=10"
            body.append(f'y{i} = com.microsoft.{PROVIDER}<{options}>(codes, w{i}, "", s{i}, s{i})')
            continue
        if not coded:
            inputs.append(f"float16[{k}, {n}] w{i}")
            if kind == "norm":
                body.append(f"h{i} = LayerNormalization<axis=-1, epsilon=1e-5>(x, g{i}, b{i})")
            elif kind == "relu":
                # Layers must differ, or they are computed once.
                inputs.append(f"float16[{m}, {k}] x{i}")
                body.append(f"h{i} = Relu(x{i})")
            body.append(f"y{i} = MatMul({source}, w{i})")
            continue
        inputs += [f"{element}[{n}, {k}] w{i}", f"float[{n}] s{i}"]
        made = f"c{i}, t{i}"
        if kind == "gemm":
            made = ""
        elif kind == "alone":
            inputs.append(f"float16[{m}, {k}] x{i}")
            body.append(f"{made} = qcompile.Quantize{suffix}(x{i})")
        elif kind == "norm":
            body.append(f"{made} = qcompile.LayerNorm{suffix}<epsilon=1e-5>(x, g{i}, b{i})")
        else:
            inputs.append(f"float16[{m}, {k}] x{i}")
            body.append(f'{made} = qcompile.Activation{suffix}<kind="relu", packed=0>(x{i})')
        codes = made or "codes, scale"
        body.append(f"y{i} = qcompile.MatMul{suffix}<dtype=10>({codes}, w{i}, s{i})")
    if kind in ("alone", "relu") and (coded or kind == "relu"):
        inputs = [item for item in inputs if not item.endswith("] x")]
    return (
        '<ir_version: 10, opset_import: ["" : 23, "qcompile" : 1, "com.microsoft" : 1]>\n'
        f"layers ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n" + "\n".join(body) + "\n}"
    )


class Bound:
    """A session with its inputs and outputs bound to GPU memory."""

    def __init__(self, text: str, library: Path, pool: dict[str, Any], captured: bool) -> None:
        settings = ort.SessionOptions()
        settings.register_custom_ops_library(str(library))
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings.log_severity_level = 3
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1" if captured else "0"})
        self.session = ort.InferenceSession(
            ir.to_proto(ir.from_onnx_text(text)).SerializeToString(), settings, [provider]
        )
        self.binding = self.session.io_binding()
        for value in self.session.get_inputs():
            here = memory(pool, value, "in")
            if is_e4m3(value):
                self.binding.bind_input(value.name, "cuda", 0, E4M3, value.shape, here.data_ptr())
            else:
                self.binding.bind_ortvalue_input(value.name, here)
        for value in self.session.get_outputs():
            self.binding.bind_ortvalue_output(value.name, memory(pool, value, "out"))
        for _ in range(3):
            self.session.run_with_iobinding(self.binding)

    def time(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def is_e4m3(value: Any) -> bool:
    """Whether an input takes bytes of e4m3."""
    return "float8" in value.type.lower()


def memory(pool: dict[str, Any], value: Any, role: str) -> Any:
    """GPU memory with random contents, kept by name, type and shape: graphs share it."""
    key = f"{role} {value.name} {value.type} {value.shape}"
    if key not in pool:
        rng = np.random.default_rng(len(pool))
        shape = tuple(value.shape)
        if is_e4m3(value):
            array = rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
        elif value.type == "tensor(int8)":
            array = rng.integers(-127, 128, shape, np.int8)
        elif value.type == "tensor(float16)":
            array = np.empty(shape, np.float16)
            block = (rng.standard_normal(1 << 16) * 0.3).astype(np.float16)
            array.reshape(-1)[:] = np.resize(block, array.size)
        else:
            array = (rng.random(shape) / 100).astype(np.float32)
        pool[key] = ort.OrtValue.ortvalue_from_numpy(array, "cuda")
    return pool[key]


def compare(
    kind: str,
    m: int,
    k: int,
    n: int,
    library: Path,
    repeats: int,
    captured: bool,
    pool: dict[str, Any],
    provider: bool,
) -> dict[str, Any]:
    """Median times of a layer in µs, the sessions in turns."""
    layers = int(max(2, min(8, BYTES_OF_WEIGHTS // (n * k))))
    names = ["float16", *CODES, *([PROVIDER] if provider and kind == "gemm" else [])]
    sides = {
        name: Bound(text_of(kind, m, k, n, layers, name), library, pool, captured) for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side.time() / layers * 1e6)
    medians = {name: statistics.median(kept) for name, kept in times.items()}
    return {
        "kind": kind,
        "m": m,
        "k": k,
        "n": n,
        "captured": captured,
        "layers": layers,
        "us": medians,
        "ratios": {name: medians["float16"] / each for name, each in medians.items()},
        "quarters": {name: statistics.quantiles(kept, n=4) for name, kept in times.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="built here when it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--provider", action="store_true", help="time GemmFloat8, too")
    parser.add_argument("--plain", action="store_true", help="nothing under capture")
    arguments = parser.parse_args()
    library = arguments.library
    if library is None:
        from qcompile.targets.cuda.build import build

        library = build()
    rows = []
    for k, n in WEIGHTS:
        pool: dict[str, Any] = {}
        for captured, m in itertools.product((False, True)[: 2 - arguments.plain], ROWS):
            provider = arguments.provider and not captured
            made = [
                compare(kind, m, k, n, library, arguments.repeats, captured, pool, provider)
                for kind in KINDS
            ]
            rows += made
            cells = "  ".join(
                f"{r['kind']} {r['us']['float16']:7.1f}"
                + "".join(f" {ratio:.2f}x" for ratio in list(r["ratios"].values())[1:])
                for r in made
            )
            mode = "captured" if captured else "plain   "
            print(f"{mode} M={m:5d} K={k:5d} N={n:5d}  {cells}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
