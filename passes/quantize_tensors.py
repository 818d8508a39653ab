"""Write an edge plan into the graph: QuantizeLinear and DequantizeLinear around tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused

from qcompile.edge.plan import DTYPES, ConstantQuant, EdgePlan, TensorQuant


class QuantizeTensors(ir.passes.InPlacePass):
    """Give planned tensors codes.

    1. activation: ``x -> QuantizeLinear -> DequantizeLinear``, once. All read the result where a
       quantised op computes x, graph outputs too, whose names stay; else only quantised ops do.
    2. constant: ``DequantizeLinear(codes, scale, [zero_point], [axis])`` at the input that reads it

    The order of nodes is kept; names of new ones begin with the tensor's or the node's.
    """

    def __init__(self, plan: EdgePlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = {str(node.name): node for node in graph}
        values = ir.convenience.create_value_mapping(graph)
        inside = {name for unit in self.plan.quantized for name in unit.nodes}
        modified = False
        for tensor in self.plan.tensors:
            modified |= _quantize(graph, values[tensor.value], tensor, inside)
        for operand in self.plan.constants:
            modified |= _dequantize(graph, nodes[operand.node], operand)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _quantize(graph: ir.Graph, x: ir.Value, tensor: TensorQuant, inside: set[str]) -> bool:
    producer = x.producer()
    done = (f"{tensor.value}/QuantizeLinear", f"{tensor.value}/DequantizeLinear")
    if any(node.name == done[0] for node in x.consumers()) or (
        producer is not None and producer.name == done[1]
    ):
        return False
    everywhere = producer is not None and producer.name in inside
    readers = [(node, index) for node, index in x.uses() if everywhere or node.name in inside]
    is_output = everywhere and x.is_graph_output()
    tape = ir.tape.Tape()
    name = str(x.name)
    parameters = [
        constant(graph, f"{name}.scale", np.array(tensor.scale, np.float32)),
        constant(graph, f"{name}.zero_point", np.array(tensor.zero_point, DTYPES[tensor.code])),
    ]
    codes = tape.op("QuantizeLinear", [x, *parameters])
    x_hat = tape.op("DequantizeLinear", [codes, *parameters])
    codes.shape = x_hat.shape = x.shape
    codes.type, x_hat.type = parameters[1].type, ir.TensorType(ir.DataType.FLOAT)
    for node in tape.nodes:
        node.name = f"{name}/{node.op_type}"
    if producer is not None:
        graph.insert_after(producer, list(tape.nodes))
    else:
        graph.insert_before(graph[0], list(tape.nodes))
    for node, index in readers:
        node.replace_input_with(index, x_hat)
    if is_output:
        graph.outputs[:] = [x_hat if value is x else value for value in graph.outputs]
        x.name, x_hat.name = f"{name}/float", name
    codes.name = f"{name}/codes"
    if not is_output:
        x_hat.name = f"{name}/dequantized"
    return True


def _dequantize(graph: ir.Graph, node: ir.Node, operand: ConstantQuant) -> bool:
    source = node.inputs[operand.index]
    if source is None or source.name != operand.value:
        return False
    name = f"{operand.node}.{operand.value}"
    if any(v is not None and v.name == f"{name}/dequantized" for v in node.inputs):
        name = f"{name}.{operand.index}"  # Concat may read one constant twice
    dtype = DTYPES[operand.code]
    parameters = [
        constant(graph, f"{name}.{operand.code}", operand.codes.astype(dtype)),
        constant(graph, f"{name}.scale", operand.scale.astype(np.float32)),
    ]
    if operand.zero_point is not None:
        points = operand.zero_point.astype(dtype)
        parameters.append(constant(graph, f"{name}.zero_point", points))
    attributes = {} if operand.axis is None else {"axis": operand.axis}
    tape = ir.tape.Tape()
    value = tape.op("DequantizeLinear", parameters, attributes)
    value.name, value.dtype = f"{name}/dequantized", ir.DataType.FLOAT
    value.shape = ir.Shape(operand.codes.shape)
    next(iter(tape.nodes)).name = f"{name}/DequantizeLinear"
    graph.insert_before(node, list(tape.nodes))
    node.replace_input_with(operand.index, value)
    return True
