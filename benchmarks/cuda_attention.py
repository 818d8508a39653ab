"""Causal attention on the GPU at hand: every kernel that ONNX Runtime's CUDA provider has for it.

    python -m benchmarks.cuda_attention [--json PATH]

Eight layers in float16, each reading the one before it; inputs and outputs are bound to GPU memory;
medians of a layer, the kernels in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.bound import Timed

LAYERS: Final = 8
HEADS, SIZE = 32, 128
SHAPES: Final = ((1, 2048), (8, 512))
"""Batch and sequence."""

KERNELS: Final = {
    "MultiHeadAttention": "com.microsoft.MultiHeadAttention<num_heads={heads}, unidirectional=1>"
    "({x}, {k}, {v})",
    "GroupQueryAttention": "com.microsoft.GroupQueryAttention<num_heads={heads}, "
    "kv_num_heads={groups}>({x}, {k}, {v}, , , lengths, total)",
    "Attention 23": "Attention<q_num_heads={heads}, kv_num_heads={groups}, is_causal=1>"
    "({x}, {k}, {v})",
    "Attention 24": "Attention<q_num_heads={heads}, kv_num_heads={groups}, is_causal=1>"
    "({x}, {k}, {v})",
}


def text_of(kernel: str, batch: int, sequence: int, groups: int) -> str:
    """The graph as ONNX text."""
    opset = 24 if kernel == "Attention 24" else 23
    narrow = groups * SIZE
    body, x = [], "q"
    for at in range(LAYERS):
        node = KERNELS[kernel].format(x=x, k="k", v="v", heads=HEADS, groups=groups)
        extra = f", key{at}, value{at}" if kernel == "GroupQueryAttention" else ""
        x = f"x{at}" if at < LAYERS - 1 else "y"
        body.append(f"{x}{extra} = {node}")
    return f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        layers (float16[{batch}, {sequence}, {HEADS * SIZE}] q,
                float16[{batch}, {sequence}, {narrow}] k,
                float16[{batch}, {sequence}, {narrow}] v)
          => (float16[{batch}, {sequence}, {HEADS * SIZE}] y)
          <int32[{batch}] lengths = {{{", ".join([str(sequence - 1)] * batch)}}},
           int32[1] total = {{{sequence}}}> {{
        {chr(10).join(body)}
        }}"""


class Bound(Timed):
    """A session on the GPU alone, its inputs and output bound."""

    def __init__(self, text: str, feed: dict[str, np.ndarray]) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        model = ir.to_proto(ir.from_onnx_text(text)).SerializeToString()
        self.session = ort.InferenceSession(model, settings, ["CUDAExecutionProvider"])
        self.binding = self.session.io_binding()
        for name, array in feed.items():
            value = ort.OrtValue.ortvalue_from_numpy(array, "cuda")
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_output("y", "cuda")
        self.warm_up()


def compare(batch: int, sequence: int, groups: int, repeats: int) -> list[dict[str, Any]]:
    """Median times of a layer in µs, or why there is none."""
    rng = np.random.default_rng(0)
    widths = {"q": HEADS * SIZE, "k": groups * SIZE, "v": groups * SIZE}
    feed = {
        name: rng.standard_normal((batch, sequence, width)).astype(np.float16)
        for name, width in widths.items()
    }
    sides: dict[str, Bound] = {}
    rows = []
    for kernel in KERNELS:
        row: dict[str, Any] = {
            "kernel": kernel, "batch": batch, "sequence": sequence, "groups": groups
        }  # fmt: skip
        if kernel == "MultiHeadAttention" and groups != HEADS:
            continue
        rows.append(row)
        try:
            sides[kernel] = Bound(text_of(kernel, batch, sequence, groups), feed)
        except Exception as error:  # onnxruntime raises its own, unexported types
            row["refused"] = str(error).strip().splitlines()[0]
    times: dict[str, list[float]] = {kernel: [] for kernel in sides}
    for _ in range(repeats):
        for kernel, side in sides.items():
            times[kernel].append(side.time() / LAYERS * 1e6)
    outputs = {kernel: side.output() for kernel, side in sides.items()}
    reference = next(iter(outputs.values()))
    for row in rows:
        kernel = row["kernel"]
        if kernel in sides:
            row["us"] = statistics.median(times[kernel])
            row["error"] = float(np.abs(outputs[kernel] - reference).max())
        print(row, flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for batch, sequence in SHAPES
        for groups in (HEADS, 8)
        for row in compare(batch, sequence, groups, arguments.repeats)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
