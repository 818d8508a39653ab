"""Where a graph can be quantised: its Linears, and the sites (shared inputs) that feed them.

After canonicalisation every Linear is ``MatMul(x, W) [+ Add(bias)]`` with `W` a constant of shape
[K, N]. This view is derived from the graph each time it is needed; it is never the truth.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompile.names import join_paths, module_path, unique_name


@dataclasses.dataclass(frozen=True)
class Linear:
    """One ``x @ W + b``.

    Attributes:
        name: module path.
        matmul: the MatMul node.
        weight: constant value of shape [K, N], or [N, K] behind a Transpose when `tied`.
        bias: constant of shape [N], or None.
        output: what the rest of the graph reads: the Add's output, or the MatMul's.
        tied: something that is no Linear uses the weight too (an embedding), so it must stay.
        shared: number of Linears that use this weight, this one included; each gets its own codes.
    """

    name: str
    matmul: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    in_features: int
    out_features: int
    tied: bool
    shared: int = 1

    @property
    def module(self) -> str:
        """The module path, of a later call of the module too."""
        return self.name.partition("#")[0]

    @property
    def x(self) -> ir.Value:
        value = self.matmul.inputs[0]
        assert value is not None
        return value

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [N, K], behind a Transpose."""
        return self.matmul.inputs[1] is not self.weight

    @property
    def bias_add(self) -> ir.Node | None:
        return self.output.producer() if self.bias is not None else None


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation that would be quantised once, and every Linear that reads it."""

    name: str
    x: ir.Value
    linears: tuple[Linear, ...]

    @property
    def channels(self) -> int:
        return self.linears[0].in_features


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer that no caller can override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Every MatMul of `graph` with a constant two-dimensional right-hand side, in graph order."""
    found: list[Linear] = []
    taken: set[str] = set()
    for node in graph:
        linear = _as_linear(node)
        if linear is None:
            continue
        name = unique_name(linear.name or "unnamed", taken)
        found.append(dataclasses.replace(linear, name=name))
    return found


def find_sites(graph: ir.Graph) -> list[Site]:
    """The Linears of `graph` grouped by the value they read, in graph order."""
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(graph):
        by_input.setdefault(linear.x, []).append(linear)
    return [
        Site(name=join_paths([linear.name for linear in linears]), x=x, linears=tuple(linears))
        for x, linears in by_input.items()
    ]


def is_matrix_transpose(node: ir.Node) -> bool:
    """True for a Transpose that swaps the two axes of a matrix."""
    source = node.inputs[0] if node.op_type == "Transpose" else None
    if source is None or source.shape is None or len(source.shape) != 2:
        return False
    return tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)


def _as_linear(node: ir.Node) -> Linear | None:
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    weight, transposed = node.inputs[1], False
    producer = weight.producer() if weight is not None else None
    if producer is not None and is_matrix_transpose(producer):
        weight, transposed = producer.inputs[0], True
    if weight is None or not is_constant(weight) or is_constant(node.inputs[0]):
        return None
    shape = weight.shape
    if shape is None or len(shape) != 2 or weight.dtype != ir.DataType.FLOAT:
        return None
    rows, columns = int(shape[0]), int(shape[1])  # type: ignore[arg-type]
    in_features, out_features = (columns, rows) if transposed else (rows, columns)
    output, bias = node.outputs[0], None
    add = _only_consumer(output)
    if add is not None and add.op_type == "Add":
        other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
        if other is not None and is_constant(other) and _is_vector(other, out_features):
            output, bias = add.outputs[0], other
    return Linear(
        name=module_path(node),
        matmul=node,
        weight=weight,
        bias=bias,
        output=output,
        in_features=in_features,
        out_features=out_features,
        tied=transposed or any(use.node.op_type != "MatMul" for use in weight.uses()),
        shared=len(weight.uses()),
    )


def _only_consumer(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _is_vector(value: ir.Value, length: int) -> bool:
    return value.shape is not None and len(value.shape) == 1 and value.shape[0] == length
