"""qcompile: quantising compiler from PyTorch, Transformers and ONNX to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.config import CompileConfig, Recipe
from qcompile.errors import (
    CalibrationError,
    ConfigError,
    ModelError,
    OutputError,
    QcompileError,
    StandInWarning,
    VerificationError,
)

if TYPE_CHECKING:
    import onnxruntime

    from qcompile.artifact import Artifact
    from qcompile.comparing import Row
    from qcompile.frontend import Source
    from qcompile.shared import Calibration

__all__ = [
    "Artifact",
    "CalibrationError",
    "CompileConfig",
    "ConfigError",
    "ModelError",
    "OutputError",
    "QcompileError",
    "Recipe",
    "StandInWarning",
    "VerificationError",
    "compare",
    "compile",
    "load",
]


def compile(
    model: Source,
    *,
    target: str = "ort-cpu",
    scheme: str | None = None,
    calibration: Calibration = None,
    config: CompileConfig | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Compile a model into a folder.

    Args:
        model: a Hugging Face folder or hub id, an ``.onnx`` file, ``path/file.py:factory``, or a
            pair (torch.nn.Module, example inputs).
        target: ``name`` or ``name:variant``; see ``qcompile targets``.
        scheme: see ``qcompile schemes``; None: w8a8, or ``checkpoint`` where the model is quantised
            already.
        calibration: feeds (dicts of arrays by input name), texts, or a path to text or .npz. None
            generates data, and says in the report what that costs.
        config: all other options.
        output: the artifact's folder; default ``MODEL-target-scheme`` in the current one.
        overwrite: replace an artifact that is there.

    Raises:
        QcompileError: what cannot be done, in one sentence; nothing is left at `output` then.
    """
    # Imported here: `import qcompile` and `qcompile --help` need none of what compiling needs.
    from qcompile.checkpoints.scheme import choose_scheme
    from qcompile.pipeline import compile_model

    chosen = choose_scheme(model, scheme)
    folder = Path(output) if output is not None else default_output(model, target, chosen.name)
    return compile_model(
        model,
        target=target,
        scheme=chosen,
        calibration=calibration,
        config=config or CompileConfig(),
        output=folder,
        overwrite=overwrite,
    )


def compare(
    model: Source,
    schemes: Sequence[str],
    *,
    target: str = "ort-cpu",
    calibration: Calibration = None,
    config: CompileConfig | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> list[Row]:
    """Compile a model by several schemes from one trace and one calibration.

    Each scheme has a whole artifact in a folder of its own below `output`, a colon in its name
    written as a dash. Arguments are those of `compile`.

    Raises:
        QcompileError: what cannot be done for any scheme; one that fails alone is a row that says
            why.
    """
    from qcompile.comparing import compare_schemes

    return compare_schemes(
        model,
        schemes,
        target=target,
        calibration=calibration,
        config=config or CompileConfig(),
        output=Path(output) if output is not None else default_output(model, target, "compare"),
        overwrite=overwrite,
    )


def load(
    folder: str | Path,
    *,
    trust_library: bool = False,
    provider_options: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open the artifact in `folder` as an ``onnxruntime.InferenceSession``, default options.

    Args:
        folder: the artifact.
        trust_library: whether a library of operators that it carries may be loaded, where this
            package's own does not fit. A library is code.
        provider_options: of ONNX Runtime's execution provider, like ``enable_cuda_graph``.

    Raises:
        ModelError: not an artifact, or a graph that ONNX Runtime refuses.

    Warns:
        StandInWarning: the kernels that it was made for cannot run here.
    """
    from qcompile.artifact import load as load_artifact

    return load_artifact(folder, trust_library=trust_library, provider_options=provider_options)


def default_output(model: Source, target: str, scheme: str) -> Path:
    """``MODEL-target-scheme`` in the current folder."""
    from qcompile.frontend import source_name

    return Path(f"{source_name(model)}-{target.replace(':', '-')}-{scheme.replace(':', '-')}")


def __getattr__(name: str) -> Any:
    if name == "Artifact":
        from qcompile.artifact import Artifact

        return Artifact
    raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
