"""What makes an activation quantises it as well: it crosses memory once, as int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from qcompile.passes.constants import drop_unused, sole_use
from qcompile.passes.matching import channel_vector, flat, is_op, made_by, operands
from qcompile.passes.skip_norm import residual_of
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.targets.cuda.schema import DOMAIN, SUFFIX

_NORMS: Final = {"LayerNormalization": "LayerNorm", "RMSNormalization": "RMSNorm"}
_QUANTIZE: Final = "Quantize"
_Matched = tuple[str, list[ir.Value | None], dict[str, int | float | str], ir.Value | None]


class Int8Rows(ir.passes.InPlacePass):
    """``QuantizeInt8(x [, scale])`` and what makes x become one operator, if nothing else reads x;
    and so for ``QuantizeFp8``.

    1. x is ``LayerNormalization`` or ``RMSNormalization`` over the last axis, of ``Add(a, b)`` or
       of anything else -> ``LayerNormInt8`` / ``RMSNormInt8``, which gives the sum, too
    2. x is ``Relu(h)``, ``Gelu(h)`` or SiLU, ``Mul(h, Sigmoid(h))`` -> ``ActivationInt8(h)``
    3. x is the product of one of those and `up` -> ``ActivationInt8(h, up)``
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type.removeprefix(_QUANTIZE) in SUFFIX.values():
                modified |= _fuse(model.graph, node)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _fuse(graph: ir.Graph, quantize: ir.Node) -> bool:
    x = quantize.inputs[0]
    if x is None or not sole_use(x):
        return False
    found = _norm(x) or _gated(x) or _plain(x)
    if found is None:
        return False
    kind, inputs, attributes, total = found
    op_type = kind + quantize.op_type.removeprefix(_QUANTIZE)
    static = quantize.inputs[1] if len(quantize.inputs) > 1 else None
    inputs = [*inputs, static]
    while inputs[-1] is None:
        inputs.pop()
    count = 3 if total is not None else (1 if static is not None else 2)
    made = ir.node(op_type, inputs, attributes=attributes, domain=DOMAIN, num_outputs=count)
    made.name = f"{x.name}/{op_type}"
    old: list[ir.Value | None] = [*quantize.outputs, *[None] * (count - len(quantize.outputs))]
    if total is not None:
        old[2] = total
    _put(graph, quantize, made, old)
    return True


def _norm(x: ir.Value) -> _Matched | None:
    norm = made_by(x, *_NORMS)
    if norm is None or norm.attributes.get_int("axis", -1) != -1 or len(norm.outputs) > 1:
        return None
    vectors = list(norm.inputs[1:])
    if not vectors or not all(channel_vector(v) for v in vectors if v is not None):
        return None
    vectors = [v if v is None else flat(v) for v in vectors]
    if norm.op_type == "LayerNormalization":
        vectors = [*vectors, None][:2]
    found = residual_of(norm)
    epsilon: dict[str, int | float | str] = {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    if found is None or found[2].outputs[0].is_graph_output():
        return _NORMS[norm.op_type], [norm.inputs[0], *vectors, None], epsilon, None
    a, b, add = found
    return _NORMS[norm.op_type], [a, *vectors, b], epsilon, add.outputs[0]


def _activated(value: ir.Value | None) -> tuple[str, ir.Value] | None:
    """(kind, h), where `value` is kind(h)."""
    node = made_by(value, "Relu", "Gelu", "Mul")
    h = node.inputs[0] if node is not None else None
    if node is None or h is None:
        return None
    if is_op(node, "Relu"):
        return "relu", h
    if is_op(node, "Gelu"):
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return ("gelu_tanh" if tanh else "gelu"), h
    for argument, gate in operands(node):
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is argument:
            return "silu", argument
    return None


def _plain(x: ir.Value) -> _Matched | None:
    found = _activated(x)
    if found is None:
        return None
    kind, h = found
    return "Activation", [h, None], {"kind": kind, "packed": 0}, None


def _gated(x: ir.Value) -> _Matched | None:
    product = made_by(x, "Mul")
    if product is None or _activated(x) is not None:
        return None
    for gate, up in operands(product):
        found = _activated(gate)
        dims = dims_of(gate)
        alike = dims is not None and None not in dims and dims == dims_of(up)
        if found is not None and alike and sole_use(gate):
            kind, h = found
            return "Activation", [h, up], {"kind": kind, "packed": 0}, None
    return None


def _put(graph: ir.Graph, quantize: ir.Node, made: ir.Node, old: Sequence[ir.Value | None]) -> None:
    nodes = {node: at for at, node in enumerate(graph)}
    producers = [v.producer() for v in made.inputs if v is not None]
    after = max((nodes[p] for p in producers if p is not None and p in nodes), default=-1)
    total = old[2] if len(old) > 2 else None
    anchor = total.producer() if total is not None else quantize
    assert anchor is not None
    # The sum may be read before the codes are: the operator stands where the sum was made.
    graph.insert_after(list(graph)[max(after, nodes[anchor])], made)
    for new, value in zip(made.outputs, old, strict=True):
        if value is None:
            new.name = ""
            continue
        new.type, new.shape = value.type, value.shape
        name = value.name
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        if name:
            value.name = f"{name}/replaced"
            new.name = name
