"""The decision how keys and values are kept in codes: scales from calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.cache import KINDS
from qcompile.cache_plan import CachePlan
from qcompile.errors import CalibrationError
from qcompile.passes.kv_cache import KvCache
from qcompile.passes.observe_cache import ObserveCache, cached_attentions, output_name
from qcompile.session import open_session, run_outputs
from qcompile.traced import Batch

Array = npt.NDArray[Any]


REACH: Final = {8: 1.0, 4: 0.7}
"""By bits: which part of the largest magnitude the last code stands for. Of 4 bits, clipping the
largest values costs less than wider steps do (docs/generation.md has the measurements)."""


def plan_cache(
    model: ir.Model,
    bits: int,
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CachePlan:
    """Scales per channel, from the largest magnitudes that calibration saw.

    Args:
        model: the float graph without a cache, smoothed as what will ship is; it is cloned.
        bits: of a code.
        batches: feeds of the graph.
        work: the folder that holds the graph's external weights.
        progress: called with (batches done, batches in all).

    Raises:
        CalibrationError: keys or values are infinite on this data.
        ModelError: the model cannot have a cache.
    """
    observed = model.clone()
    KvCache()(observed)
    heads = [node.attributes.get_int("kv_num_heads", 1) for node in cached_attentions(observed)]
    ObserveCache()(observed)
    path = work / "observed.onnx"
    ir.save(observed, path)
    session = open_session(path, planned=False)
    path.unlink()
    largest: dict[str, Array] = {}
    for done, batch in enumerate(batches):
        for name, found in run_outputs(session, batch).items():
            largest[name] = np.maximum(found, largest.get(name, 0.0))
        if progress:
            progress(done + 1, len(batches))
    scales: dict[str, list[Array]] = {kind: [] for kind in KINDS}
    for layer, count in enumerate(heads):
        for kind in KINDS:
            seen = largest[output_name(layer, kind)]
            if not np.isfinite(seen).all():
                raise CalibrationError(
                    f"the {kind}s of layer {layer} are infinite on the calibration data",
                    hint="check the model in float on the same inputs",
                )
            scales[kind].append(_scale(seen, bits).reshape(count, -1))
    return CachePlan(bits, tuple(scales["key"]), tuple(scales["value"]))


def _scale(largest: Array, bits: int) -> Array:
    scale = (REACH[bits] * largest / (2 ** (bits - 1) - 1)).astype(np.float32)
    # A channel that is always zero may have any.
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1.0))
