"""Scales of output channels in the integer kernel, and behind it: one token, and a prompt.

    python -m benchmarks.columns --json columns.json

Every product is there as many times as it takes to be more than a core's cache. Ratios of medians,
taken in turn in one process, whose threads sleep between runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from qcompile.passes.constants import constant
from qcompile.passes.integer_matmul import CONTRIB, KERNEL
from qcompile.passes.scale_columns import ScaleColumns

from benchmarks.common import publish
from qcompile.timing import runner, steady_medians

SIZES = (
    (512, 512),
    (512, 2816),
    (512, 8192),
    (1024, 4096),
    (1024, 6144),
    (2048, 3072),
    (2048, 16384),
    (8192, 2048),
)
BYTES = 12 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table: list[dict[str, Any]] = []
    for depth, width in SIZES:
        row: dict[str, Any] = {"in × out": f"{depth} × {width}"}
        for threads in given.threads:
            sessions = {
                name: _session(_model(depth, width, behind=name == "behind"), threads)
                for name in ("inside", "behind")
            }
            for rows in given.rows:
                feed = {"x": np.full((1, rows, depth), 7, np.uint8)}
                runs = {name: runner(session, feed) for name, session in sessions.items()}
                seconds = steady_medians(runs, min_rounds=50, max_rounds=1000, seconds=5.0)
                row[f"{rows} rows, threads {threads}"] = seconds["inside"] / seconds["behind"]
        table.append(row)
    publish("Speed with scales behind the kernel, relative to inside", table, given.json)


def _model(depth: int, width: int, *, behind: bool) -> ir.Model:
    rng = np.random.default_rng(0)
    x = ir.Value(
        name="x", shape=ir.Shape([1, "rows", depth]), type=ir.TensorType(ir.DataType.UINT8)
    )
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23, CONTRIB: 1}, name="columns")
    scale = constant(graph, "s", np.float32(0.02))
    zero_point = constant(graph, "z", np.uint8(128))
    first = constant(graph, "first", np.zeros(3, np.int64))
    corner = constant(graph, "corner", np.ones(3, np.int64))
    for at in range(-(-BYTES // (depth * width))):
        codes = constant(graph, f"w{at}", rng.integers(-63, 64, (depth, width)).astype(np.int8))
        columns = constant(graph, f"t{at}", rng.uniform(0.01, 0.02, width).astype(np.float32))
        tape = ir.tape.Tape()
        product = tape.op(KERNEL, [x, codes, scale, columns, zero_point], domain=CONTRIB)
        y = tape.op("Slice", [product, first, corner])  # no output is copied
        product.name, y.name, y.dtype = f"p{at}", f"y{at}", ir.DataType.FLOAT
        for node in tape.nodes:
            node.name = f"{node.op_type}{at}"
        graph.extend(list(tape.nodes))
        graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    if behind:
        ScaleColumns([str(node.name) for node in graph])(model)
    return model


def _session(model: ir.Model, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    main()
