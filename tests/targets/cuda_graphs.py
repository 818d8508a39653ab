"""What the tests of the CUDA operators share: the library, graphs of one node, references."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.targets.cuda.schema import BY_NAME, DOMAIN, Operator, Parameter

Arrays = Mapping[str, np.ndarray]

ONNX_TYPES = {"float16": 10, "bfloat16": 16, "float32": 1}


@functools.cache
def library() -> Path:
    """The library: the one that QCOMPILE_CUDA_LIBRARY names, or built here; else the test skips."""
    given = os.environ.get("QCOMPILE_CUDA_LIBRARY")
    if given:
        return Path(given)
    from qcompile.targets.cuda.build import build, find_compiler, find_headers

    from qcompile.errors import ConfigError

    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    try:
        find_headers()
        find_compiler()
    except ConfigError as error:
        pytest.skip(str(error))
    return build()


def node_model(
    name: str,
    arrays: Arrays,
    *,
    dtype: str = "float16",
    outputs: Sequence[str] | None = None,
    **attributes: int | float | str,
) -> ir.Model:
    """A graph of one custom node: the inputs in `arrays` and the outputs named, or all of them.

    Tensors of type ``T`` have the type `dtype` inside; outside, inputs are float16 and results
    float32 where it is bfloat16, which numpy has not.
    """
    operator = BY_NAME[name]
    wanted = [item.name for item in operator.outputs] if outputs is None else list(outputs)
    header = [_value(item, arrays[item.name], dtype) for item in _given(operator, arrays)]
    results = [
        f"{_outside(item, dtype, operator)} out_{item.name}"
        for item in operator.outputs
        if item.name in wanted
    ]
    lines = []
    places = []
    for item in operator.inputs:
        if item.name not in arrays:
            places.append('""')
        elif item.type == "T" and dtype == "bfloat16":
            lines.append(f"brain_{item.name} = Cast<to=16>(in_{item.name})")
            places.append(f"brain_{item.name}")
        else:
            places.append(f"in_{item.name}")
    names = []
    after = []
    for item in operator.outputs:
        if item.name not in wanted:
            names.append('""')
        elif item.type == "T" and dtype == "bfloat16":
            names.append(f"brain_out_{item.name}")
            after.append(f"out_{item.name} = Cast<to=1>(brain_out_{item.name})")
        else:
            names.append(f"out_{item.name}")
    while places[-1] == '""':
        places.pop()
    while names[-1] == '""':
        names.pop()
    if operator.result_type:
        attributes["dtype"] = ONNX_TYPES[dtype]
    options = ", ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value!r}"
        for key, value in attributes.items()
    )
    call = f"{', '.join(names)} = {DOMAIN}.{name}<{options}>({', '.join(places)})"
    body = "\n".join([*lines, call.replace("<>", ""), *after])
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
        one ({", ".join(header)}) => ({", ".join(results)}) {{
        {body}
        }}"""
    )


def run(model: ir.Model, arrays: Arrays) -> dict[str, np.ndarray]:
    """Outputs on the CPU, by the operator's names."""
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name.removeprefix("out_") for value in session.get_outputs()]
    results = session.run(None, {f"in_{name}": array for name, array in arrays.items()})
    return dict(zip(names, results, strict=True))


def token_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows, as the contract says."""
    value = x.astype(np.float32)
    largest = np.abs(value).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest < 2.0**-100, np.float32(0), np.float32(127) / largest)
    return np.rint(value * inverse).astype(np.int8), largest / np.float32(127)


def static_codes(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes under one given scale."""
    inverse = np.float32(1) / scale.reshape(()).astype(np.float32)
    return np.clip(np.rint(x.astype(np.float32) * inverse), -128, 127).astype(np.int8)


def exact_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x · weightᵀ as integers, in float64, which holds every sum there can be."""
    return x.astype(np.float64) @ weight.astype(np.float64).T


def _given(operator: Operator, arrays: Arrays) -> list[Parameter]:
    return [item for item in operator.inputs if item.name in arrays]


def _value(item: Parameter, array: np.ndarray, dtype: str) -> str:
    element = {"T": "float16", "int8": "int8", "float32": "float"}[item.type]
    return f"{element}[{', '.join(f'{item.name}_{i}' for i in range(array.ndim))}] in_{item.name}"


def _outside(item: Parameter, dtype: str, operator: Operator) -> str:
    if item.type == "T":
        return "float16" if dtype == "float16" else "float"
    return {"int8": "int8", "float32": "float"}[item.type]
