"""Layer-by-layer knowledge distillation, as in ZeroQuant (arXiv 2206.01861).

Layer after layer, the weights and scales of a layer's Linears are learned, so that the layer with
rounded weights hands on what the float one does, given what the rounded layers before it make.
Nothing but one layer is ever differentiated, and its float form is the teacher. Rounding has the
gradient of the identity (a straight-through estimator). What was learned is taken where it is
better on batches that it was not learned from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompile.errors import CalibrationError, ModelError
from qcompile.linears import Linear, Site, find_sites
from qcompile.planning import weight_of
from qcompile.precision import QuantizedWeight
from qcompile.sequence import Part, advance, parts_before, read_rounded
from qcompile.spill import release
from qcompile.straight_through import LearnedWeight
from qcompile.torch_graph import (
    Tensor,
    UnsupportedOpError,
    check_supported,
    downstream,
    evaluate,
    frontier,
)
from qcompile.traced import Batch

Array: TypeAlias = npt.NDArray[Any]

EPOCHS: Final = 2
"""Times that a layer sees every calibration batch."""

ASIDE: Final = 4
"""One in so many batches is not learned from, and says whether learning was worth it."""

RATE: Final = 5e-4
"""Adam's, of weights in units of a code; it falls to zero linearly."""

SCALE_RATE: Final = 1e-3
"""Of the logarithms of scales."""

_LAYER: Final = re.compile(r"(.*?\.\d+)\.")


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is distilled at once: the Linears under one numbered module, or one site elsewhere."""

    name: str
    sites: tuple[Site, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for site in self.sites for linear in site.linears)


def find_layers(graph: ir.Graph) -> list[Layer]:
    """The layers of `graph`, in order."""
    place = {node: at for at, node in enumerate(graph)}
    sites = sorted(find_sites(graph), key=lambda s: min(place[x.matmul] for x in s.linears))
    layers: list[Layer] = []
    for site in sites:
        found = _LAYER.match(site.linears[0].name)
        name = found[1] if found else site.name
        if layers and layers[-1].name == name:
            layers[-1] = Layer(name, (*layers[-1].sites, site))
        else:
            layers.append(Layer(name, (site,)))
    return layers


def learnable(graph: ir.Graph, batches: Sequence[Batch]) -> Sequence[Batch]:
    """`batches`, or a single one in two parts: one to learn from, one to judge by.

    Raises:
        CalibrationError: all there is is one sample, or a batch that cannot be cut.
    """
    if len(batches) > 1:
        return batches
    whole = batches[0]
    shapes = [value.shape for value in graph.inputs]
    lengths = {array.shape[:1] for array in whole.values()}
    free = all(shape and not isinstance(shape[0], int) for shape in shapes)
    samples = next(iter(lengths))[0] if free and len(lengths) == 1 else 1
    if samples < 2:
        raise CalibrationError(
            "one sample is too little to distil layers on: some are learned from, others judge",
            hint="give more calibration data, or another method than lkd",
        )
    at = samples - max(samples // ASIDE, 1)
    return [{k: v[part] for k, v in whole.items()} for part in (slice(at), slice(at, None))]


def distill(
    model: ir.Model,
    started: Mapping[str, QuantizedWeight],
    batches: Sequence[Batch],
    work: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedWeight]:
    """Better codes and scales of the Linears that `started` names.

    A layer of one Linear, an output head, keeps what it has: there is nothing between its weights
    and its outputs that was not known when they were rounded.

    Args:
        model: a float graph; it is cloned, not changed.
        started: weights in blocks.
        batches: feeds of the graph, two at least (`learnable`).
        work: the folder that holds the graph's external weights.
        progress: called with (layers done, layers in all).

    Raises:
        ModelError: PyTorch is not told how to compute an op of a layer.
        CalibrationError: an activation is NaN or infinite on this data.
    """
    model = model.clone()
    nodes = list(model.graph)
    place = {node: at for at, node in enumerate(nodes)}
    layers = find_layers(model.graph)
    starts = [min(place[linear.matmul] for linear in layer.linears) for layer in layers]
    ends = [*starts[1:], len(nodes)]
    first, *parts = list(parts_before(model, [*starts, len(nodes)]))
    alive: list[Batch] = [dict(batch) for batch in batches]
    advance(model, first, alive, work)
    found: dict[str, QuantizedWeight] = {}
    for done, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        own = {x.name: started[x.name] for x in layer.linears if x.name in started}
        if len(layer.linears) > 1 and own:
            inside = set(nodes[starts[done] : ends[done]])
            try:
                own = _distilled(model, layer, inside, part, own, alive, work)
            except UnsupportedOpError as error:
                raise ModelError(
                    f"{layer.name} cannot be distilled: {error} has no gradient here",
                    hint="adaround looks at one Linear at a time, and wants none",
                ) from error
        found |= own
        for linear in layer.linears:
            if linear.name in own:
                read_rounded(linear, own[linear.name])
        if len(found) == len(started):
            break
        advance(model, part, alive, work)
        release(model)
        if progress:
            progress(done + 1, len(layers))
    return found


def _distilled(
    model: ir.Model,
    layer: Layer,
    inside: set[ir.Node],
    part: Part,
    started: Mapping[str, QuantizedWeight],
    alive: list[Batch],
    work: Path,
) -> dict[str, QuantizedWeight]:
    """Codes of one layer, whose inputs are `alive`."""
    linears = {x.matmul: x for x in layer.linears if x.name in started}
    transposes = {
        node
        for linear in layer.linears
        if linear.transposed and (node := linear.matmul.inputs[1].producer()) is not None  # type: ignore[union-attr]
    }
    roots = [*transposes, *(linear.matmul for linear in layer.linears)]
    nodes = [n for n in downstream(model.graph, roots) if n in inside or n in transposes]
    check_supported(nodes)
    known, made, _ = part
    leaves = frontier(nodes)
    beside = [str(v.name) for v in leaves if v.name not in known]
    advance(model, (known, beside, [*known, *beside]), alive, work)
    reached = {str(v.name): v for node in nodes for v in node.outputs}
    outputs = [reached[name] for name in made if name in reached]
    constants: dict[ir.Value, Tensor] = {}

    def given(batch: Batch) -> dict[ir.Value, Array]:
        return {v: batch[str(v.name)] for v in leaves}

    with torch.no_grad():
        targets = []
        for batch in alive:
            values = evaluate(nodes, given(batch), constants)
            targets.append([values[v].clone() for v in outputs])
    learned = {
        node: LearnedWeight(weight_of(linear), started[linear.name])
        for node, linear in linears.items()
    }
    shares = [
        1.0 / max(sum(float(target[at].square().sum()) for target in targets), 1e-30)
        for at in range(len(outputs))
    ]
    apart = max(len(alive) // ASIDE, 1)
    seen = len(alive) - apart

    def loss(at: int) -> Tensor:
        weights = {node: weight.soft() for node, weight in learned.items()}

        def rounded(node: ir.Node, inputs: list[Any]) -> Tensor:
            made: Tensor = inputs[0] @ weights.get(node, inputs[1])
            return made

        values = evaluate(nodes, given(alive[at]), constants, rounded)
        missed = [(values[v] - t).square().sum() for v, t in zip(outputs, targets[at], strict=True)]
        return torch.stack([m * share for m, share in zip(missed, shares, strict=True)]).sum()

    def aside() -> float:
        with torch.no_grad():
            return sum(float(loss(at)) for at in range(len(alive) - apart, len(alive)))

    before = aside()
    _learn(list(learned.values()), loss, seen)
    if not aside() < before:  # a NaN is no gain either
        return dict(started)
    return {linears[node].name: weight.quantized() for node, weight in learned.items()}


def _learn(weights: Sequence[LearnedWeight], loss: Callable[[int], Tensor], batches: int) -> None:
    adam = torch.optim.Adam(
        [
            {"params": [weight.codes for weight in weights], "lr": RATE},
            {"params": [weight.growth for weight in weights], "lr": SCALE_RATE},
        ]
    )
    steps = EPOCHS * batches
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 - step / steps)
    for step in range(steps):
        adam.zero_grad()
        loss(step % batches).backward()  # type: ignore[no-untyped-call]
        adam.step()
        falling.step()
