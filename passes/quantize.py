"""Write a precision plan into the graph, as standard QuantizeLinear / DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused
from qcompile.passes.per_token import DEQUANTIZE, DOMAIN, QUANTIZE, per_token_functions

from qcompile.linears import Linear, find_linears
from qcompile.names import set_module_path
from qcompile.precision import OpPlan, PrecisionPlan, SitePlan


class Quantize(ir.passes.InPlacePass):
    """Quantise activations once per site, weights per output channel.

    1. static: ``x -> QuantizeLinear -> DequantizeLinear``, constant uint8 scale and zero_point
    2. dynamic: ``x -> DynamicQuantizeLinear -> DequantizeLinear``
    3. token: ``x -> qcompile.QuantizePerToken -> qcompile.DequantizePerToken``, model-local
       functions with bodies in standard ops

    and each planned MatMul reads ``DequantizeLinear(codes, scale, axis=1)`` for its weight. The
    result is a valid ONNX model that any runtime computes; a target replaces it by kernels.
    """

    def __init__(self, plan: PrecisionPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = {linear.name: linear for linear in find_linears(model.graph)}
        if not any(name in linears for site in self.plan.sites for name in site.ops):
            return ir.passes.PassResult(model, modified=False)
        for name, linear in linears.items():
            # A second call of a module must not take the first one's name once that is quantised.
            set_module_path(linear.matmul, name)
        for site in self.plan.sites:
            present = [linears[name] for name in site.ops if name in linears]
            if present:
                self._quantize_site(model, site, present)
        drop_unused(model)
        return ir.passes.PassResult(model, modified=True)

    def _quantize_site(self, model: ir.Model, site: SitePlan, linears: list[Linear]) -> None:
        graph = model.graph
        x = linears[0].x
        first = min((linear.matmul for linear in linears), key=list(graph).index)
        tape = ir.tape.Tape()
        x_hat = _quantize_activation(tape, graph, site, x)
        x_hat.shape, x_hat.dtype = x.shape, ir.DataType.FLOAT
        if site.activation.mode == "token":
            for function in per_token_functions():
                model.functions.setdefault(function.identifier(), function)
            graph.opset_imports[DOMAIN] = 1
        for node in tape.nodes:
            node.name = f"{site.name}/{node.op_type}"
        graph.insert_before(first, list(tape.nodes))
        for linear in linears:
            self._quantize_weight(graph, linear, self.plan.op(linear.name), x_hat)

    def _quantize_weight(
        self, graph: ir.Graph, linear: Linear, op: OpPlan, x_hat: ir.Value
    ) -> None:
        weight = op.weight
        assert weight is not None, f"{op.name} is planned int8 without codes"
        codes = constant(graph, f"{op.name}.weight_int8", weight.codes)
        scale = constant(graph, f"{op.name}.weight_scale", weight.scale)
        tape = ir.tape.Tape()
        w_hat = tape.op("DequantizeLinear", [codes, scale], {"axis": 1})
        w_hat.shape = ir.Shape(weight.codes.shape)
        w_hat.dtype = ir.DataType.FLOAT
        for node in tape.nodes:
            node.name = f"{op.name}/weight/{node.op_type}"
        graph.insert_before(linear.matmul, list(tape.nodes))
        linear.matmul.replace_input_with(0, x_hat)
        linear.matmul.replace_input_with(1, w_hat)


def _quantize_activation(
    tape: ir.tape.Tape, graph: ir.Graph, site: SitePlan, x: ir.Value
) -> ir.Value:
    activation = site.activation
    if activation.mode == "token":
        codes, scale = tape.op_multi_out(QUANTIZE, [x], num_outputs=2, domain=DOMAIN)
        return tape.op(DEQUANTIZE, [codes, scale], domain=DOMAIN)
    if activation.mode == "dynamic":
        codes, scale, zero_point = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        return tape.op("DequantizeLinear", [codes, scale, zero_point])
    assert activation.scale is not None and activation.zero_point is not None
    parameters = [
        constant(graph, f"{site.name}.scale", np.array(activation.scale, np.float32)),
        constant(graph, f"{site.name}.zero_point", np.array(activation.zero_point, np.uint8)),
    ]
    return tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [x, *parameters]), *parameters])
