"""The ops of a graph as a profile sees them: with the bias and the activation that they take in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import onnx_ir as ir

from qcompile.config import Recipe
from qcompile.edge.plan import Role
from qcompile.edge.profiles import Profile
from qcompile.errors import ConfigError
from qcompile.linears import is_constant
from qcompile.names import PART_OF_KEY, module_path, unique_name

WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Ops whose second input may be a constant weight, and whose third is a bias."""

_NORMS: Final = frozenset({"LayerNormalization", "InstanceNormalization"})
"""Ops with a weight and a bias that are vectors."""

_ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
"""What providers compute in the op before it: nothing is rounded between the two."""

_ALL_INPUTS: Final = frozenset({"Concat"})
"""Movers whose every input is moved; of the others only the first is, the rest say where to."""

_ONE_INPUT: Final = frozenset({"Clip", "Pad"})
"""Ops whose further inputs are limits or fillings, not operands."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A constant that a unit reads as codes.

    Attributes:
        node: that reads it, at its input `index`.
        value: the constant.
        role: what it is to the node.
    """

    node: ir.Node
    index: int
    value: ir.Value
    role: Role


@dataclasses.dataclass(frozen=True)
class Unit:
    """One op, the bias that is added to it and the activation after it.

    Attributes:
        nodes: in order; the first gives the unit its name and type.
        inputs: the activations that it reads.
        operands: the constants.
        outputs: what it computes.
        moves: whether in and out share a scale.
        refusal: why it has to stay in float, or None.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    operands: tuple[Operand, ...]
    outputs: tuple[ir.Value, ...]
    moves: bool
    refusal: str | None = None

    @property
    def first(self) -> ir.Node:
        return self.nodes[0]

    @property
    def op(self) -> str:
        return self.first.op_type

    @property
    def name(self) -> str:
        return str(self.first.name)

    @property
    def tensors(self) -> tuple[ir.Value, ...]:
        """The activations in and out."""
        return (*self.inputs, *self.outputs)


def name_units(graph: ir.Graph) -> None:
    """Name every node of `graph` by its module, so that recipes, reports and the artifact agree."""
    taken: set[str] = set()
    for node in graph:
        path = module_path(node)
        if node.op_type not in WEIGHTED and not path.endswith(node.op_type):
            path = f"{path}.{node.op_type}".strip(".")
        node.name = unique_name(path or node.op_type, taken)


def keep_float(units: Iterable[Unit], recipe: Recipe) -> dict[str, str]:
    """Units that `recipe` keeps in float, with the reason.

    Raises:
        ConfigError: a glob that matches none.
    """
    names = [unit.name for unit in units]
    unmatched = recipe.unmatched(names)
    if unmatched:
        raise ConfigError(
            f"recipe rule {unmatched[0]!r} matches no op",
            hint=f"ops are named like {names[0]!r}" if names else "the model has none in float32",
        )
    return {name: "recipe" for name in names if recipe.rule_for(name).precision == "float"}


def find_units(graph: ir.Graph, profile: Profile) -> list[Unit]:
    """Every op of `graph` that computes float32 from float32, in graph order.

    Ops that only compute shapes, masks or indices are none; ops of which the profile has nothing
    quantised have a `refusal`.
    """
    taken: set[ir.Node] = set()
    units = []
    for node in graph:
        if node in taken or not _is_float(node):
            continue
        unit = _unit(node, profile)
        taken.update(unit.nodes)
        units.append(unit)
    return units


def inner_ops(graph: ir.Graph, profile: Profile) -> list[str]:
    """Ops in the bodies of If, Loop and Scan that the profile has: they stay in float, in a
    sentence for each body's op."""
    return [
        f"{inside.op_type} ({inside.name or 'unnamed'}) in a body of {node.op_type} ({node.name}) "
        "stays in float: only a model's own graph is quantised"
        for node in graph
        for body in _bodies(node)
        for inside in body.all_nodes()
        if inside.op_type in profile.computes | profile.weight_only
    ]


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def axis_of(operand: Operand) -> int | None:
    """The axis of a weight's output channels."""
    node, rank = operand.node, len(operand.value.shape or ())
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            # [in, out / group, ...]: with groups, an output channel is no slice of it.
            return 1 if node.attributes.get_int("group", 1) == 1 else None
        case "Gemm":
            return 0 if node.attributes.get_int("transB", 0) else 1
        case "MatMul":
            # Kernels refuse zero points per column of stacked weights.
            return 1 if rank == 2 else None
    return None


def _is_float(node: ir.Node) -> bool:
    inputs = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
    floats = node.outputs and node.outputs[0].dtype == ir.DataType.FLOAT
    looked_up = node.op_type == "Gather" and not is_constant(node.inputs[1])
    return bool(floats and inputs and (looked_up or not all(is_constant(v) for v in inputs)))


def _unit(node: ir.Node, profile: Profile) -> Unit:
    moves = node.op_type in profile.moves
    nodes, operands = [node], list(_operands(node, moves))
    constants = {operand.index for operand in operands}
    inputs = [
        value
        for index, value in _read(node, moves)
        if index not in constants and not is_constant(value)
    ]
    weighted = any(operand.role == "weight" for operand in operands)
    if weighted:
        following = _only_consumer(node.outputs[0])
        if node.op_type == "MatMul" and following is not None and following.op_type == "Add":
            bias = _bias_of(following, node.outputs[0], operands[0])
            if bias is not None:
                operands.append(bias)
                nodes.append(following)
    if node.op_type in WEIGHTED or node.op_type == "Add":
        following = _only_consumer(nodes[-1].outputs[0])
        if following is not None and following.op_type in _ACTIVATIONS:
            nodes.append(following)
    # Optional outputs that nothing reads are none.
    outputs = (
        nodes[-1].outputs[0],
        *(v for v in nodes[-1].outputs[1:] if v.uses() or v.is_graph_output()),
    )
    refusal = None
    if PART_OF_KEY in node.metadata_props:
        refusal = f"part of a {node.metadata_props[PART_OF_KEY]}, whose sums want floats"
    elif node.op_type in profile.weight_only and weighted:
        pass
    elif node.op_type not in profile.quantizes or node.domain:
        refusal = f"profile {profile.name} has no quantised {node.op_type}"
    elif node.op_type in WEIGHTED - {"MatMul"} and not weighted:
        refusal = "its weight is computed, not a constant"
    elif any(v.dtype != ir.DataType.FLOAT for v in outputs):
        refusal = "it also gives indices, which have no codes"
    return Unit(tuple(nodes), tuple(inputs), tuple(operands), outputs, moves, refusal)


def _read(node: ir.Node, moves: bool) -> Iterator[tuple[int, ir.Value]]:
    """The float inputs that are operands, with their index."""
    single = (moves and node.op_type not in _ALL_INPUTS) or node.op_type in _ONE_INPUT
    for index, value in enumerate(node.inputs[: 1 if single else None]):
        if value is not None and value.dtype == ir.DataType.FLOAT:
            yield index, value


def _operands(node: ir.Node, moves: bool) -> Iterator[Operand]:
    for index, value in _read(node, moves):
        if not is_constant(value):
            continue
        roles: Sequence[Role] = ("constant", "weight", "bias")
        scaled = node.op_type in WEIGHTED or node.op_type in _NORMS
        yield Operand(node, index, value, roles[index] if scaled and index < 3 else "constant")


def _bias_of(add: ir.Node, product: ir.Value, weight: Operand) -> Operand | None:
    index = 1 if add.inputs[0] is product else 0
    value = add.inputs[index]
    if value is None or not is_constant(value) or value.shape is None:
        return None
    axis = axis_of(weight)
    width = (
        weight.value.shape[axis] if weight.value.shape is not None and axis is not None else None
    )
    if len(value.shape) != 1 or value.shape[0] != width:
        return None
    return Operand(add, index, value, "bias")


def _only_consumer(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
