"""torch.nn.Module -> ONNX graph, through torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import onnx_ir as ir
import torch

from qcompile.errors import ModelError
from qcompile.names import module_path, set_module_path

WRAPPED: Final = "inner"
"""The attribute under which a wrapper module holds the user's model."""


def export_module(
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Any],
    output_names: list[str],
    *,
    opset: int,
) -> ir.Model:
    """Trace `module`; its weights stay where they are.

    Args:
        module: in eval mode; called as ``module(**example)``.
        example: one tensor per input, batch of at least two (torch.export specialises size one).
        dynamic_shapes: as torch.export takes them, per input name.
        output_names: names of the flattened outputs, in order.
        opset: ONNX opset to translate to.

    Raises:
        ModelError: torch.export or the translation to ONNX refuses the module.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(example),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dict(dynamic_shapes),
                input_names=list(example),
                output_names=output_names,
                verbose=False,
            )
        except Exception as error:  # the exporter raises dozens of unrelated types
            raise ModelError(
                f"torch.export cannot trace {type(module).__name__}: {_cause(error)}",
                hint="export it to ONNX yourself and give the .onnx file",
            ) from error
    assert program is not None
    _record_paths(program.model)
    return program.model


def check_finite_weights(module: torch.nn.Module) -> None:
    """Refuse a module with NaN or Inf in its parameters, or NaN in its buffers.

    Raises:
        ModelError: naming the first such tensor.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"weight {name} holds NaN or Inf values")
    for name, buffer in module.named_buffers():
        # A mask may hold -inf on purpose; nothing holds NaN on purpose.
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise ModelError(f"buffer {name} holds NaN values")


def _record_paths(model: ir.Model) -> None:
    """Keep the module paths, without the wrapper's prefix, where later passes find them."""
    prefix = f"{WRAPPED}."
    for node in model.graph.all_nodes():
        path = module_path(node)
        if path != node.name:
            set_module_path(node, path.removeprefix(prefix))
        for key in [k for k in node.metadata_props if k.startswith("pkg.torch.onnx")]:
            del node.metadata_props[key]
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about torchvision, training mode of wrappers and shared axis names."""
    loggers = [
        logging.getLogger(n)
        for n in ("torch", "torch.onnx", "torch.export", "torch.fx", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The exporter prints, and torch's own logs go to stderr: what failed comes as one line.
            sink = io.StringIO()
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of the innermost exception: the exporter wraps the real reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
