"""``path/file.py:factory``: a module that the user builds in Python."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qcompile.config import CompileConfig
from qcompile.errors import ModelError
from qcompile.frontend.export import check_finite_weights, export_module
from qcompile.frontend.fake_quant import fixed_scales
from qcompile.frontend.opset import OPSET
from qcompile.frontend.qdq import keep_scales, trained_scales
from qcompile.spill import spill
from qcompile.traced import TracedModel


def load_factory(source: str, config: CompileConfig, work: Path) -> TracedModel:
    """Run ``factory()`` of a Python file and trace what it returns.

    The factory returns ``(module, example_inputs)``; example_inputs is a tensor, a tuple of
    tensors, or a mapping of argument names to tensors. The leading axis of every input is the
    batch and is dynamic; further axes are dynamic where the module allows it.

    Raises:
        ModelError: the file or the function is missing, fails, or returns something else.
    """
    file, _, function = source.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    factory = getattr(_import(path), function, None)
    if not callable(factory):
        raise ModelError(f"{path} has no function {function!r}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ours holds the summary, or JSON
            made = factory()
    except Exception as error:
        raise ModelError(f"{source} failed: {type(error).__name__}: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise ModelError(f"{source} must return (torch.nn.Module, example_inputs)")
    return trace_module(made[0], made[1], f"{path.stem}-{function}", config, work)


def trace_module(
    module: torch.nn.Module, example_inputs: Any, name: str, config: CompileConfig, work: Path
) -> TracedModel:
    """Trace a module with its example inputs; see `load_factory` for their form.

    Raises:
        ModelError: example inputs that are not tensors, NaN weights, a module that does not trace.
    """
    training = module.training
    module.eval()
    example = _named(module, example_inputs)
    check_finite_weights(module)
    odd = [n for n, p in module.named_parameters() if p.dtype != torch.float32]
    if odd:
        raise ModelError(f"parameter {odd[0]} is not float32", hint="call module.float() first")
    with fixed_scales(module):
        outputs = _output_names(module, example)
        graph = export_module(
            module,
            _at_least_two(example),
            {key: _dynamic_axes(tensor) for key, tensor in example.items()},
            outputs,
            opset=OPSET,
        )
        checkpoint = keep_scales(graph) if trained_scales(graph) else None
        _name_axes(graph)
        graph = spill(graph, work, "traced")
    module.train(training)  # the caller's module is left as it was
    feed = {key: tensor.detach().numpy() for key, tensor in example.items()}
    gc.collect()
    return TracedModel(
        ir=graph,
        name=name,
        task=config.task or "other",
        kind="image-classification" if config.task == "image-classification" else "other",
        example=feed,
        checkpoint=checkpoint,
    )


def _dynamic_axes(tensor: torch.Tensor) -> dict[int, Any]:
    """All axes but the channels of floats; torch.export fixes what must be fixed."""
    axes = tensor.dim() - 1 if tensor.is_floating_point() and tensor.dim() > 1 else tensor.dim()
    return dict.fromkeys(range(axes), torch.export.Dim.AUTO)


def _name_axes(model: ir.Model) -> None:
    """Name what torch.export calls s31: ``batch``, where all inputs begin with it, or by the first
    input and axis that has it, ``x_1``."""
    inputs = [(value, list(value.shape or ())) for value in model.graph.inputs]
    names: dict[str, str] = {}
    first = {shape[0] for _, shape in inputs if shape}
    if len(first) == 1 and isinstance(only := first.pop(), ir.SymbolicDim) and only.value:
        names[str(only.value)] = "batch"
    for value, shape in inputs:
        for axis, size in enumerate(shape):
            if isinstance(size, ir.SymbolicDim) and size.value:
                names.setdefault(str(size.value), f"{value.name}_{axis}")
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(names)})\b")
    values = (*model.graph.inputs, *(v for n in model.graph.all_nodes() for v in n.outputs))
    for value in values:
        # A size may be computed, like s31 + 2.
        value.shape = value.shape and ir.Shape(
            symbol.sub(lambda found: names[found[0]], str(size.value))
            if isinstance(size, ir.SymbolicDim) and size.value
            else size
            for size in value.shape
        )


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"qcompile_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    # As `python file.py` would: the file's own folder is importable, dataclasses find their module.
    sys.modules[spec.name] = loaded
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(loaded)
    except Exception as error:
        raise ModelError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return loaded


def _named(module: torch.nn.Module, example: Any) -> dict[str, torch.Tensor]:
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        named = dict(example)
    elif isinstance(example, tuple | list):
        parameters = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        if len(parameters) < len(example):
            raise ModelError(
                f"{type(module).__name__}.forward takes {len(parameters)} inputs, "
                f"the example gives {len(example)}",
                hint="give the example as a dict of names",
            )
        named = dict(zip(parameters, example, strict=False))
    else:
        named = {}
    if not named or not all(isinstance(t, torch.Tensor) for t in named.values()):
        raise ModelError("example_inputs must be a tensor, a tuple of tensors or a dict of tensors")
    if any(t.dim() == 0 or t.shape[0] == 0 for t in named.values()):
        raise ModelError("every example input needs a leading batch axis of at least one")
    return named


def _at_least_two(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch.export takes a size of one for a constant, so a batch of one is doubled."""
    if any(t.shape[0] != 1 for t in example.values()):
        return example
    return {name: torch.cat([t, t]) for name, t in example.items()}


def _output_names(module: torch.nn.Module, example: dict[str, torch.Tensor]) -> list[str]:
    try:
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            outputs = module(**example)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} fails on its example inputs: {type(error).__name__}: {error}"
        ) from error
    if isinstance(outputs, torch.Tensor):
        return ["output"]
    if isinstance(outputs, Mapping):
        return list(outputs)
    return [f"output_{i}" for i in range(len(outputs))]
