"""What the custom operators mean, in standard operators: any runtime, no GPU.

``with_reference`` gives a model that carries, for every custom node, a model-local function with a
body in opset 23. Where the library is registered, ONNX Runtime's CUDA provider takes the nodes;
where it is not, the bodies are inlined: one file for both, which is how it is checked on the CPU.

Integer products are exact there as in the library, and those of e4m3 codes differ by the order of
float32 sums and by what tensor cores cut off; codes and scales of the operators that quantise alone
agree bit for bit; norms and activations agree but for the order of float32 sums and the last bits
of exp and erf, which moves a code by one where a value lies between two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.targets.cuda.schema import BY_NAME, DOMAIN, LARGEST, VERSION, Operator

OPSET: Final = 23

_FLOAT: Final = int(ir.DataType.FLOAT)
_TINY: Final = 2.0**-100
"""Rows below it code as zeros: 127 / max|row| could overflow."""

_ATTRIBUTE_TYPES: Final = {
    "int": ir.AttributeType.INT,
    "float": ir.AttributeType.FLOAT,
    "string": ir.AttributeType.STRING,
}

Attributes = Mapping[str, int | float | str]
_Values = dict[str, ir.Value]
_Body = Callable[[ir.tape.Tape, _Values, Operator, Attributes], _Values]


def with_reference(model: ir.Model) -> ir.Model:
    """A copy of `model` with a function for every custom node; initialisers are shared.

    A function is an overload of its operator: one for each combination of attributes and of inputs
    and outputs that are there, under a name that says which.
    """
    copied = model.clone()
    copied.opset_imports[DOMAIN] = VERSION
    for node in copied.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type not in BY_NAME:
            continue
        attributes = {item.name: item.value for item in node.attributes.values()}
        function = reference_function(
            BY_NAME[node.op_type],
            attributes,
            [value is not None for value in node.inputs],
            [bool(value.name) for value in node.outputs],
        )
        node.overload = function.overload
        copied.functions[function.identifier()] = function
    return copied


def reference_function(
    operator: Operator,
    attributes: Attributes,
    inputs: Sequence[bool] | None = None,
    outputs: Sequence[bool] | None = None,
) -> ir.Function:
    """The operator as a function for nodes whose `inputs` and `outputs` are there, or all of them.

    It has the node's inputs and outputs in the same places, under the names that ONNX Runtime gives
    those of custom operators: that is how it finds the kernel for a node that has a function too.
    The attributes' values are constants of the body.
    """
    present_in = _padded(inputs, len(operator.inputs))
    present_out = _padded(outputs, len(operator.outputs))
    length = len(operator.inputs) if inputs is None else len(inputs)
    tape = ir.tape.Tape()
    formal = [ir.Value(name=f"Input{index}") for index in range(length)]
    given = {
        parameter.name: value
        for parameter, value, there in zip(operator.inputs, formal, present_in, strict=False)
        if there
    }
    made = _BODIES[operator.kind](tape, given, operator, attributes)
    results = []
    for parameter, there in zip(operator.outputs, present_out, strict=True):
        value = made.get(parameter.name)
        if value is None or not there:
            # A place that a node leaves empty: the function has it, with whatever.
            value = tape.op("Identity", [given["x"]])
        results.append(value)
    count = len(operator.outputs) if outputs is None else len(outputs)
    for index, value in enumerate(results[:count]):
        value.name = f"Output{index}"
    nodes = list(tape.nodes)
    graph = ir.Graph(formal, results[:count], nodes=nodes, opset_imports={"": OPSET}, name="body")
    return ir.Function(
        domain=DOMAIN,
        name=operator.name,
        overload=_overload(attributes, present_in, present_out),
        graph=graph,
        attributes=[
            ir.Attr(attribute.name, _ATTRIBUTE_TYPES[attribute.type], None)
            for attribute in operator.attributes
        ],
    )


def _padded(given: Sequence[bool] | None, length: int) -> list[bool]:
    there = [True] * length if given is None else list(given)
    return there + [False] * (length - len(there))


def _overload(attributes: Attributes, inputs: Sequence[bool], outputs: Sequence[bool]) -> str:
    present = ["".join("x" if there else "o" for there in side) for side in (inputs, outputs)]
    values = [f"{name}_{attributes[name]!s}" for name in sorted(attributes)]
    return "".join(c if c.isalnum() else "_" for c in "_".join([*present, *values]))


def _constant(tape: ir.tape.Tape, value: np.ndarray | np.generic) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.asarray(value))})


def _number(tape: ir.tape.Tape, value: float) -> ir.Value:
    return _constant(tape, np.float32(value))


def _to_float(tape: ir.tape.Tape, value: ir.Value) -> ir.Value:
    return tape.op("Cast", [value], {"to": _FLOAT})


def _codes(tape: ir.tape.Tape, value: ir.Value, given: _Values, operator: Operator) -> _Values:
    """Codes of a float32 value; their scale too where none is given."""
    made: _Values = {}
    if "scale" in given:
        inverse = tape.op("Div", [_number(tape, 1.0), given["scale"]])
    else:
        last = _constant(tape, np.array([-1], np.int64))
        largest = tape.op("ReduceMax", [tape.op("Abs", [value]), last], {"keepdims": 1})
        levels = _number(tape, LARGEST[operator.codes])
        made["scale"] = tape.op("Div", [largest, levels])
        inverse = tape.op(
            "Where",
            [
                tape.op("Less", [largest, _number(tape, _TINY)]),
                _number(tape, 0.0),
                tape.op("Div", [levels, largest]),
            ],
        )
    exact = tape.op("Mul", [value, inverse])
    if operator.codes == "float8e4m3fn":
        saturated = {"to": int(ir.DataType.FLOAT8E4M3FN), "saturate": 1}
        made["codes"] = tape.op("Cast", [exact], saturated)
        return made
    rounded = tape.op("Round", [exact])
    clipped = tape.op("Clip", [rounded, _number(tape, -128.0), _number(tape, 127.0)])
    made["codes"] = tape.op("Cast", [clipped], {"to": int(ir.DataType.INT8)})
    return made


def _quantize(
    tape: ir.tape.Tape, given: _Values, operator: Operator, attributes: Attributes
) -> _Values:
    return _codes(tape, _to_float(tape, given["x"]), given, operator)


def _activate(
    tape: ir.tape.Tape, given: _Values, operator: Operator, attributes: Attributes
) -> _Values:
    value = _to_float(tape, given["x"])
    up = given.get("up")
    factor = None if up is None else _to_float(tape, up)
    if attributes["packed"]:
        value, factor = tape.op_multi_out(
            "Split", [value], {"axis": -1, "num_outputs": 2}, num_outputs=2
        )
    kind = str(attributes["kind"])
    if kind == "relu":
        value = tape.op("Relu", [value])
    elif kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        value = tape.op("Gelu", [value], {"approximate": approximate})
    elif kind == "silu":
        value = tape.op("Mul", [value, tape.op("Sigmoid", [value])])
    if factor is not None:
        value = tape.op("Mul", [value, factor])
    return _codes(tape, value, given, operator)


def _normalise(op_type: str) -> _Body:
    def body(
        tape: ir.tape.Tape, given: _Values, operator: Operator, attributes: Attributes
    ) -> _Values:
        value = _to_float(tape, given["x"])
        total = tape.op("Identity", [given["x"]])
        if "residual" in given:
            value = tape.op("Add", [value, _to_float(tape, given["residual"])])
            total = tape.op("CastLike", [value, given["x"]])
            value = _to_float(tape, total)
        inputs = [value, _to_float(tape, given["weight"])]
        if "bias" in given:
            inputs.append(_to_float(tape, given["bias"]))
        options = {"axis": -1, "epsilon": float(attributes["epsilon"])}
        made = _codes(tape, tape.op(op_type, inputs, options), given, operator)
        return made | {"sum": total}

    return body


def _multiply(
    tape: ir.tape.Tape, given: _Values, operator: Operator, attributes: Attributes
) -> _Values:
    weight = tape.op("Transpose", [given["weight"]], {"perm": [1, 0]})
    if operator.codes == "int8":
        total = _to_float(tape, tape.op("MatMulInteger", [given["x"], weight]))
    else:
        # No runtime multiplies codes of e4m3 on the CPU.
        total = tape.op("MatMul", [_to_float(tape, given["x"]), _to_float(tape, weight)])
    value = tape.op("Mul", [total, given["x_scale"]])
    value = tape.op("Mul", [value, given["weight_scale"]])
    if "bias" in given:
        value = tape.op("Add", [value, given["bias"]])
    return {"y": tape.op("Cast", [value], {"to": int(attributes["dtype"])})}


_BODIES: Final[dict[str, _Body]] = {
    "Quantize": _quantize,
    "Activation": _activate,
    "LayerNorm": _normalise("LayerNormalization"),
    "RMSNorm": _normalise("RMSNormalization"),
    "MatMul": _multiply,
}
