"""Which kernels really run: the optimised graph, read back and compared with the plan."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from qcompile.linears import find_linears
from qcompile.names import apart
from qcompile.precision import PrecisionPlan
from qcompile.session import HERE, Runtime, open_session
from qcompile.targets.base import Target


@dataclasses.dataclass(frozen=True)
class KernelMismatch:
    """A planned INT8 op that something else runs."""

    name: str
    expected: str
    found: str


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The optimised graph in short: op type with domain -> count, and op name -> op type."""

    counts: dict[str, int]
    by_name: dict[str, str]

    def mismatches(self, expected: dict[str, tuple[str, ...]]) -> list[KernelMismatch]:
        """Planned ops (name -> op types) that run as none of those `expected`."""
        return [
            KernelMismatch(name, kernels[0], self.by_name.get(name, "nothing of that name"))
            for name, kernels in expected.items()
            if self.by_name.get(name) not in kernels
        ]


def expected_kernels(plan: PrecisionPlan, target: Target) -> dict[str, tuple[str, ...]]:
    """Planned INT8 op -> the op types, with domain, one of which must run it."""
    return {op.name: target.kernels_for(op, plan) for op in plan.quantized}


def read_back(path: Path, scratch: Path | None = None, runtime: Runtime | None = HERE) -> Kernels:
    """Let ONNX Runtime optimise the graph `path` under default options, and read the result.

    Args:
        path: the graph.
        scratch: folder for the optimised graph; default the system's own for temporary files.
        runtime: of the session; None: the graph is read as it is, where its kernels cannot run.

    Raises:
        ModelError: ONNX Runtime refuses the graph.
    """
    if runtime is None:
        return _kernels(ir.load(path))
    with tempfile.TemporaryDirectory(prefix="qcompile-", dir=scratch) as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, runtime, optimised_to=optimised)
        return _kernels(ir.load(optimised))


def _kernels(model: ir.Model) -> Kernels:
    kinds = [(str(node.name), _kind(node)) for node in model.graph.all_nodes()]
    counts = dict(Counter(kind for _, kind in kinds))
    # A float Linear that kept its name is still worth naming in `inspect`.
    kinds += [(linear.name, "MatMul") for linear in find_linears(model.graph) if linear.name]
    named = {part: kind for name, kind in kinds for part in apart(name)}
    return Kernels(counts=counts, by_name=named)


def _kind(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
