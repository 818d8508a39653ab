"""Write a precision plan into the graph, as standard QuantizeLinear / DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, shared_constant
from qcompile.passes.per_token import DEQUANTIZE, DOMAIN, E4M3, QUANTIZE, per_token_functions
from qcompile.passes.table_codes import NAME, table_function

from qcompile.e4m3 import E4M3 as CODES
from qcompile.errors import ModelError
from qcompile.linears import Linear, find_linears
from qcompile.names import set_module_path
from qcompile.precision import OpPlan, PrecisionPlan, SitePlan


class Quantize(ir.passes.InPlacePass):
    """Quantise activations once per site, weights per output channel.

    1. static: ``x -> QuantizeLinear -> DequantizeLinear``, constant scale and zero_point, codes
       uint8 or float8e4m3fn
    2. dynamic: ``x -> DynamicQuantizeLinear -> DequantizeLinear``
    3. token: ``x -> qcompile.QuantizePerToken -> qcompile.DequantizePerToken``, model-local
       functions with bodies in standard ops, of which e4m3 has an overload

    and each planned MatMul reads ``DequantizeLinear(codes, scale, axis=1)`` for its weight,
    ``DequantizeLinear(codes, scale, [zero_point], axis=0, block_size)`` where its scales are per
    block, or ``qcompile.DequantizeTable(codes, scale, table)``, a model-local function, where codes
    are indices. An op of weight-only precision goes on reading x, its channels gathered in the
    order of the codes where that is another, and the sum of a block's activations times the block's
    offset is added where it has one. Outlier channels that are split are gathered as often as they
    are copied, shifted, quantised by a coarser scale and appended. Of channels that stay in float,
    sliced or gathered from x, a narrow product is added behind the bias. The result is a valid ONNX
    model that any runtime computes; a target replaces it by kernels. (ONNX Runtime 1.31 takes
    static e4m3 with graph optimisations off only: they would make an integer kernel of it.)
    """

    def __init__(self, plan: PrecisionPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = {linear.name: linear for linear in find_linears(model.graph)}
        # What is quantised already is no Linear any more.
        planned = [op for op in self.plan.quantized if op.name in linears]
        if not planned:
            return ir.passes.PassResult(model, modified=False)
        for name, linear in linears.items():
            # A second call of a module must not take the first one's name once that is quantised.
            set_module_path(linear.matmul, name)
        shared: dict[tuple[ir.Value, object], ir.Value] = {}
        sources = {op.name: linears[op.name].x for op in planned}
        for site in self.plan.sites:
            present = [linears[name] for name in site.ops if name in linears]
            if present:
                self._quantize_site(model, site, present)
        for op in planned:
            linear = linears[op.name]
            if not op.coded:
                if op.weight is not None and op.weight.table is not None:
                    function = table_function()
                    model.functions.setdefault(function.identifier(), function)
                    model.graph.opset_imports[DOMAIN] = 1
                x = _in_order(model.graph, linear, op, shared)
                _quantize_weight(model.graph, linear, op, x)
                _add_offset(model.graph, linear, op, x, shared)
            _add_kept(model.graph, linear, op, sources[op.name], shared)
        drop_unused(model)
        return ir.passes.PassResult(model, modified=True)

    def _quantize_site(self, model: ir.Model, site: SitePlan, linears: list[Linear]) -> None:
        graph = model.graph
        x = linears[0].x
        first = min((linear.matmul for linear in linears), key=list(graph).index)
        tape = ir.tape.Tape()
        x_hat = _quantize_activation(tape, graph, site, x)
        x_hat.dtype = ir.DataType.FLOAT
        if site.activation.split is None:
            x_hat.shape = x.shape
        if site.activation.mode == "token":
            for function in per_token_functions(E4M3 if site.activation.fp8 else ""):
                model.functions.setdefault(function.identifier(), function)
            graph.opset_imports[DOMAIN] = 1
        for node in tape.nodes:
            coarse = node.op_type == "QuantizeLinear" and node.inputs[0] is not x
            node.name = f"{site.name}{'/outliers' if coarse else ''}/{node.op_type}"
        graph.insert_before(first, list(tape.nodes))
        for linear in linears:
            op = self.plan.op(linear.name)
            _quantize_weight(graph, linear, op, x_hat)


def _in_order(
    graph: ir.Graph, linear: Linear, op: OpPlan, shared: dict[tuple[ir.Value, object], ir.Value]
) -> ir.Value:
    """What `linear` reads, its channels as the codes have them; once for all that read it so."""
    order = op.weight.order if op.weight is not None else None
    if order is None:
        return linear.x
    key = (linear.x, order.tobytes())
    if key not in shared:
        index = constant(graph, f"{op.name}.order", order.astype(np.int64))
        node = ir.node("Gather", [linear.x, index], {"axis": -1}, name=f"{op.name}/order")
        node.outputs[0].shape, node.outputs[0].type = linear.x.shape, linear.x.type
        _insert_after(graph, linear.x, [node])
        shared[key] = node.outputs[0]
    return shared[key]


def _add_offset(
    graph: ir.Graph,
    linear: Linear,
    op: OpPlan,
    x: ir.Value,
    shared: dict[tuple[ir.Value, object], ir.Value],
) -> None:
    """What the offsets of a block add: the sum of its activations, times each."""
    weight = op.weight
    if weight is None or weight.offset is None:
        return
    size = weight.block_size
    key = (x, size)
    if key not in shared:
        assert size is not None, f"{op.name} has offsets without blocks"
        if x.shape is None:
            raise ModelError(f"{op.name}: the shape of what it reads is not known")
        tape = ir.tape.Tape()
        axes = [*[0] * (len(x.shape) - 1), -1, size]
        shape = shared_constant(graph, "blocks", np.array(axes, np.int64))
        last = shared_constant(graph, "axis", np.array([-1], np.int64))
        blocks = tape.op("Reshape", [x, shape])
        sums = tape.op("ReduceSum", [blocks, last], {"keepdims": 0})
        sums.shape = ir.Shape([*x.shape[:-1], len(weight.offset)])
        blocks.shape = ir.Shape([*sums.shape, size])
        blocks.type = sums.type = x.type
        _name(tape, f"{op.name}/offset/sums")
        _insert_after(graph, x, tape.nodes)
        shared[key] = sums
    tape = ir.tape.Tape()
    offset = constant(graph, f"{op.name}.weight_offset", weight.offset)
    product = linear.matmul.outputs[0]
    added = tape.op("MatMul", [shared[key], offset])
    result = tape.op("Add", [product, added])
    for value in (added, result):
        value.shape, value.type = product.shape, product.type
    _name(tape, f"{op.name}/offset")
    is_output = product.is_graph_output()
    product.replace_all_uses_with(result, replace_graph_outputs=is_output)
    result.producer().replace_input_with(0, product)  # type: ignore[union-attr]
    graph.insert_after(linear.matmul, list(tape.nodes))
    if is_output:
        result.name, product.name = product.name, f"{product.name}/codes"


def _add_kept(
    graph: ir.Graph,
    linear: Linear,
    op: OpPlan,
    x: ir.Value,
    shared: dict[tuple[ir.Value, object], ir.Value],
) -> None:
    """What the channels that stay in float add: a narrow product of them alone."""
    kept = op.weight.kept if op.weight is not None else None
    if kept is None:
        return
    key = (x, kept.channels.tobytes())
    if key not in shared:
        shared[key] = _kept_channels(graph, op, x, kept.channels)
    tape = ir.tape.Tape()
    rows = constant(graph, f"{op.name}.weight_kept", kept.weight)
    added = tape.op("MatMul", [shared[key], rows])
    # The bias is added first: a kernel may take it.
    output = linear.output
    result = tape.op("Add", [output, added])
    for value in (added, result):
        value.shape, value.type = output.shape, output.type
    _name(tape, f"{op.name}/kept")
    producer = output.producer()
    assert producer is not None
    graph.insert_after(producer, list(tape.nodes))
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    result.producer().replace_input_with(0, output)  # type: ignore[union-attr]
    result.name, output.name = output.name, f"{output.name}/codes"


def _kept_channels(
    graph: ir.Graph, op: OpPlan, x: ir.Value, channels: npt.NDArray[np.int64]
) -> ir.Value:
    """`channels` of `x`: a Slice where they lie side by side, else a Gather."""
    tape = ir.tape.Tape()
    first, last = int(channels[0]), int(channels[-1]) + 1
    if last - first == len(channels):
        ends = [
            shared_constant(graph, "channel", np.array([end], np.int64)) for end in (first, last)
        ]
        axis = shared_constant(graph, "axis", np.array([-1], np.int64))
        found = tape.op("Slice", [x, *ends, axis])
    else:
        index = constant(graph, f"{op.name}.kept", channels)
        found = tape.op("Gather", [x, index], {"axis": -1})
    found.type = x.type
    found.shape = ir.Shape([*x.shape[:-1], len(channels)]) if x.shape is not None else None
    _name(tape, f"{op.name}/kept")
    _insert_after(graph, x, tape.nodes)
    return found


def _insert_after(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Where `x` is known: before all that read it, whichever of them was planned first."""
    producer = x.producer()
    if producer is None:
        graph.insert_before(graph[0], list(nodes))
    else:
        graph.insert_after(producer, list(nodes))


def _name(tape: ir.tape.Tape, prefix: str) -> None:
    for node in tape.nodes:
        node.name = f"{prefix}/{node.op_type}"


def _quantize_weight(graph: ir.Graph, linear: Linear, op: OpPlan, x_hat: ir.Value) -> None:
    weight = op.weight
    assert weight is not None, f"{op.name} is planned {op.precision} without codes"
    scale = constant(graph, f"{op.name}.weight_scale", weight.scale)
    tape = ir.tape.Tape()
    if weight.table is not None:
        assert weight.block_size is not None
        blocks = weight.codes.astype(np.uint8).reshape(-1, weight.block_size, linear.out_features)
        codes = constant(graph, f"{op.name}.weight_codes", blocks)
        table = constant(graph, f"{op.name}.weight_table", weight.table)
        w_hat = tape.op(NAME, [codes, scale, table], domain=DOMAIN)
    else:
        stored = weight.codes if weight.bits == 8 else weight.codes.astype(ml_dtypes.int4)
        kind = "e4m3" if op.precision == "fp8" else f"int{weight.bits}"
        parameters = [constant(graph, f"{op.name}.weight_{kind}", stored), scale]
        if weight.zero_point is not None:
            points = weight.zero_point.astype(stored.dtype)
            parameters.append(constant(graph, f"{op.name}.weight_zero_point", points))
        attributes = {"axis": 1}
        if weight.block_size is not None:
            attributes = {"axis": 0, "block_size": weight.block_size}
        w_hat = tape.op("DequantizeLinear", parameters, attributes)
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
        overload = E4M3 if activation.fp8 else ""
        codes, scale = tape.op_multi_out(
            QUANTIZE, [x], num_outputs=2, domain=DOMAIN, overload=overload
        )
        return tape.op(DEQUANTIZE, [codes, scale], domain=DOMAIN, overload=overload)
    if activation.mode == "dynamic":
        codes, scale, zero_point = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        return tape.op("DequantizeLinear", [codes, scale, zero_point])
    assert activation.scale is not None
    zero = np.array(activation.zero_point or 0, CODES if activation.fp8 else np.uint8)
    parameters = [
        constant(graph, f"{site.name}.scale", np.array(activation.scale, np.float32)),
        constant(graph, f"{site.name}.zero_point", zero),
    ]
    codes = tape.op("QuantizeLinear", [x, *parameters])
    split = activation.split
    if split is not None:
        step = np.array(activation.scale * split.copies, np.float32)
        coarse = constant(graph, f"{site.name}.outlier_scale", step)
        index = constant(graph, f"{site.name}.outliers", split.appended)
        shifts = constant(
            graph, f"{site.name}.outlier_shifts", np.float32(activation.scale * split.offsets)
        )
        shifted = tape.op("Add", [tape.op("Gather", [x, index], {"axis": -1}), shifts])
        copies = tape.op("QuantizeLinear", [shifted, coarse, parameters[1]])
        codes = tape.op("Concat", [codes, copies], {"axis": -1})
    return tape.op("DequantizeLinear", [codes, *parameters])
