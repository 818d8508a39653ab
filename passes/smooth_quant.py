"""Apply a smoothing plan: SmoothQuant (arXiv 2211.10438), the scales folded into what is there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, derived, drop_unused

from qcompile.linears import Linear, find_linears
from qcompile.producers import Producer
from qcompile.smoothing import Array, Smoothing, SmoothingPlan

_DONE = "qcompile.smoothed"


class SmoothQuant(ir.passes.InPlacePass):
    """Divide an activation's channels by s, multiply the rows of every consumer's weight by s.

    The division is folded into what produces the activation:

    1. LayerNormalization / RMSNormalization: weight and bias divided by s
    2. a Linear, through scale-invariant ops: its output columns and bias divided by s
    3. nothing that is there, where the plan says that it pays: ``Mul(x, 1 / s)`` is inserted for
       the consumers alone

    In exact arithmetic the graph computes what it did. A smoothed consumer is marked in its
    metadata, so that a second run changes nothing.
    """

    def __init__(self, plan: SmoothingPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        # Nodes stay what they are, only their inputs change, so one view serves for all entries.
        linears = {linear.name: linear for linear in find_linears(model.graph)}
        for entry, producer, scale in self.plan.folded:
            modified |= _fold(model.graph, linears, entry, producer, scale)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _fold(
    graph: ir.Graph,
    linears: dict[str, Linear],
    entry: Smoothing,
    producer: Producer,
    producer_scale: Array,
) -> bool:
    consumers = [linears[name] for name in entry.consumers]
    if all(_DONE in c.matmul.metadata_props for c in consumers):
        return False
    scale = entry.scale.astype(np.float32)
    inverse = np.asarray(1.0 / producer_scale, np.float32)
    if producer.kind == "mul":
        _insert_mul(graph, consumers, entry.site, inverse)
    elif producer.kind == "norm":
        node = ir.convenience.create_value_mapping(graph)[producer.name].producer()
        assert node is not None
        for at in range(1, len(node.inputs)):
            _multiply(node, at, inverse)
    elif producer.kind == "linear":
        linear = linears[producer.name]
        _multiply(linear.matmul, 1, inverse[None, :])
        if linear.bias_add is not None:
            at = 0 if linear.bias_add.inputs[0] is not linear.matmul.outputs[0] else 1
            _multiply(linear.bias_add, at, inverse)
    for consumer in consumers:
        _multiply(consumer.matmul, 1, scale[:, None])
        consumer.matmul.metadata_props[_DONE] = entry.site
    return True


def _insert_mul(graph: ir.Graph, consumers: list[Linear], site: str, inverse: np.ndarray) -> None:
    x = consumers[0].x
    tape = ir.tape.Tape()
    scaled = tape.op("Mul", [x, constant(graph, f"{site}.inverse_smoothing", inverse)])
    scaled.shape, scaled.dtype = x.shape, ir.DataType.FLOAT
    scaled.name = f"{x.name}/smoothed"
    for node in tape.nodes:
        node.name = f"{site}/smooth"
    # All readers of x come after its producer, in whatever order.
    producer = x.producer()
    if producer is not None:
        graph.insert_after(producer, list(tape.nodes))
    else:
        graph.insert_before(graph[0], list(tape.nodes))
    for consumer in consumers:
        consumer.matmul.replace_input_with(0, scaled)


def _multiply(node: ir.Node, at: int, factor: np.ndarray) -> None:
    source = node.inputs[at]
    if source is None:
        return
    made = derived(source, "smoothed", lambda array: array * factor, source.shape)
    node.replace_input_with(at, made)
