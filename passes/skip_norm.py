"""The residual add goes into the norm that follows: one kernel, one pass over memory."""

from __future__ import annotations

import onnx_ir as ir
from qcompile.passes.constants import drop_unused, sole_use
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.matching import channel_vector, flat, is_op, made_by, operands
from qcompile.passes.symbolic_shapes import dims_of

_KERNELS = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}


class SkipNorm(ir.passes.InPlacePass):
    """Emit com.microsoft's norms with residual.

    1. ``s = Add(a, b)``, ``LayerNormalization(s)`` -> ``y, , , s = SkipLayerNormalization(a, b)``
    2. the same of ``RMSNormalization`` -> ``SkipSimplifiedLayerNormalization``
    3. where `b` is ``Add(c, vector)`` that nothing else reads, the vector is the kernel's bias

    Left as it is: a norm over other axes than the last, operands of two shapes, a sum that an
    earlier norm took.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if is_op(node, *_KERNELS):
                modified |= _fuse(model.graph, node)
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def residual_of(norm: ir.Node) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    """(a, b, the Add), where `norm` is over the last axis of ``a + b``, two rows of one shape."""
    add = made_by(norm.inputs[0], "Add")
    if add is None or norm.attributes.get_int("axis", -1) != -1 or len(norm.outputs) > 1:
        return None
    a, b = add.inputs
    dims = dims_of(a)
    if a is None or b is None or dims is None or None in dims or dims != dims_of(b):
        return None
    return (a, b, add) if len(dims) in (2, 3) and add.graph is norm.graph else None


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    found = residual_of(norm)
    if found is None or not all(channel_vector(v) for v in norm.inputs[1:] if v is not None):
        return False
    a, b, add = found
    if add.outputs[0].is_graph_output():
        return False
    bias = None
    for one, other in ((a, b), (b, a)):
        inner = made_by(other, "Add")
        if inner is None or not sole_use(other):
            continue
        for value, vector in operands(inner):
            if channel_vector(vector) and dims_of(value) == dims_of(other):
                a, b, bias = one, value, vector
        if bias is not None:
            break
    vectors = [v if v is None else flat(v) for v in (*norm.inputs[1:], bias)]
    inputs = [a, b, *vectors]
    while inputs[-1] is None:
        inputs.pop()
    made = ir.node(
        _KERNELS[norm.op_type],
        inputs,
        attributes={"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=4,
    )
    made.outputs[1].name = made.outputs[2].name = ""  # mean and deviation, for training
    made.name = f"{norm.name}/skip"
    made.metadata_props.update(norm.metadata_props)
    for new, old in ((made.outputs[0], norm.outputs[0]), (made.outputs[3], add.outputs[0])):
        new.type, new.shape = old.type, old.shape
    _replace(graph, norm, made, {0: norm.outputs[0], 3: add.outputs[0]})
    return True


def _replace(graph: ir.Graph, anchor: ir.Node, made: ir.Node, old: dict[int, ir.Value]) -> None:
    """Put `made` for `anchor`; its outputs take the names and readers of the `old` ones."""
    nodes = list(graph)
    # The sum may be read before the norm is: the kernel stands where the sum was made.
    first = min((v.producer() for v in old.values()), key=lambda n: nodes.index(n))  # type: ignore[arg-type]
    assert first is not None
    ready = max(
        (nodes.index(p) for v in made.inputs if v is not None and (p := v.producer()) is not None),
        default=-1,
    )
    graph.insert_after(nodes[max(ready, nodes.index(first))], made)
    for at, value in old.items():
        name = value.name
        value.replace_all_uses_with(made.outputs[at], replace_graph_outputs=True)
        value.name = f"{name}/replaced"
        made.outputs[at].name = name
