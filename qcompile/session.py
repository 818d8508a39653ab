"""Opening ONNX Runtime sessions: in one place, so that all of them behave alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from qcompile.cache import fed, is_present
from qcompile.errors import ModelError, VerificationError

_MEASURED = ("logits", "last_hidden_state")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a session is opened.

    Attributes:
        providers: ONNX Runtime's execution providers, the preferred one first.
        library: of custom operators, to be registered, or None.
        entries: session configuration, as ONNX Runtime names it.
        options: of the preferred provider.
        hosted: names of the nodes that may run on the CPU provider; None: any may.
        stand_in: why the kernels that the graph was made for do not run, where they do not.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    library: Path | None = None
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hosted: frozenset[str] | None = None
    stand_in: str | None = None

    @property
    def device(self) -> str:
        """Where the preferred provider's tensors lie, as ONNX Runtime names it: ``cuda``."""
        return device_of(self.providers[0])


HERE: Final = Runtime()
"""The CPU provider, under default options."""


def device_of(provider: str) -> str:
    """``cuda`` of ``CUDAExecutionProvider``, and the like."""
    return provider.removesuffix("ExecutionProvider").lower()


def open_session(
    path: Path,
    runtime: Runtime = HERE,
    *,
    optimised_to: Path | None = None,
    exact: bool = False,
    optimised: bool = True,
    planned: bool = True,
    spinning: bool = True,
) -> ort.InferenceSession:
    """A session on the file `path`, under default options but for quiet logs.

    Args:
        path: an ONNX file; external data is found beside it.
        runtime: the providers, and what they need; default the CPU.
        optimised_to: where ONNX Runtime writes the graph it really runs.
        exact: integer kernels that do not saturate, whatever the CPU; slower.
        optimised: whether ONNX Runtime may rewrite the graph, as by default.
        planned: reserve each feed shape's activations as one block, as by default; without, a
            graph of many outputs takes less memory.
        spinning: threads wait busily for the next op, as by default. Two sessions that run in turn
            must not: the threads of one would hold the cores while the other is timed.

    Raises:
        ModelError: ONNX Runtime refuses the graph, or would run nodes on the CPU that must not.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it logs as an error it raises too
    options.enable_mem_pattern = planned
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
        # Inline weights would meet protobuf's limit of 2 GB, and fill memory well before it.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised_to.name}.data"
        )
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in runtime.entries.items():
        options.add_session_config_entry(key, value)
    if runtime.hosted is not None:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        if runtime.library is not None:
            options.register_custom_ops_library(str(runtime.library))
        first, *others = runtime.providers
        providers = [(first, dict(runtime.options)), *((other, {}) for other in others)]
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises its own, unexported types
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"ONNX Runtime cannot run the graph: {lines[0] if lines else error}"
        ) from error
    on_cpu = [] if runtime.hosted is None else _on_cpu(session, runtime.hosted)
    if on_cpu:
        raise ModelError(
            f"{len(on_cpu)} nodes of the graph would run on the CPU, the first of them {on_cpu[0]}"
        )
    return session


def _on_cpu(session: ort.InferenceSession, allowed: frozenset[str]) -> list[str]:
    """Nodes that ONNX Runtime gave to the CPU provider, but for those `allowed`, by name."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise ModelError(
            f"ONNX Runtime {ort.__version__} does not say where nodes run", hint="use a later one"
        )
    return [
        f"{node.name} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.name not in allowed
    ]


def run_outputs(session: ort.InferenceSession, feed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The floating-point outputs on `feed` by name, the one that accuracy is measured on first.

    Names in `feed` that the session does not take are left out. A cache that is not in it is
    empty, and what goes back into one is no output here.

    Raises:
        VerificationError: an input is missing, or the graph fails on this one.
    """
    wanted = fed(session, feed)
    missing = [i.name for i in session.get_inputs() if i.name not in wanted]
    if missing:
        raise VerificationError(f"the graph wants an input {missing[0]!r} that the data lacks")
    outputs = [o for o in session.get_outputs() if not is_present(o.name)]
    names = [o.name for o in outputs if "float" in o.type or "double" in o.type]
    names = names or [o.name for o in outputs]
    names.sort(key=lambda name: name not in _MEASURED)
    try:
        return dict(zip(names, session.run(names, wanted), strict=True))
    except Exception as error:  # onnxruntime raises its own, unexported types
        lines = str(error).strip().splitlines()
        raise VerificationError(f"the graph fails on a valid input: {lines[0]}") from error


def first_sample(
    session: ort.InferenceSession,
    feed: Mapping[str, Any],
    compiled: ort.InferenceSession | None = None,
) -> dict[str, np.ndarray]:
    """`feed` cut to its first sample, or whole where a graph does not let it be cut."""
    if divisible(session, feed, compiled) is None:
        return dict(feed)
    return {name: value[:1] for name, value in feed.items()}


def divisible(
    session: ort.InferenceSession,
    feed: Mapping[str, Any],
    compiled: ort.InferenceSession | None = None,
) -> int | None:
    """Samples in `feed`, if its first axis is a batch that the graph takes in any size, and what
    was `compiled` from it too: its shapes may have been given for good."""
    given = compiled.get_inputs() if compiled is not None else ()
    if any(i.name in feed and i.shape and isinstance(i.shape[0], int) for i in given):
        return None
    shapes = {i.name: i.shape for i in session.get_inputs()}
    lengths = {np.shape(value)[:1] for name, value in feed.items() if name in shapes}
    if len(lengths) != 1 or lengths == {()}:
        return None
    if any(not shape or isinstance(shape[0], int) for shape in shapes.values()):
        return None
    return int(lengths.pop()[0])
