"""What quantising each op does to the model's output, from one backward pass per sample.

To second order the divergence of the outputs is a quadratic form of the outputs' error: for
probabilities p = softmax(z), KL = ½ δzᵀ (diag(p) − ppᵀ) δz, and that matrix, the Fisher
information, is the mean of ggᵀ over labels drawn from p, with g = ∂ log p(label) / ∂z. Carried back
to an op's output y by one backward pass per draw, the op's part is

    KL(op) = ½ Σ over rows of (∂ log p / ∂y · δy)²,

with δy the error that quantising this op alone makes there: x̂Ŵ − xW. Errors of different ops and
rows count as independent, so the parts add up. Outputs that are no probabilities use a random
direction in place of a label: the same for the squared error (Hutchinson's estimator), relative to
the output's square; for embeddings, of the direction of the pooled vector: 1 − cosine.

The cost is two matrix products per op and implementation, and a backward pass per draw: linear in
the number of ops. `benchmarks.sensitivity` compares it with quantising each op alone, which is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.errors import CalibrationError
from qcompile.linears import find_linears
from qcompile.precision import ActivationQuant, Label, OpPlan, PrecisionPlan
from qcompile.session import open_session
from qcompile.torch_graph import UnsupportedOpError, check_supported, downstream, evaluate, frontier
from qcompile.traced import Batch, Kind

Tensor: TypeAlias = torch.Tensor
Damage: TypeAlias = dict[str, dict[Label, float]]
"""Op -> implementation -> its part of the output's divergence."""

DRAWS: Final = 2
SAMPLES: Final = 4
TOKENS: Final = 128
_BLOCK_LEVELS: Final = 127
_NOT_FINITE: Final = "the float model's outputs or gradients are NaN or infinite on the data"


def unit_of(kind: Kind) -> str:
    """What damage is measured in."""
    if kind in ("text-generation", "text-classification"):
        return "KL"
    return "1 − cosine" if kind == "feature-extraction" else "relative squared error"


def measure_importance(
    path: Path, feeds: Sequence[Batch], kind: Kind, *, seed: int = 0
) -> dict[str, npt.NDArray[np.float64]]:
    """How much a squared error of each output of each Linear moves the model: E[g²], float64 [N].

    Args:
        path: the float graph, not smoothed.
        feeds, kind, seed: as `measure_damage` takes them.

    Raises:
        UnsupportedOpError: an op that PyTorch is not told how to compute.
    """
    model = ir.load(path)
    found: dict[str, npt.NDArray[np.float64]] = {}
    ops = {linear.matmul: linear.name for linear in find_linears(model.graph)}
    for _, _, seen in _backward(model, path, ops, feeds, kind, seed):
        for name, each in seen.items():
            squares = sum(g.double().square().flatten(0, -2).sum(0) for g in each.gradients)
            if each.gradients:
                found[name] = found.get(name, 0.0) + np.asarray(squares)
    return found


def measure_damage(
    path: Path,
    plans: Mapping[Label, PrecisionPlan],
    feeds: Sequence[Batch],
    kind: Kind,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Damage:
    """The damage of every op that a plan quantises, by the plan's label.

    Args:
        path: the float graph that the plans are for, smoothed as they want it.
        plans: label -> a plan that gives this implementation to every op that can have it.
        feeds: small, of one sample each.
        kind: which divergence.
        seed: of the draws.
        progress: called with (feeds done, feeds in all).

    Raises:
        UnsupportedOpError: an op that PyTorch is not told how to compute.
        CalibrationError: the float model's gradient is not finite on these feeds.
    """
    model = ir.load(path)
    linears = {linear.name: linear for linear in find_linears(model.graph)}
    ops = {
        linears[op.name].matmul: op.name
        for plan in plans.values()
        for op in plan.quantized
        if op.name in linears
    }
    total: dict[str, dict[Label, float]] = {name: {} for name in ops.values()}
    rows = 0.0
    for done, (count, draws, seen) in enumerate(_backward(model, path, ops, feeds, kind, seed)):
        rows += count
        for name, each in seen.items():
            for label, plan in plans.items():
                part = _part(each, label, name, plan)
                if part is not None:
                    total[name][label] = total[name].get(label, 0.0) + part / draws
        if progress:
            progress(done + 1, len(feeds))
    if not np.isfinite([part for parts in total.values() for part in parts.values()]).all():
        raise CalibrationError(_NOT_FINITE)
    rows = max(rows, 1.0)
    return {n: {k: part / rows for k, part in parts.items()} for n, parts in total.items()}


def _backward(
    model: ir.Model,
    path: Path,
    ops: Mapping[ir.Node, str],
    feeds: Sequence[Batch],
    kind: Kind,
    seed: int,
) -> Iterator[tuple[float, int, dict[str, _Seen]]]:
    """For each feed: its rows, the number of draws, and what every op saw."""
    nodes = downstream(model.graph, list(ops))
    check_supported(nodes)
    given = Leaves(model, frontier(nodes), path)
    constants: dict[ir.Value, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for feed in feeds:
        tape = _Tape(ops)
        values = evaluate(nodes, given(feed), constants, tape)
        losses, count = _losses(_output(model, values), feed, kind, generator)
        del values
        tape.backward(losses)
        yield count, len(losses), tape.seen


@dataclasses.dataclass
class _Seen:
    """What one MatMul did: its input and output, and the gradients at its output."""

    x: Tensor
    y: Tensor
    gradients: list[Tensor] = dataclasses.field(default_factory=list)


class _Tape:
    """Keeps what the ops of interest do while the graph runs."""

    def __init__(self, ops: Mapping[ir.Node, str]) -> None:
        self.ops = ops
        self.seen: dict[str, _Seen] = {}

    def __call__(self, node: ir.Node, inputs: list[Any], made: Tensor) -> Tensor:
        name = self.ops.get(node)
        if name is None:
            return made
        if not made.requires_grad:
            made.requires_grad_()
        self.seen[name] = _Seen(inputs[0].detach(), made)
        return made

    def backward(self, losses: Sequence[Tensor]) -> None:
        outputs = [seen.y for seen in self.seen.values()]
        for at, loss in enumerate(losses):
            gradients = torch.autograd.grad(
                loss, outputs, retain_graph=at + 1 < len(losses), allow_unused=True
            )
            for seen, gradient in zip(self.seen.values(), gradients, strict=True):
                if gradient is not None:
                    seen.gradients.append(gradient)
        for seen in self.seen.values():
            seen.y = seen.y.detach()


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
    if kind in ("text-generation", "text-classification"):
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


def _part(seen: _Seen, label: Label, name: str, plan: PrecisionPlan) -> float | None:
    """½ Σ over rows and draws of (g · δy)², or None where the plan leaves the op in float."""
    op = plan.op(name)
    if op.weight is None:
        return None
    x_hat = quantized_activation(seen.x, op, plan)
    w_hat = torch.from_numpy(op.weight.dequantized().astype(np.float32))
    error = x_hat @ w_hat - seen.y
    return sum(
        0.5 * float((gradient * error).sum(-1).double().square().sum())
        for gradient in seen.gradients
    )


def quantized_activation(x: Tensor, op: OpPlan, plan: PrecisionPlan) -> Tensor:
    """x̂: `x` [..., K] as the kernel of a planned op sees it, in float; copies are appended."""
    if op.precision != "int8":
        return _per_block(x, 0 if op.weight is None else op.weight.block_size or 0)
    site = plan.site(op.site)
    assert site is not None
    activation: ActivationQuant = site.activation
    if activation.mode == "token":
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127.0
        return (x / scale).round().clamp(-128, 127) * scale
    if activation.mode == "dynamic":
        low, high = float(x.min().clamp_max(0)), float(x.max().clamp_min(0))
        step = max((high - low) / 255.0, 1e-30)
        zero = round(-low / step)
    else:
        assert activation.scale is not None and activation.zero_point is not None
        step, zero = activation.scale, activation.zero_point
    if activation.split is not None:
        copies = x.index_select(-1, torch.from_numpy(activation.split.appended))
        shifts = torch.from_numpy(activation.split.offsets * step).float()
        x = torch.cat((x, (copies + shifts) / activation.split.copies), -1)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def _per_block(x: Tensor, size: int) -> Tensor:
    """Symmetric int8 per row and block of `size` channels, as MatMulNBits does at level 4."""
    depth = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -depth % size))
    blocks = padded.reshape([*x.shape[:-1], -1, size])
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _BLOCK_LEVELS
    rounded: Tensor = ((blocks / scale).round() * scale).flatten(-2)
    return rounded[..., :depth]
