"""Keep a limit on the divergence as measured, where a plan was chosen by predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from qcompile.choosing import Decision, decide
from qcompile.config import CompileConfig
from qcompile.errors import ConfigError, VerificationError
from qcompile.lowering import open_lowered
from qcompile.metrics import Accuracy
from qcompile.precision import Choice, PrecisionPlan
from qcompile.progress import Phases
from qcompile.session import open_session
from qcompile.smoothing import SmoothingPlan
from qcompile.targets.base import Target
from qcompile.traced import Batch, Kind
from qcompile.verify import compare

TRIES: Final = 5
"""Plans to try before the best of them is taken."""

Applied: TypeAlias = tuple[ir.Model, SmoothingPlan, PrecisionPlan]
"""A graph smoothed for a choice, and the decisions that go with it."""


class Apply(Protocol):
    """Smooth and quantise for a choice; graphs of several choices need stems of their own."""

    def __call__(self, chosen: dict[str, Choice], stem: str) -> Applied: ...


class Try(Protocol):
    """The mean KL to float of what was applied."""

    def __call__(self, graph: ir.Model, plan: PrecisionPlan) -> float: ...


def keep_within(
    decision: Decision, config: CompileConfig, apply: Apply, tried: Try, work: Path, phases: Phases
) -> tuple[Decision, Applied]:
    """Build `decision`, measure it, and decide anew with the prediction set right by that.

    A prediction that was too low gives a stricter plan, one that was too high a faster one; the
    best plan that keeps the limit is returned.

    Raises:
        ConfigError: none does.
        VerificationError: outputs are NaN or infinite.
    """
    assert config.max_kl is not None
    best: tuple[Decision, Applied] | None = None
    seen: list[dict[str, str]] = []
    divergences: list[float] = []
    kept = ""
    for attempt in range(TRIES):
        stem = f"smoothed{attempt}"
        applied = apply(decision.chosen, stem=stem)
        with phases.phase("try"):
            found = tried(applied[0], applied[2])
        if not np.isfinite(found):
            raise VerificationError("the compiled model's outputs are NaN or infinite")
        seen.append(dict(decision.solution.labels))
        divergences.append(found)
        if found <= config.max_kl and (best is None or decision.value < best[0].value):
            best, stem, kept = (decision, applied), kept, stem
        for file in work.glob(f"{stem}.onnx*") if stem else ():
            file.unlink()  # the graph of a plan that is not taken is as large as the model
        predicted = float(decision.solution.cost[-2])
        if predicted <= 0.0 or found <= 0.0 or attempt + 1 == TRIES:
            break
        try:
            decision = decide(decision.measured, config, correction=found / predicted)
        except ConfigError:
            if best is None:
                raise
            break
        known = dict(decision.solution.labels) in seen
        if known or (best is not None and decision.value >= best[0].value):
            break
    if best is None:
        raise ConfigError(
            f"max_kl {config.max_kl:g}: the best plan of {len(seen)} tried has "
            f"{min(divergences):.3g} as measured"
        )
    return best


def tried_kl(
    target: Target,
    traced_path: Path,
    kind: Kind,
    held_back: Sequence[Batch],
    work: Path,
    graph: ir.Model,
    plan: PrecisionPlan,
) -> float:
    """Mean KL to float of the smoothed float `graph` quantised by `plan`, nothing emitted.

    Args:
        target: lowers it.
        traced_path: the float graph to compare with.
        kind: of a model with a KL.
        held_back: feeds that calibration did not see.
        work: folder for graphs, that of the weights of `graph`.
        graph: it is not changed.
        plan: for `graph`.
    """
    compiled = open_lowered(graph.clone(), plan, target, work)
    reference, accuracy = open_session(traced_path), Accuracy(kind)
    for batch in held_back:
        compare(reference, compiled, batch, accuracy)
    return accuracy.result()["kl"]
