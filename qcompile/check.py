"""`qcompile check`: is an artifact sound on the machine at hand?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from qcompile.artifact import GRAPH, damaged_files, read_record, read_sample
from qcompile.errors import VerificationError
from qcompile.kernels import read_back
from qcompile.metrics import Accuracy
from qcompile.report import Report
from qcompile.session import open_session, run_outputs
from qcompile.targets import get_target
from qcompile.verify import accuracy_problems

_WORSE: Final = 2.0
"""An error this many times the one measured at compile time is another arithmetic, not rounding."""

_NEGLIGIBLE: Final = {"kl": 1e-4, "cosine": 1e-4}


def check_artifact(folder: Path, *, trust_library: bool = False) -> dict[str, Any]:
    """Verify files, kernels, saturation and accuracy of the artifact in `folder`.

    Args:
        folder: the artifact.
        trust_library: whether a library of operators that it carries may be loaded.

    Returns:
        What was found, for printing.

    Raises:
        ModelError: not an artifact, or one that cannot be read.
        VerificationError: it is not what it says, with every reason.
    """
    record, report = read_record(folder), Report.read(folder)
    problems = [f"{name} is missing or changed" for name in damaged_files(folder, record)]
    if problems:
        raise VerificationError(f"{folder}: " + "; ".join(problems))
    target = get_target(report.target)
    runtime = target.runtime(folder, record, trust_library=trust_library)
    kernels = read_back(folder / GRAPH, runtime=runtime if target.runs_here else None)
    planned: dict[str, tuple[str, ...]] = record["kernels"]
    problems += [
        f"{m.name} runs as {m.found}, not {m.expected}" for m in kernels.mismatches(planned)
    ]
    saturates = get_target(report.target.partition(":")[0]).saturates
    unsafe = [op.name for op in report.ops if op.saturation_safe == "no"]
    if saturates and unsafe:
        problems.append(
            f"the int8 kernel of this machine saturates, and {len(unsafe)} ops were compiled for "
            f"one that does not ({record['target']}), the first of them {unsafe[0]}"
        )
    feed, reference, before = read_sample(folder)
    accuracy = Accuracy(record["kind"])
    accuracy.add_all(feed, reference, run_outputs(open_session(folder / GRAPH, runtime), feed))
    now = accuracy.result()
    problems += accuracy_problems(accuracy, now)
    problems += _drift(before, now)
    if problems:
        raise VerificationError(f"{folder}: " + "; ".join(problems))
    return {
        "quantised ops": len(planned),
        "kernels": "as planned" if target.runs_here else "as planned, by other means here",
        "int8 kernel saturates here": saturates,
        **{name: round(value, 6) for name, value in now.items()},
    }


def _drift(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """Whether the error on the recorded sample has grown since the artifact was compiled."""
    problems = []
    if now.get("kl", 0.0) > _WORSE * before.get("kl", 0.0) + _NEGLIGIBLE["kl"]:
        problems.append(f"KL to float was {before['kl']:.3g} and is {now['kl']:.3g} here")
    lost_before, lost = 1.0 - before.get("cosine", 1.0), 1.0 - now.get("cosine", 1.0)
    if lost > _WORSE * lost_before + _NEGLIGIBLE["cosine"]:
        problems.append(f"cosine to float was {before['cosine']:.5f}, is {now['cosine']:.5f} here")
    return problems
