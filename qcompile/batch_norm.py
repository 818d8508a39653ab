"""BatchNormalization that no op before it can take in, and why."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.linears import is_constant
from qcompile.names import module_path


def batch_norm_obstacle(node: ir.Node) -> str | None:
    """Why a BatchNormalization stays where it is, or None where `FoldAffine` takes it."""
    x = node.inputs[0]
    if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
        return "it computes statistics of its own"
    if not all(is_constant(value) for value in node.inputs[1:5]):
        return "its parameters are computed, not constants"
    producer = x.producer() if x is not None else None
    if x is None or producer is None:
        return "it normalises an input of the graph"
    if len(x.uses()) > 1 or x.is_graph_output():
        return f"what it normalises ({x.name}) is read elsewhere too"
    if producer.op_type == "Conv":
        return None if is_constant(producer.inputs[1]) else "the weight before it is computed"
    if producer.op_type in ("Add", "MatMul"):
        if x.shape is not None and len(x.shape) == 2:
            return None
        return "its channels are not the last axis of the Linear before it"
    return f"{producer.op_type} is before it, which is no Conv and no Linear"


def unfolded(graph: ir.Graph) -> list[str]:
    """A sentence for every BatchNormalization of `graph`, to be asked after `FoldAffine`."""
    sentences = []
    for node in graph:
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            reason = batch_norm_obstacle(node) or "no constant weight is before it"
            name = module_path(node) or node.name
            sentences.append(f"{name}: BatchNormalization was not folded: {reason}")
    return sentences
