"""INT8 GEMMs of the CUDA library against the provider's float16 MatMul, on the GPU at hand.

    python -m benchmarks.cuda_ops [--library PATH] [--json PATH] [--repeats N]

For every shape, four graphs of the same layers, each layer with weights of its own:

    gemm     MatMul                        MatMulInt8, activations already codes
    alone    MatMul                        QuantizeInt8, MatMulInt8
    norm     LayerNormalization, MatMul    LayerNormInt8, MatMulInt8
    relu     Relu, MatMul                  ActivationInt8, MatMulInt8

Inputs and outputs are bound to GPU memory; the float16 and the INT8 session run in turns in one
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


def text_of(kind: str, m: int, k: int, n: int, layers: int, int8: bool) -> str:
    """The graph as ONNX text: `layers` independent layers on one input."""
    inputs = [f"float16[{m}, {k}] x"]
    outputs, body = [], []
    if int8 and kind == "gemm":
        inputs = [f"int8[{m}, {k}] codes", f"float[{m}, 1] scale"]
    for i in range(layers):
        outputs.append(f"float16[{m}, {n}] y{i}")
        source = {"gemm": "x", "alone": "x", "norm": f"h{i}", "relu": f"h{i}"}[kind]
        if kind == "norm":
            inputs += [f"float16[{k}] g{i}", f"float16[{k}] b{i}"]
        if not int8:
            inputs.append(f"float16[{k}, {n}] w{i}")
            if kind == "norm":
                body.append(f"h{i} = LayerNormalization<axis=-1, epsilon=1e-5>(x, g{i}, b{i})")
            elif kind == "relu":
                # Layers must differ, or they are computed once.
                inputs.append(f"float16[{m}, {k}] x{i}")
                body.append(f"h{i} = Relu(x{i})")
            body.append(f"y{i} = MatMul({source}, w{i})")
            continue
        inputs += [f"int8[{n}, {k}] w{i}", f"float[{n}] s{i}"]
        made = f"c{i}, t{i}"
        if kind == "gemm":
            made = ""
        elif kind == "alone":
            inputs.append(f"float16[{m}, {k}] x{i}")
            body.append(f"{made} = qcompile.QuantizeInt8(x{i})")
        elif kind == "norm":
            body.append(f"{made} = qcompile.LayerNormInt8<epsilon=1e-5>(x, g{i}, b{i})")
        else:
            inputs.append(f"float16[{m}, {k}] x{i}")
            body.append(f'{made} = qcompile.ActivationInt8<kind="relu", packed=0>(x{i})')
        codes = made or "codes, scale"
        body.append(f"y{i} = qcompile.MatMulInt8<dtype=10>({codes}, w{i}, s{i})")
    if kind in ("alone", "relu") and (int8 or kind == "relu"):
        inputs = [item for item in inputs if not item.endswith("] x")]
    return (
        '<ir_version: 10, opset_import: ["" : 23, "qcompile" : 1]>\n'
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
            self.binding.bind_ortvalue_input(value.name, memory(pool, value, "in"))
        for value in self.session.get_outputs():
            self.binding.bind_ortvalue_output(value.name, memory(pool, value, "out"))
        for _ in range(3):
            self.session.run_with_iobinding(self.binding)

    def time(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def memory(pool: dict[str, Any], value: Any, role: str) -> Any:
    """GPU memory with random contents, kept by name, type and shape: graphs share it."""
    key = f"{role} {value.name} {value.type} {value.shape}"
    if key not in pool:
        rng = np.random.default_rng(len(pool))
        shape = tuple(value.shape)
        if value.type == "tensor(int8)":
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
) -> dict[str, Any]:
    """Median times of a layer in µs, the two sessions in turns."""
    layers = int(max(2, min(8, BYTES_OF_WEIGHTS // (n * k))))
    sides = [
        Bound(text_of(kind, m, k, n, layers, int8), library, pool, captured)
        for int8 in (False, True)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for side, kept in zip(sides, times, strict=True):
            kept.append(side.time() / layers * 1e6)
    half, int8 = (statistics.median(kept) for kept in times)
    return {
        "kind": kind,
        "m": m,
        "k": k,
        "n": n,
        "captured": captured,
        "layers": layers,
        "float16_us": half,
        "int8_us": int8,
        "ratio": half / int8,
        "quarters": [statistics.quantiles(kept, n=4) for kept in times],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="built here when it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    library = arguments.library
    if library is None:
        from qcompile.targets.cuda.build import build

        library = build()
    rows = []
    for k, n in WEIGHTS:
        pool: dict[str, Any] = {}
        for captured, m in itertools.product((False, True), ROWS):
            made = [
                compare(kind, m, k, n, library, arguments.repeats, captured, pool) for kind in KINDS
            ]
            rows += made
            cells = "  ".join(
                f"{r['kind']} {r['float16_us']:7.1f} {r['int8_us']:7.1f} {r['ratio']:.2f}x"
                for r in made
            )
            mode = "captured" if captured else "plain   "
            print(f"{mode} M={m:5d} K={k:5d} N={n:5d}  {cells}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
