"""Walk a graph from its inputs to its outputs, once, and round weights on the way.

The graph is cut before each site with weights to round. What is alive at a cut is kept for all
calibration batches, so that a part of the graph runs once, on what the parts before it, already
rounded, hand on: time is linear in layers, and memory is that of one cut (rows × the widths that
are alive, of float32) and of one site's Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.errors import CalibrationError
from qcompile.linears import Linear, Site, find_linears, find_sites
from qcompile.passes.constants import derived
from qcompile.precision import QuantizedWeight
from qcompile.session import open_session
from qcompile.spill import release
from qcompile.traced import Batch

Array: TypeAlias = npt.NDArray[Any]
Round: TypeAlias = Callable[[Linear, Array], QuantizedWeight]
"""Codes of a Linear, whose input has the second moments Σ xᵀx, [K, K]."""

Part: TypeAlias = tuple[list[str], list[str], list[str]]
"""Names at the cut before, to compute, and alive at the cut after."""

ROWS: Final = 4096
"""Of an activation that are multiplied at once."""


def round_in_sequence(
    model: ir.Model,
    names: frozenset[str],
    batches: Sequence[Batch],
    work: Path,
    round_: Round,
    progress: Callable[[int, int], None] | None = None,
    find: Callable[[ir.Graph], list[Site]] = find_sites,
) -> dict[str, QuantizedWeight]:
    """Codes of the Linears `names`, each found on inputs that the rounded ones before it make.

    Args:
        model: a float graph; it is cloned, not changed.
        names: of Linears of it.
        batches: feeds of the graph.
        work: the folder that holds the graph's external weights.
        round_: rounds one Linear.
        progress: called with (sites done, sites in all).
        find: the Linears of a graph.

    Raises:
        CalibrationError: an activation is NaN or infinite on this data.
    """
    model = model.clone()
    sites = [site for site in find(model.graph) if names & {x.name for x in site.linears}]
    alive: list[Batch] = [dict(batch) for batch in batches]
    found: dict[str, QuantizedWeight] = {}
    for done, (site, part) in enumerate(_parts(model, sites)):
        advance(model, part, alive, work)
        gram = gram_of(alive, site)
        for linear in site.linears:
            if linear.name not in names:
                continue
            weight = round_(linear, gram)
            found[linear.name] = weight
            read_rounded(linear, weight)
        release(model)
        if progress:
            progress(done + 1, len(sites))
    return found


def _parts(model: ir.Model, sites: Sequence[Site]) -> Iterator[tuple[Site, Part]]:
    """Each site, and the part of the graph that leads to it from the site before."""
    place = {node: at for at, node in enumerate(model.graph)}
    starts = {site.name: min(place[linear.matmul] for linear in site.linears) for site in sites}
    ordered = sorted(sites, key=lambda site: starts[site.name])
    yield from zip(
        ordered,
        parts_before(model, [starts[site.name] for site in ordered], [site.x for site in ordered]),
        strict=True,
    )


def parts_before(
    model: ir.Model, places: Sequence[int], wanted: Sequence[ir.Value] = ()
) -> Iterator[Part]:
    """What leads to the cut before the node at each of `places`, ascending, from the cut before
    it; the number of nodes stands for the end.

    What depends on no input, a transposed weight, is not handed on: it would be kept once a batch.
    Whatever reads it computes it again. Only a site's own input, and what is `wanted`, always is.
    """
    nodes = list(model.graph)
    fed = {*model.graph.inputs, *wanted, *(linear.x for linear in find_linears(model.graph))}
    for node in nodes:
        if not fed.isdisjoint(_reads(node)):
            fed.update(node.outputs)
    last_use: dict[ir.Value, int] = {}
    for at, node in enumerate(nodes):
        for value in _reads(node):
            last_use[value] = at
    for value in model.graph.outputs:
        last_use[value] = len(nodes)
    known = [value for value in model.graph.inputs if value in last_use]
    start = 0
    for place in places:
        # Parallel sites (experts, towers) may have the later one's input made earlier: then no
        # node lies between.
        stop = max(start, place)
        between = (value for node in nodes[start:stop] for value in node.outputs)
        made = [v for v in between if v in fed and last_use.get(v, -1) >= stop]
        kept = [value for value in known if last_use[value] >= stop]
        after = [*kept, *made]
        yield _names(known), _names(made), _names(after)
        known, start = after, stop


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that `node` and the bodies in it read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            bodies = [attribute.value] if isinstance(attribute.value, ir.Graph) else attribute.value
            for body in bodies:
                for inner in body.all_nodes():
                    yield from (value for value in inner.inputs if value is not None)


def advance(model: ir.Model, part: Part, alive: list[Batch], work: Path) -> None:
    """Compute a part of the graph for every batch, and drop what is not read any more."""
    known, made, kept = part
    if made:
        values = ir.convenience.create_value_mapping(model.graph)
        for name in known:
            values[name].dtype = values[name].dtype or ir.DataType.from_numpy(alive[0][name].dtype)
        graph = ir.convenience.extract(model.graph, known, made)
        functions = list(model.functions.values())
        path = work / "part.onnx"
        ir.save(ir.Model(graph, ir_version=model.ir_version, functions=functions), path)
        session = open_session(path)
        path.unlink()
    for batch in alive:
        if made:
            feed = {i.name: batch[i.name] for i in session.get_inputs()}
            batch.update(zip(made, session.run(made, feed), strict=True))
        for name in set(batch) - set(kept):
            del batch[name]


def read_rounded(linear: Linear, weight: QuantizedWeight) -> None:
    """Make `linear` read what the codes of `weight` stand for, computed when a graph is written:
    one in RAM for every Linear would be the model once more."""
    shape = (linear.in_features, linear.out_features)
    own = derived(linear.weight, "rounded", lambda _: weight.dequantized(), shape)
    linear.matmul.replace_input_with(1, own)


def gram_of(alive: Sequence[Batch], site: Site) -> Array:
    """Σ xᵀx over all rows, float64 [K, K]."""
    gram = np.zeros((site.channels, site.channels))
    for batch in alive:
        rows = batch[str(site.x.name)].reshape(-1, site.channels)
        for at in range(0, len(rows), ROWS):
            some = rows[at : at + ROWS]
            gram += some.T @ some
    if not np.isfinite(gram).all():
        raise CalibrationError(
            f"the input of {site.name} is NaN or infinite on the calibration data",
            hint="check the model in float on the same inputs",
        )
    return gram
