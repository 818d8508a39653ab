"""SmoothQuant for the Linears of a graph, before all of its tensors are planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompile.calibration.run import calibrate
from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig
from qcompile.linears import find_sites
from qcompile.passes.smooth_quant import SmoothQuant
from qcompile.passes.untie import Untie
from qcompile.precision import Choice
from qcompile.smoothing import SmoothingPlan, plan_smoothing
from qcompile.traced import Batch


def smooth_linears(
    graph: ir.Model,
    config: CompileConfig,
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SmoothingPlan, dict[str, Stats]]:
    """Fold scales into the Linears of `graph`, in place (arXiv 2211.10438).

    A weight that something else reads too is copied first: its codes are another tensor anyway.

    Args:
        graph: in canonical form.
        config: `smooth`, and which modules its recipe keeps in float.
        batches: feeds of the graph.
        work: folder that holds the graph's external weights.
        progress: called with (batches done, batches in all).

    Returns:
        The plan, and the statistics of its sites before it.
    """
    chosen = {
        linear.name: Choice(
            "float" if config.recipe.rule_for(linear.name).precision == "float" else "static", ""
        )
        for site in find_sites(graph.graph)
        for linear in site.linears
    }
    Untie(name for name, choice in chosen.items() if choice.mode)(graph)
    sites = find_sites(graph.graph)
    stats: dict[str, Stats] = {}
    if config.smooth != "off":
        stats = calibrate(graph, sites, batches, work, gram_stride=None, progress=progress)
    plan = plan_smoothing(sites, stats, config, chosen) if stats else SmoothingPlan()
    SmoothQuant(plan)(graph)
    return plan, stats
