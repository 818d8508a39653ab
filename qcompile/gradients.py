"""How much an error in each op's output moves the model's, from a backward pass per draw.

To second order the divergence of the outputs is a quadratic form of the outputs' error: for
probabilities p = softmax(z), KL = ½ δzᵀ (diag(p) − ppᵀ) δz, and that matrix, the Fisher
information, is the mean of ggᵀ over labels drawn from p, with g = ∂ log p(label) / ∂z. One backward
pass per draw carries g back to the output y of every op. Outputs that are no probabilities use a
random direction in place of a label: the same for the squared error (Hutchinson's estimator),
relative to the output's square; for embeddings, of the direction of the pooled vector: 1 − cosine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.errors import CalibrationError
from qcompile.linears import Site, find_linears, find_sites
from qcompile.session import open_session
from qcompile.spill import release
from qcompile.torch_graph import UnsupportedOpError, check_supported, downstream, evaluate, frontier
from qcompile.traced import LOGITS, Batch, Kind

Tensor: TypeAlias = torch.Tensor
Squares: TypeAlias = dict[str, npt.NDArray[np.float64]]

DRAWS: Final = 2
ROWS: Final = 2048
"""Rows of an op that are kept, over all feeds: what is kept grows with the widths, not the data."""

COLUMNS: Final = 128
MOST_STRIDE: Final = 6
"""Outputs of a wide op that are kept, evenly spaced: one in this many, but no fewer than that."""

_NOT_FINITE: Final = "the float model's outputs or gradients are NaN or infinite on the data"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one op did on one feed.

    Attributes:
        x: its input, float32 [rows, K].
        extremes: smallest and largest of each input channel over all rows, float32 [2, K].
        back: ∂ / ∂x through this op alone, of each draw, bfloat16 [draws, rows, K].
        gradients: ∂ / ∂y of each draw, for the outputs of `kept_columns`, bfloat16 [draws, rows,
            columns].
        share: all rows by those that are kept.
    """

    x: Tensor
    extremes: Tensor
    back: Tensor
    gradients: Tensor
    share: float


def kept_columns(width: int) -> slice:
    """Of the outputs of an op."""
    return slice(None, None, min(MOST_STRIDE, max(width // COLUMNS, 1)))


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much a squared error counts by the channel that it is in: Σ g² over rows and draws.

    Attributes:
        outputs: op -> of its outputs, [N].
        inputs: site -> of its activation, through all the ops that read it at once, [K].
    """

    outputs: Squares
    inputs: Squares


@dataclasses.dataclass
class Gradients:
    """Of all ops over all feeds.

    Attributes:
        seen: op -> what it did on each feed that its output counts in.
        importance: of every op's and every site's channels.
        rows: of the model's output, over which its divergence is a mean.
    """

    seen: dict[str, list[Seen]]
    importance: Importance
    rows: float = 0.0


def measure_gradients(
    path: Path,
    feeds: Sequence[Batch],
    kind: Kind,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gradients:
    """Run the float graph forth and back on every feed.

    Args:
        path: the graph.
        feeds: small, of one sample each.
        kind: which divergence.
        seed: of the draws.
        progress: called with (feeds done, feeds in all).

    Raises:
        UnsupportedOpError: an op that PyTorch is not told how to compute.
        CalibrationError: outputs or gradients are not finite on these feeds, or all is masked.
    """
    model = ir.load(path)
    sites = find_sites(model.graph)
    ops = {linear.matmul: linear.name for site in sites for linear in site.linears}
    nodes = evaluated(model.graph)
    check_supported(nodes)
    leaves = Leaves(model, frontier(nodes), path)
    given = [leaves(feed) for feed in feeds]
    del leaves
    constants: dict[ir.Value, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    found = Gradients({name: [] for name in ops.values()}, Importance({}, {}))
    most = max(ROWS // len(feeds), 1)
    for done, feed in enumerate(feeds):
        tape = _Tape(ops)
        values = evaluate(nodes, given[done], constants, tape)
        losses, count = _losses(_output(model, values), feed, kind, generator)
        found.rows += count
        # Nothing of one feed may stay while the next one runs.
        del values
        _collect(tape, losses, sites, most, found)
        del tape, losses
        if progress:
            progress(done + 1, len(feeds))
    constants.clear()
    release(model)
    if not found.rows:
        raise CalibrationError(
            "damage cannot be estimated: every token of the samples set aside for it is masked"
        )
    return found


def evaluated(graph: ir.Graph) -> list[ir.Node]:
    """Everything that a Linear reaches, and what transposes a weight: as a view of it there."""
    roots = [linear.matmul for linear in find_linears(graph)]
    weights = [node.inputs[1] for node in roots]
    transposes = [value.producer() for value in weights if value is not None]
    return downstream(graph, [*roots, *(node for node in transposes if node is not None)])


def _collect(
    tape: _Tape, losses: list[Tensor], sites: Sequence[Site], most: int, found: Gradients
) -> None:
    """Add what one feed gives to `found`; each of `losses` is dropped when it is done."""
    drawn: dict[str, list[tuple[Tensor, Tensor]]] = {}
    while losses:
        gradients = tape.backward(losses.pop(0), last=not losses)
        for site in sites:
            backs = []
            for name in (n.name for n in site.linears if n.name in gradients):
                back, gradient = gradients.pop(name)
                backs.append(back)
                _add(found.importance.outputs, name, gradient)
                gradient = _some(gradient, most)[:, kept_columns(gradient.shape[-1])]
                drawn.setdefault(name, []).append(
                    (_some(back, most).bfloat16(), gradient.bfloat16())
                )
            if backs:
                _add(found.importance.inputs, site.name, torch.stack(backs).sum(0))
    for name, draws in drawn.items():
        x = tape.x(name)
        kept = _some(x, most)
        found.seen[name].append(
            Seen(
                x=kept,
                extremes=torch.stack((x.amin(0), x.amax(0))),
                back=torch.stack([back for back, _ in draws]),
                gradients=torch.stack([gradient for _, gradient in draws]),
                share=len(x) / len(kept),
            )
        )


def _add(total: Squares, name: str, gradient: Tensor) -> None:
    """Sum the squares of `gradient` [rows, channels] up."""
    squares = gradient.square().sum(0, dtype=torch.float64).numpy()
    if not np.isfinite(squares).all():
        raise CalibrationError(_NOT_FINITE)
    total[name] = total.get(name, 0.0) + squares


def _some(values: Tensor, most: int) -> Tensor:
    """At most `most` rows, evenly spaced: a view where that is all of them."""
    stride = -(-len(values) // most)
    return values if stride == 1 else values[::stride].clone()


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


class _Tape:
    """Keeps what the ops of interest do while the graph runs."""

    def __init__(self, ops: Mapping[ir.Node, str]) -> None:
        self.ops = ops
        self.made: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, node: ir.Node, inputs: list[Any]) -> Tensor:
        x, weight = inputs
        name = self.ops.get(node)
        if name is not None:
            # A view of its own: its gradient is through this op alone.
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        made: Tensor = x @ weight
        if name is not None:
            self.made[name] = (x, made)
        return made

    def x(self, name: str) -> Tensor:
        """The input of an op, [rows, K]."""
        return _rows(self.made[name][0].detach())

    def backward(self, loss: Tensor, *, last: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Op -> the gradients at its input, through it alone [rows, K], and at its output
        [rows, N], of the ops that `loss` depends on."""
        wanted = [tensor for pair in self.made.values() for tensor in pair]
        gradients = torch.autograd.grad(loss, wanted, retain_graph=not last, allow_unused=True)
        return {
            name: (_rows(back), _rows(gradient))
            for name, back, gradient in zip(self.made, gradients[::2], gradients[1::2], strict=True)
            if back is not None and gradient is not None
        }


class Leaves:
    """Computes, in ONNX Runtime, what the evaluated part of the graph starts from."""

    def __init__(self, model: ir.Model, leaves: Sequence[ir.Value], path: Path) -> None:
        self.leaves = leaves
        computed = [v for v in leaves if not v.is_graph_input()]
        clone = model.clone()
        values = ir.convenience.create_value_mapping(clone.graph)
        clone.graph.outputs.clear()
        clone.graph.outputs.extend(values[str(v.name)] for v in computed)
        RemoveUnusedNodesPass()(clone)
        scratch = path.with_name("leaves.onnx")
        ir.save(clone, scratch)
        self.session = open_session(scratch) if computed else None
        self.names = [str(v.name) for v in computed]
        scratch.unlink()

    def __call__(self, feed: Batch) -> dict[ir.Value, np.ndarray]:
        found = dict(feed)
        if self.session is not None:
            wanted = {i.name: feed[i.name] for i in self.session.get_inputs()}
            found |= dict(zip(self.names, self.session.run(self.names, wanted), strict=True))
        return {value: found[str(value.name)] for value in self.leaves}


def _output(model: ir.Model, values: Mapping[ir.Value, Tensor]) -> Tensor:
    """The output that accuracy is measured on."""
    preferred = ("logits", "last_hidden_state")
    outputs = [v for v in model.graph.outputs if v in values and values[v].requires_grad]
    outputs.sort(key=lambda v: v.name not in preferred)
    if not outputs:
        raise UnsupportedOpError("what makes the outputs")
    return values[outputs[0]]


def _losses(
    output: Tensor, feed: Batch, kind: Kind, generator: torch.Generator
) -> tuple[list[Tensor], float]:
    """One scalar per draw, and the number of rows that the divergence is a mean over."""
    mask = feed.get("attention_mask")
    if kind in LOGITS:
        logits = torch.log_softmax(output.flatten(0, -2), -1)
        keep = torch.ones(len(logits), dtype=torch.bool)
        if mask is not None and mask.size == len(logits):
            keep = torch.from_numpy(np.array(mask)).bool().reshape(-1)
        logits = logits[keep]
        if not torch.isfinite(logits).all():
            raise CalibrationError(_NOT_FINITE)
        drawn = torch.multinomial(logits.detach().exp(), DRAWS, True, generator=generator)
        return [logits.gather(1, drawn[:, at : at + 1]).sum() for at in range(DRAWS)], len(logits)
    if kind == "feature-extraction":
        output = output if output.dim() == 3 else output.flatten(1)[:, None, :]
        weights = torch.ones(output.shape[:2])
        if mask is not None and mask.shape == tuple(output.shape[:2]):
            weights = torch.from_numpy(np.array(mask)).float()
        pooled = (output * weights[..., None]).sum(1)
        # What turns the vector counts, not what stretches it.
        unit = (pooled / pooled.norm(dim=-1, keepdim=True)).detach()
        norm = pooled.detach().norm(dim=-1, keepdim=True)
        losses = []
        for _ in range(DRAWS):
            noise = torch.randn(pooled.shape, generator=generator)
            noise = noise - (noise * unit).sum(-1, keepdim=True) * unit
            losses.append((pooled / norm * noise).sum())
        return losses, len(pooled)
    # Twice, because the form below is halved.
    norm = output.detach().norm() / 2**0.5
    flat = output / norm
    return [(flat * torch.randn(flat.shape, generator=generator)).sum() for _ in range(DRAWS)], 1
