"""One opset for every graph: 23, where attention, rotary embedding and RMS norm are ops."""

from __future__ import annotations

from typing import Final

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, NameFixPass
from onnxscript.version_converter import ConvertVersionPass

from qcompile.errors import ModelError

OPSET: Final = 23
OLDEST: Final = 13
_IR_VERSION: Final = 10
# onnxscript converts in place and keeps metadata, from here on; ONNX's own converter goes by a
# serialised model, from any version.
_IN_PLACE_FROM: Final = 18
# ONNX Runtime put these into ONNX's own domain, where ONNX's converter does not know them.
_MISPLACED: Final = frozenset({"SimplifiedLayerNormalization"})
_SMALL_BYTES: Final = 4096


def to_current_opset(model: ir.Model) -> None:
    """Inline functions, make constants initializers, and convert `model` in place to OPSET.

    Weights are never serialised: the part of the conversion that needs a serialised model gets
    one in which they are inputs.

    Raises:
        ModelError: the opset is older than OLDEST, newer than OPSET, or cannot be converted.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        raise ModelError("the model declares no ONNX opset")
    if version < OLDEST:
        raise ModelError(
            f"the model uses opset {version}, and qcompile reads {OLDEST} or later",
            hint=f"export it again with opset_version={OLDEST} or later",
        )
    if version > OPSET:
        raise ModelError(
            f"the model uses opset {version}, and qcompile reads up to {OPSET}",
            hint=f"export it again with opset_version={OPSET} or earlier",
        )
    if version < 21 and any(n.op_type == "GroupNormalization" for n in model.graph.all_nodes()):
        # Its scale and bias changed meaning in 21, and no converter rewrites them reliably.
        raise ModelError(
            f"the model uses GroupNormalization of opset {version}",
            hint="export it again with opset_version=21 or later",
        )
    InlinePass()(model)
    _lift_constants(model)
    if version < _IN_PLACE_FROM:
        _move_misplaced(model, "", "com.microsoft")
        _convert_skeleton(model, _IN_PLACE_FROM)
        _move_misplaced(model, "com.microsoft", "")
    ConvertVersionPass(target_version=OPSET)(model)
    _lift_constants(model)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    NameFixPass()(model)


def _lift_constants(model: ir.Model) -> None:
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _move_misplaced(model: ir.Model, source: str, target: str) -> None:
    for node in model.graph.all_nodes():
        if node.op_type in _MISPLACED and node.domain == source:
            node.domain = target
            model.opset_imports.setdefault(target, 1)


def _convert_skeleton(model: ir.Model, version: int) -> None:
    """Convert by ONNX's own converter, large initializers left out of what it is given."""
    graph = model.graph
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    inputs = list(graph.inputs)
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {name} has no data")
        # The converter looks initializers up among the inputs, as old versions of ONNX had it.
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        if not value.is_graph_input():
            graph.inputs.append(value)
        if tensor.nbytes > _SMALL_BYTES or isinstance(tensor, ir.ExternalTensor):
            del graph.initializers[name]
            value.const_value = None
    try:
        converted = ir.from_proto(
            onnx.version_converter.convert_version(ir.to_proto(model), version)
        )
    except Exception as error:  # the converter raises RuntimeError and plain std::exception
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"the model cannot be converted to opset {version}: {lines[0] if lines else error}",
            hint=f"export it again with opset_version={version} or later",
        ) from error
    new = converted.graph
    kept = {str(value.name) for value in inputs}
    for value in list(new.inputs):
        if value.name in tensors:
            value.const_value = tensors[value.name]
            new.register_initializer(value)
    new.inputs[:] = [value for value in new.inputs if value.name in kept]
    new.name = graph.name
    new.metadata_props.update(graph.metadata_props)
    model.graph = new
