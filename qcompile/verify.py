"""Verification, a part of compiling: what runs, how far from float it is, how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.cache import fed
from qcompile.equivalence import float_problems
from qcompile.kernels import Kernels, expected_kernels, read_back
from qcompile.metrics import Accuracy, sqnr_db
from qcompile.precision import PrecisionPlan
from qcompile.report import Speed
from qcompile.session import Runtime, divisible, first_sample, open_session, run_outputs
from qcompile.shapes import shape_of
from qcompile.stepping import check_steps
from qcompile.targets.base import Target
from qcompile.timing import speed_ratio
from qcompile.traced import Batch, Kind

OUTPUT_BYTES_AT_ONCE = 32 << 20
"""Outputs are compared in slices of the batch, so that logits of a large vocabulary fit."""

RUINED = {"kl": 1.0, "cosine": 0.9}
"""Beyond these (KL above, cosine below) a compiled model is taken for broken."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found."""

    kernels: Kernels
    accuracy: dict[str, float]
    speed: list[Speed]
    problems: list[str]
    decoded: dict[str, float] = dataclasses.field(default_factory=dict)


def verify(
    traced_path: Path,
    float_path: Path,
    compiled_path: Path,
    plan: PrecisionPlan,
    target: Target,
    kind: Kind,
    held_back: Sequence[Batch],
    timed: Sequence[Batch] | None = (),
    *,
    baseline_path: Path | None = None,
    past: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Open the graphs, compare kernels with the plan and outputs with each other.

    Args:
        traced_path: the float graph as it was traced or read: what accuracy is measured against.
        float_path: the rewritten float32 graph.
        compiled_path: the graph that will ship.
        plan: what was promised.
        target: which kernel each promise means.
        kind: which accuracy measure applies.
        held_back: feeds that calibration did not see.
        timed: feeds to measure speed on, by default the first held-back sample; None: it is not.
        baseline_path: what speed is measured against; None: `float_path`.
        past: where the graphs keep keys and values, how many tokens come before a feed of one
            token that is timed; None: they keep none.
        progress: called with (batches done, batches in all).

    Returns:
        The findings; `problems` lists, in full sentences, what does not hold.
    """
    runtime = target.runtime()
    kernels = read_back(compiled_path, float_path.parent, runtime if target.runs_here else None)
    problems = [
        f"{m.name} is planned for {m.expected} but ONNX Runtime runs {m.found}"
        for m in kernels.mismatches(expected_kernels(plan, target))
    ]
    problems += float_problems(traced_path, float_path, held_back[0])
    reference = open_session(traced_path)
    compiled = open_session(compiled_path, runtime, exact=not target.saturates)
    accuracy = Accuracy(kind)
    for done, batch in enumerate(held_back):
        compare(reference, compiled, batch, accuracy)
        if progress:
            progress(done + 1, len(held_back))
    del reference, compiled
    figures = accuracy.result()
    problems += accuracy_problems(accuracy, figures)
    # By other means than the target's kernels, times would say nothing about it.
    speed = []
    if target.runs_here and timed is not None:
        speed = _speeds(
            baseline_path or float_path, compiled_path, runtime, timed, held_back[0], past or 0
        )
    decoded: dict[str, float] = {}
    if past is not None:
        steps, found = check_steps(
            traced_path, float_path, compiled_path, target, kind, held_back[0]
        )
        decoded = steps.result()
        problems += [*found, *(f"with the cache, {p}" for p in accuracy_problems(steps, decoded))]
    return Verification(kernels, figures, speed, problems, decoded)


def compare(
    reference: ort.InferenceSession, compiled: ort.InferenceSession, batch: Batch, into: Accuracy
) -> None:
    """Run both sessions on `batch`, in slices where it can be cut, and add the comparison."""
    samples = divisible(reference, batch, compiled)
    if samples is None:
        into.add_all(batch, run_outputs(reference, batch), run_outputs(compiled, batch))
        return
    start, step = 0, 1  # one sample tells how large the outputs are
    while start < samples:
        part = {key: value[start : start + step] for key, value in batch.items()}
        expected = run_outputs(reference, part)
        into.add_all(part, expected, run_outputs(compiled, part))
        start += step
        size = sum(output.nbytes for output in expected.values())
        step = max(1, OUTPUT_BYTES_AT_ONCE // max(1, size // step))


def accuracy_problems(accuracy: Accuracy, figures: dict[str, float]) -> list[str]:
    """What is wrong with the figures, in sentences."""
    if not accuracy.reference_finite:
        return ["the float model's own outputs are NaN or infinite on the held-back data"]
    if not accuracy.finite or not all(np.isfinite(list(figures.values()))):
        return ["the compiled model's outputs are NaN or infinite"]
    problems = []
    if figures.get("kl", 0.0) > RUINED["kl"]:
        problems.append(
            f"the compiled model is ruined: KL {figures['kl']:.3g} nats to the float model"
        )
    if figures.get("cosine", 1.0) < RUINED["cosine"]:
        problems.append(
            f"the compiled model is ruined: cosine {figures['cosine']:.3g} to the float model"
        )
    return problems


def measure_sqnr(
    float_model: ir.Model, compiled_path: Path, plan: PrecisionPlan, feed: Batch, work: Path
) -> dict[str, float]:
    """SQNR in dB of each planned op's output, compiled against float, on one sample.

    Args:
        float_model: the float graph, smoothed as the compiled one is.
        compiled_path: the lowered graph. An op whose output a fusion removed is left out.
        plan: names the ops and their outputs.
        feed: one feed, cut to its first sample.
        work: the folder that holds the float graph's external data.
    """
    if not plan.quantized:
        return {}
    compiled = ir.load(compiled_path)
    one = first_sample(open_session(compiled_path), feed)
    present = _value_names(float_model) & _value_names(compiled)
    shared = {op.name: op.output for op in plan.ops if op.output in present}
    result: dict[str, float] = {}
    ops = list(shared)
    # A few ops at a time: their outputs leave the session.
    for start in range(0, len(ops), 16):
        part = ops[start : start + 16]
        outputs = [shared[op] for op in part]
        pair = [
            _run_exposed(float_model, outputs, one, work),
            _run_exposed(compiled, outputs, one, compiled_path.parent),
        ]
        for op, reference, given in zip(part, *pair, strict=True):
            # A target may keep batch and sequence apart where the float graph joined them.
            actual = given.reshape(reference.shape)
            noise = np.square(reference - actual, dtype=np.float64).sum()
            signal = np.square(reference, dtype=np.float64).sum()
            result[op] = sqnr_db(float(signal), float(noise))
    return result


def _value_names(model: ir.Model) -> set[str]:
    return {str(v.name) for node in model.graph for v in node.outputs}


def _run_exposed(model: ir.Model, names: list[str], feed: Batch, folder: Path) -> list[np.ndarray]:
    clone = model.clone()
    values = ir.convenience.create_value_mapping(clone.graph)
    clone.graph.outputs.clear()
    for name in names:
        if values[name].dtype != ir.DataType.FLOAT16:
            values[name].dtype = ir.DataType.FLOAT
        clone.graph.outputs.append(values[name])
    RemoveUnusedNodesPass()(clone)
    path = folder / "exposed.onnx"
    ir.save(clone, path)
    session = open_session(path)
    path.unlink()
    results: list[np.ndarray] = session.run(names, fed(session, feed))
    return results


def _speeds(
    float_path: Path,
    compiled_path: Path,
    runtime: Runtime,
    timed: Sequence[Batch],
    held_back: Batch,
    past: int,
) -> list[Speed]:
    reference, compiled = (
        open_session(path, runtime, spinning=False) for path in (float_path, compiled_path)
    )
    speeds = []
    for feed in timed or [first_sample(reference, held_back)]:
        batch, sequence = shape_of(feed)
        before = past if sequence == 1 else 0
        ratio, rounds = speed_ratio(reference, compiled, feed, past=before)
        speeds.append(
            Speed(batch=batch, sequence=sequence, past=before, ratio=ratio, rounds=rounds)
        )
    return speeds
