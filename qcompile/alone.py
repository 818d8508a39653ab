"""Damage measured the long way, one op at a time, where no gradient can be had to estimate it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompile.linears import find_linears
from qcompile.lowering import open_lowered
from qcompile.metrics import Accuracy
from qcompile.precision import Label, PrecisionPlan
from qcompile.sensitivity import Damage
from qcompile.session import open_session, run_outputs
from qcompile.targets.base import Target
from qcompile.traced import Batch, Kind


def measure_alone(
    path: Path,
    plans: Mapping[Label, PrecisionPlan],
    feeds: Sequence[Batch],
    kind: Kind,
    target: Target,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Damage:
    """As `qcompile.sensitivity.measure_damage`, by running the model once per op and label.

    Args:
        path: the float graph that the plans are for.
        plans: label -> a plan that gives this implementation to every op that can have it.
        feeds: small.
        kind: which divergence.
        target: lowers the ops.
        progress: called with (ops done, ops in all).
    """
    model = ir.load(path)
    reference = open_session(path)
    expected = [run_outputs(reference, feed) for feed in feeds]
    names = [linear.name for linear in find_linears(model.graph)]
    damage: Damage = {}
    for done, name in enumerate(names):
        damage[name] = {}
        for label, plan in plans.items():
            if plan.op(name).weight is None:
                continue
            session = open_lowered(model.clone(), plan.only(name), target, path.parent)
            accuracy = Accuracy(kind)
            for feed, outputs in zip(feeds, expected, strict=True):
                accuracy.add_all(feed, outputs, run_outputs(session, feed))
            damage[name][label] = divergence(accuracy)
        if progress:
            progress(done + 1, len(names))
    return damage


def divergence(accuracy: Accuracy) -> float:
    """The figure that damage is a part of: KL, 1 − cosine, or the relative squared error."""
    figures = accuracy.result()
    if "kl" in figures:
        return figures["kl"]
    if accuracy.kind == "feature-extraction":
        return max(1.0 - figures["cosine"], 0.0)
    return accuracy.noise / max(accuracy.signal, 1e-300)
