"""Verification of an edge artifact: what is in the graph, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.edge.plan import DTYPES
from qcompile.edge.profiles import Profile
from qcompile.edge.settings import Settings
from qcompile.equivalence import float_problems, largest_difference
from qcompile.errors import VerificationError
from qcompile.kernels import read_back
from qcompile.metrics import Accuracy
from qcompile.session import Runtime, first_sample, open_session
from qcompile.traced import Batch, Kind
from qcompile.verify import Verification, accuracy_problems, compare

ROUNDING: Final = 1e-4
"""Difference of two orders of summation, relative to the largest value."""

_QDQ: Final = ("QuantizeLinear", "DequantizeLinear")


def verify_edge(
    traced_path: Path,
    float_path: Path,
    path: Path,
    profile: Profile,
    settings: Settings,
    opset: int,
    runtime: Runtime,
    kind: Kind,
    held_back: Sequence[Batch],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check the graph, run it, and compare it with the float model.

    Args:
        traced_path: the float graph as it was traced: what accuracy is measured against.
        float_path: the same in primitive ops.
        path: the graph that will ship.
        profile: what may be in it.
        settings: the types of codes.
        opset: that was asked for.
        runtime: how it is opened here.
        kind: which accuracy measure applies.
        held_back: feeds that calibration did not see.
        progress: called with (batches done, batches in all).

    Returns:
        The findings; `problems` lists, in full sentences, what does not hold.

    Raises:
        VerificationError: ONNX Runtime cannot run the graph at all.
    """
    problems = graph_problems(path, profile, settings, opset)
    problems += float_problems(traced_path, float_path, held_back[0])
    problems += level_problems(path, runtime, held_back[0])
    reference, compiled = open_session(traced_path), open_session(path, runtime)
    accuracy = Accuracy(kind)
    for done, batch in enumerate(held_back):
        compare(reference, compiled, batch, accuracy)
        if progress:
            progress(done + 1, len(held_back))
    figures = accuracy.result()
    problems += accuracy_problems(accuracy, figures)
    return Verification(read_back(path, runtime=None), figures, [], problems)


def graph_problems(path: Path, profile: Profile, settings: Settings, opset: int) -> list[str]:
    """What the graph in `path` holds that it must not, in sentences: ONNX's checker, then a walk.

    Allowed are operators of ONNX itself in the opset, no functions, codes of the types in
    `settings` (int32 for biases), and Q/DQ only around what the profile runs quantised.
    """
    problems = []
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        problems.append(f"ONNX's checker refuses the graph: {' '.join(str(error).split())}")
    except onnx.shape_inference.InferenceError as error:
        problems.append(f"ONNX's shape inference refuses it: {' '.join(str(error).split())}")
    model = ir.load(path)
    if model.opset_imports.get("") != opset or set(model.opset_imports) - {""}:
        problems.append(f"the graph imports {dict(model.opset_imports)}, and not opset {opset}")
    if model.functions:
        problems.append("the graph has functions")
    codes = {
        *(np.dtype(DTYPES[code]) for code in (settings.activation, *profile.weights)),
        np.dtype(np.int32),
        *([np.dtype(np.int8)] if profile.per_channel else ()),
    }
    for node in model.graph.all_nodes():
        if node.domain:
            problems.append(f"{node.name} is {node.domain}.{node.op_type}, no operator of ONNX's")
        if node.op_type in _QDQ:
            points = node.inputs[2] if len(node.inputs) > 2 else None
            made = points if points is not None else node.inputs[0]
            if made is not None and made.dtype is not None and made.dtype.numpy() not in codes:
                problems.append(f"{node.name} has codes of {made.dtype.name.lower()}")
        if node.op_type == "QuantizeLinear":
            problems += _around(node, profile)
    return problems


def _around(quantize: ir.Node, profile: Profile) -> list[str]:
    """A problem where neither what makes a tensor nor any reader of its codes runs quantised."""
    x = quantize.inputs[0]
    producer = x.producer() if x is not None else None
    near = [producer.op_type] if producer is not None else []
    for dequantize, _ in quantize.outputs[0].uses():
        near += [node.op_type for node in dequantize.outputs[0].consumers()]
    if not profile.quantizes.intersection(near):
        return [f"{quantize.name} gives codes to a tensor between {', '.join(near) or 'nothing'}"]
    return []


def level_problems(path: Path, runtime: Runtime, feed: Batch) -> list[str]:
    """Ops whose codes differ by more than one with ONNX Runtime's optimisations, in sentences.

    With all of them integer kernels run, with none the floats that Q/DQ stand for. Each op is given
    the same codes in both, those of the run without: a code that is rounded the other way becomes
    several further on, which says nothing about the op. Outputs in float may differ by rounding.
    """
    model = ir.load(path)
    codes = {
        str(node.outputs[0].name): node.outputs[0]
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }
    sample = first_sample(open_session(path, runtime), feed)
    model.graph.outputs.extend(codes.values())
    plain = _run(model, path.parent, runtime, sample, optimised=False)
    for name, value in codes.items():
        given = ir.Value(name=f"{name}/given", type=value.type, shape=value.shape)
        for node, index in list(value.uses()):
            node.replace_input_with(index, given)
        model.graph.inputs.append(given)
        sample = {**sample, f"{name}/given": plain[name]}
    optimised = _run(model, path.parent, runtime, sample)
    problems = []
    for name, expected in plain.items():
        off = largest_difference(expected, optimised[name])
        largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        allowed = 1.0 if name in codes else ROUNDING * largest
        if not off <= allowed:
            unit = "codes" if name in codes else "in float"
            problems.append(
                f"with all optimisations {name.removesuffix('/codes')} differs by {off:.3g} {unit} "
                "from what it is without"
            )
    return problems


def _run(
    model: ir.Model, folder: Path, runtime: Runtime, feed: Batch, *, optimised: bool = True
) -> Batch:
    path = folder / "levels.onnx"
    ir.save(model, path)
    session = open_session(path, runtime, optimised=optimised)
    path.unlink()
    names = [output.name for output in session.get_outputs()]
    wanted = {each.name for each in session.get_inputs()}
    inputs = {name: value for name, value in feed.items() if name in wanted}
    try:
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime raises its own, unexported types
        detail = " ".join(str(error).split())
        raise VerificationError(f"ONNX Runtime fails on the compiled graph: {detail}") from error
