"""ONNX files, from anyone's exporter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from qcompile.errors import ModelError
from qcompile.frontend.huggingface import find_assets
from qcompile.frontend.opset import to_current_opset
from qcompile.frontend.qdq import keep_scales, trained_scales
from qcompile.frontend.validate import check_finite
from qcompile.passes.symbolic_shapes import SymbolicShapes
from qcompile.traced import Kind, TracedModel

_QUANTISED: Final = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QGemm",
        "QAttention",
        "MatMulNBits",
        "QLinearAdd",
        "QLinearMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "QuantizeWithOrder",
        "QOrderedMatMul",
    ]
)
_KINDS: Final[dict[str, Kind]] = {
    "text-generation": "text-generation",
    "text-classification": "text-classification",
    "token-classification": "text-classification",
    "fill-mask": "text-classification",
    "image-classification": "image-classification",
    "feature-extraction": "feature-extraction",
    "sentence-similarity": "feature-extraction",
}


def load_onnx(path: Path, *, task: str | None = None) -> TracedModel:
    """Load, check and convert an ONNX file to opset 23.

    Args:
        path: the ``.onnx`` file; external data lies beside it and is memory-mapped.
        task: optimum's task name; without it, it is inferred where the folder holds a
            config.json and a tokenizer, is ``image-classification`` where ``pixel_values`` give
            ``logits`` [batch, classes], and is ``other`` elsewhere.

    Raises:
        ModelError: a missing, corrupt, unsafe, quantised or otherwise unsupported model.
    """
    model = _read(path)
    _check_external_data(model, path)
    _check_supported(model, path)
    check_finite(model)
    to_current_opset(model)
    checkpoint = keep_scales(model) if trained_scales(model) else None
    RemoveUnusedNodesPass()(model)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    SymbolicShapes()(model)
    config, tokenizer = _beside(path.parent)
    if task is None:
        task = _infer_task(model, config) if tokenizer is not None else _task_of_images(model)
    return TracedModel(
        ir=model,
        name=path.stem,
        task=task,
        kind=_KINDS.get(task, "other"),
        tokenizer=tokenizer,
        assets=find_assets(path.parent) if tokenizer is not None else (),
        max_length=_positive(config, "max_position_embeddings", "n_positions", "n_ctx"),
        bos_token_id=_token_id(config),
        checkpoint=checkpoint,
    )


def _token_id(config: dict[str, Any]) -> int | None:
    value = config.get("bos_token_id")
    return value if isinstance(value, int) and value >= 0 else None


def _read(path: Path) -> ir.Model:
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not an .onnx file")
    if not path.exists():
        raise ModelError(f"model {path} does not exist")
    try:
        model = ir.load(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf and onnx_ir raise many unrelated types
        raise ModelError(
            f"{path} is not a valid ONNX file", hint="corrupt or cut short?"
        ) from error
    if not len(model.graph) or not model.graph.outputs:
        # An empty file is a valid protobuf message.
        raise ModelError(f"{path} is not a valid ONNX file: it has no graph")
    return model


def _check_external_data(model: ir.Model, path: Path) -> None:
    """External data must lie below the model's own folder and be as long as it is said to be."""
    folder = path.parent.resolve()
    for tensor in _external_tensors(model):
        location = Path(str(tensor.location))
        if location.is_absolute():
            raise ModelError(f"the external data of {tensor.name} has an absolute path: {location}")
        data = (folder / location).resolve()
        if not data.is_relative_to(folder):
            raise ModelError(
                f"the external data of {tensor.name} lies outside the model's folder: {location}"
            )
        if not data.is_file():
            raise ModelError(f"external data file {location} of {path.name} does not exist")
        # The shape decides what is read; a declared length that differs would be read past.
        end = (tensor.offset or 0) + tensor.nbytes
        if (tensor.offset or 0) < 0 or end > data.stat().st_size:
            raise ModelError(
                f"external data file {location} ends before the data of {tensor.name}",
                hint="cut short? copy it again",
            )
        if tensor.length not in (None, tensor.nbytes):
            raise ModelError(
                f"the external data of {tensor.name} is declared with {tensor.length} bytes, and "
                f"its shape takes {tensor.nbytes}"
            )


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    found: list[ir.TensorProtocol | None] = []
    for graph in model.graphs():
        found += [value.const_value for value in graph.initializers.values()]
    for node in _all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                found.append(attribute.as_tensor())
            elif attribute.type == ir.AttributeType.TENSORS:
                found += attribute.as_tensors()
    return [tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)]


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    nodes = list(model.graph.all_nodes())
    for function in model.functions.values():
        nodes += function.all_nodes()
    return nodes


def _check_supported(model: ir.Model, path: Path) -> None:
    nodes = [] if trained_scales(model) else _all_nodes(model)
    quantised = next((n.op_type for n in nodes if n.op_type in _QUANTISED), None)
    if quantised is not None:
        raise ModelError(
            f"{path.name} is already quantised: it contains {quantised}",
            hint="give the float model",
        )
    initializers = model.graph.initializers
    # Files of the oldest style list their initializers as inputs too.
    model.graph.inputs[:] = [v for v in model.graph.inputs if v.name not in initializers]
    if not model.graph.inputs:
        raise ModelError(f"{path.name} has no graph inputs: there is nothing to calibrate on")
    for value in initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {value.name} of {path.name} has no data")
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and tensor.size > 1:
            raise ModelError(
                f"{path.name} holds {tensor.dtype.name.lower()} weights ({value.name})",
                hint="export it in float32",
            )
    if not any(
        v.const_value is not None and v.const_value.dtype == ir.DataType.FLOAT
        for v in initializers.values()
    ) and not _float_constants(model):
        raise ModelError(f"{path.name} has no float32 weights: there is nothing to quantise")


def _float_constants(model: ir.Model) -> bool:
    for node in _all_nodes(model):
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is None or attribute.type != ir.AttributeType.TENSOR:
            continue
        if attribute.as_tensor().dtype == ir.DataType.FLOAT:
            return True
    return False


def _beside(folder: Path) -> tuple[dict[str, Any], Any]:
    """config.json and the tokenizer of the folder, where it has both; no code of its own runs."""
    file = folder / "config.json"
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
    )
    if not file.is_file() or not any((folder / name).is_file() for name in names):
        return {}, None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not valid: an object is expected")
    from transformers import AutoTokenizer  # slow to import, and few ONNX files need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the readers of tokenizer files raise whatever they like
        lines = str(error).strip().splitlines()
        detail = lines[0] if lines else type(error).__name__
        raise ModelError(f"the tokenizer beside the model cannot be loaded: {detail}") from error
    return config, tokenizer


def _infer_task(model: ir.Model, config: dict[str, Any]) -> str:
    logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
    shape = logits.shape if logits is not None else None
    names = config.get("architectures")
    causal = any("CausalLM" in str(n) or "LMHead" in str(n) for n in names or ())
    if shape is not None and len(shape) == 3 and causal and shape[2] == config.get("vocab_size"):
        return "text-generation"
    if shape is not None and len(shape) == 2:
        return "text-classification"
    return "feature-extraction"


def _task_of_images(model: ir.Model) -> str:
    logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
    of_images = [v.name for v in model.graph.inputs] == ["pixel_values"]
    if of_images and logits is not None and logits.shape is not None and len(logits.shape) == 2:
        return "image-classification"
    return "other"


def _positive(config: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
