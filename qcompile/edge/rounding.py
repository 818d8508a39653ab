"""Weights of Linears rounded for what they read, before tensors have codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompile.channel_rounding import quantize_channels
from qcompile.edge.plan import BITS, EdgePlan
from qcompile.edge.settings import Settings
from qcompile.edge.units import WEIGHTED, Unit
from qcompile.linears import Linear, Site
from qcompile.methods import SEQUENTIAL, Method
from qcompile.precision import QuantizedWeight
from qcompile.sequence import round_in_sequence
from qcompile.traced import Batch
from qcompile.weighted import find_weighted

Array = npt.NDArray[Any]


def round_linears(
    graph: ir.Model,
    plan: EdgePlan,
    batches: Sequence[Batch],
    work: Path,
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedWeight]:
    """Codes, by name of the unit, where there is a scale per output channel.

    Args:
        graph: in float, as it was planned for.
        plan: says which weights have codes, and of how many bits.
        batches: calibration feeds.
        work: the folder that holds the graph's external weights.
        settings: the methods; those of ``gptq`` and ``adaround`` are rounded here.
        progress: called with (sites done, sites in all).

    Raises:
        CalibrationError: an activation is NaN or infinite on this data.
    """
    bits = {
        each.node: BITS[each.code]
        for each in plan.constants
        if each.role == "weight"
        and each.axis == 1
        and each.codes.ndim == 2
        and settings.method_of(each.node) in SEQUENTIAL
    }
    names = frozenset(bits) & {
        linear.name for site in _sites(graph.graph) for linear in site.linears
    }

    def round_(linear: Linear, gram: Array) -> QuantizedWeight:
        method = settings.method_of(linear.name)
        assert method == "gptq" or method == "adaround"
        tensor = linear.weight.const_value
        assert tensor is not None
        return quantize_channels(tensor.numpy(), gram, method, bits=bits[linear.name])

    return round_in_sequence(graph, names, batches, work, round_, progress, find=_sites)


def method_used(unit: Unit, settings: Settings, codes: Collection[str]) -> Method | None:
    """By which method the weight of `unit` is rounded, where one was asked for; `codes` are the
    names of those that `round_linears` rounded."""
    if unit.op not in WEIGHTED or all(each.role != "weight" for each in unit.operands):
        return None
    method = settings.method_of(unit.name)
    return "mse" if method in SEQUENTIAL and unit.name not in codes else method


def _sites(graph: ir.Graph) -> list[Site]:
    """Linears, MatMul or Gemm, with the names of their nodes, by what they read."""
    by_input: dict[ir.Value, list[Linear]] = defaultdict(list)
    for op in find_weighted(graph):
        if not op.convolves:
            name = str(op.node.name)
            by_input[op.x].append(
                Linear(
                    name, op.node, op.weight, op.bias, op.output,
                    op.in_channels, op.out_channels, tied=False,
                )
            )  # fmt: skip
    return [Site(str(x.name), x, tuple(linears)) for x, linears in by_input.items()]
