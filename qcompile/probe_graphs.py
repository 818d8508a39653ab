"""The graphs that are timed: small, of equal ops, as a frontend would give them."""

from __future__ import annotations

import dataclasses
import re
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.e4m3 import E4M3
from qcompile.float4 import as_float4, quantize_float4
from qcompile.linears import find_linears
from qcompile.makers import NORMS, Maker
from qcompile.outliers import Split
from qcompile.passes.constants import constant
from qcompile.precision import (
    ActivationQuant,
    Choice,
    Floats,
    Kept,
    Label,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
)
from qcompile.weight_blocks import BITS, BLOCK_SIZE

RANDOM: Final = 1 << 16
"""Random numbers that tensors are filled with, over and over: what they hold does not change how
long they take."""

_OUTLIERS, _COPIES = 4, 4
"""Of a split that is timed: a usual one."""
_KEPT = 64
"""One of as many input channels stays in float where that is timed."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Linear as the kernel sees it: rows × depth × width, with a bias or without."""

    rows: int
    depth: int
    width: int
    bias: bool

    def key(self, label: str) -> str:
        """Of its time in a cost table."""
        return f"{label} {self.rows}x{self.depth}x{self.width}{'+bias' if self.bias else ''}"


def linear_graph(shape: Shape, copies: int, *, sites: int, corners: bool = True) -> ir.Model:
    """`copies` Linears that read one of `sites` inputs each, of any number of rows; of each result
    a corner goes out, or all of it."""
    inputs = [_activation(f"x{at}", shape.depth) for at in range(sites)]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23}, name="probe")
    block = np.random.default_rng(0).standard_normal(RANDOM, np.float32)
    weight = np.resize(block, (shape.depth, shape.width))
    for at in range(copies):
        tape = ir.tape.Tape()
        y = tape.op("MatMul", [inputs[at % sites], constant(graph, f"w{at}", weight)])
        if shape.bias:
            y = tape.op("Add", [y, constant(graph, f"b{at}", weight[0] + at)])
        y.name, y.dtype = f"y{at}", ir.DataType.FLOAT
        y.shape = ir.Shape([1, "rows", shape.width])
        for node in tape.nodes:
            node.name = f"op{at}" if node.op_type == "MatMul" else f"op{at}/{node.op_type}"
        graph.extend(list(tape.nodes))
        graph.outputs.append(y)
    if corners:
        _cut_corners(graph)
    return ir.Model(graph, ir_version=10)


def maker_graph(maker: Maker, depth: int, copies: int) -> ir.Model:
    """`copies` of what makes an activation, each read by a Linear; sums of norms go from one to the
    next, as in a model."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="probe")
    weight = constant(graph, "w", np.ones((depth, 16), np.float32))
    ones = constant(graph, "ones", np.ones(depth, np.float32))
    total = _activation("x", depth)
    if maker in NORMS:
        graph.inputs.append(total)
    for at in range(copies):
        tape = ir.tape.Tape()
        h = _activation(f"x{at}", depth)
        graph.inputs.append(h)
        if maker in NORMS:
            total = tape.op("Add", [total, h])
            vectors = [ones, ones] if maker == "LayerNormalization" else [ones]
            y = tape.op(maker, [total, *vectors], {"axis": -1})
        else:
            function = maker.removeprefix("Gated")
            y = (
                tape.op("Mul", [h, tape.op("Sigmoid", [h])])
                if function == "Silu"
                else tape.op(function, [h])
            )
        if maker.startswith("Gated"):
            up = _activation(f"up{at}", depth)
            graph.inputs.append(up)
            y = tape.op("Mul", [y, up])
        product = tape.op("MatMul", [y, weight])
        for number, node in enumerate(tape.nodes):
            value = node.outputs[0]
            node.name = f"op{at}" if value is product else f"op{at}/{number}"
            value.name, value.dtype = f"op{at}/y{number}", ir.DataType.FLOAT
            value.shape = ir.Shape([1, "rows", 16 if value is product else depth])
        graph.extend(list(tape.nodes))
        graph.outputs.append(product)
    return ir.Model(graph, ir_version=10)


def _activation(name: str, depth: int) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape([1, "rows", depth]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )


def plan_of(model: ir.Model, label: Label, floats: Floats) -> PrecisionPlan:
    """Every Linear of a probe as `label`, with codes of no meaning."""
    if label == "float":
        return PrecisionPlan(floats=floats)
    ops, sites = [], []
    by_input: dict[ir.Value, list[str]] = {}
    precision = Choice(label, "").precision
    linears = find_linears(model.graph)
    bits = BITS.get(precision, 8)
    half = 2 ** (bits - 1)
    block = np.random.default_rng(1).integers(1 - half, half, RANDOM, np.int8)
    codes = np.resize(block, (linears[0].in_features, linears[0].out_features))
    if precision == "fp8":
        codes = codes.astype(E4M3)
    split = None
    if label == "split":
        split = Split(np.arange(_OUTLIERS), max(1, min(_COPIES, len(codes) // 8 // _OUTLIERS)))
        codes = split.extend(codes)
    kept = None
    if label == "llm-int8":
        channels = np.arange(0, len(codes), _KEPT)
        kept = Kept(channels, np.ones((len(channels), codes.shape[1]), np.float32))
        codes = codes.copy()
        codes[channels] = 0
    for linear in linears:
        depth, width = linear.in_features, linear.out_features
        size = BLOCK_SIZE if precision in BITS else None
        scale = np.full((-(-depth // size), width) if size else width, 0.01, np.float32)
        weight = QuantizedWeight(codes, scale, size, bits, kept=kept)
        if (kind := as_float4(label)) is not None:
            weight = quantize_float4(codes.astype(np.float32), kind)
        name = linear.name
        ops.append(OpPlan(name, str(linear.x.name), precision, "", depth, width, "", weight))
        by_input.setdefault(linear.x, []).append(name)
    for x, names in by_input.items():
        mode = Choice(label, "").mode
        if mode is not None:
            activation = ActivationQuant(
                mode,
                0.05 if mode == "static" else None,
                128 if mode == "static" and precision == "int8" else None,
                np.full(len(codes), 255),
                split,
                fp8=precision == "fp8",
                kept=kept.channels if kept is not None else None,
            )
            sites.append(SitePlan(str(x.name), str(x.name), activation, tuple(names)))
    return PrecisionPlan(tuple(sites), tuple(ops), floats)


def uncast_inputs(graph: ir.Graph) -> None:
    """An input that is only read cast is given so: in a model, what makes it gives it so."""
    for value in graph.inputs:
        casts = [use.node for use in value.uses()]
        types = {node.attributes.get_int("to", 0) for node in casts if node.op_type == "Cast"}
        if len(types) != 1 or any(node.op_type != "Cast" for node in casts):
            continue
        for node in casts:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
        value.type = ir.TensorType(ir.DataType(types.pop()))


def cut_to_activations(model: ir.Model, corners: bool) -> None:
    """Leave what makes the kernels' first inputs; of each a corner goes out, or all of it."""
    graph = model.graph
    names = {str(node.name): node for node in graph}
    kernels = [node for name, node in names.items() if re.fullmatch(r"op\d+", name)]
    graph.outputs.clear()
    for node in kernels:
        value = node.inputs[0]
        assert value is not None
        value.type = value.type or ir.TensorType(ir.DataType.UINT8)
        graph.outputs.append(value)
    if corners:
        _cut_corners(graph)
    RemoveUnusedNodesPass()(model)


def _cut_corners(graph: ir.Graph) -> None:
    """Let out a corner of each output in its place."""
    zeros = constant(graph, "zeros", np.zeros(3, np.int64))
    ends = constant(graph, "ends", np.ones(3, np.int64))
    for at, whole in enumerate(list(graph.outputs)):
        tape = ir.tape.Tape()
        corner = tape.op("Slice", [whole, zeros, ends])
        corner.name, corner.type = f"{whole.name}/corner", whole.type
        for made in tape.nodes:
            made.name = f"corner{at}"
        graph.extend(list(tape.nodes))
        graph.outputs[at] = corner
