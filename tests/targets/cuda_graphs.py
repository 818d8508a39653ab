"""What the tests of the CUDA operators share: the library, graphs of one node, references."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.targets.cuda.schema import BY_NAME, DOMAIN, LARGEST, Codes, Operator, Parameter

Arrays = Mapping[str, np.ndarray]

ONNX_TYPES = {"float16": 10, "bfloat16": 16, "float32": 1}
CODES: tuple[Codes, ...] = get_args(Codes)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_TYPE = 17
"""ONNX's number of it; ONNX Runtime takes and gives its bytes."""


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
    feeds = {f"in_{name}": _ort_value(array) for name, array in arrays.items()}
    results = {}
    for value, made in zip(
        session.get_outputs(), session.run_with_ort_values(None, feeds), strict=True
    ):
        array = made.numpy()
        results[value.name.removeprefix("out_")] = array.view(E4M3) if is_e4m3(value) else array
    return results


def is_e4m3(value: ort.NodeArg) -> bool:
    return "float8" in value.type.lower()


def _ort_value(array: np.ndarray) -> ort.OrtValue:
    if array.dtype != E4M3:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), E4M3_TYPE)


def token_codes(x: np.ndarray, codes: Codes = "int8") -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows, as the contract says."""
    value, levels = x.astype(np.float32), np.float32(LARGEST[codes])
    largest = np.abs(value).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest < 2.0**-100, np.float32(0), levels / largest)
    return _rounded(value * inverse, codes), largest / levels


def static_codes(x: np.ndarray, scale: np.ndarray, codes: Codes = "int8") -> np.ndarray:
    """Codes under one given scale."""
    inverse = np.float32(1) / scale.reshape(()).astype(np.float32)
    return _rounded(x.astype(np.float32) * inverse, codes)


def _rounded(value: np.ndarray, codes: Codes) -> np.ndarray:
    rounded: np.ndarray = np.clip(value, -448, 448).astype(np.float32).astype(E4M3)
    if codes == "int8":
        rounded = np.clip(np.rint(value), -128, 127).astype(np.int8)
    return rounded


def places(codes: np.ndarray) -> np.ndarray:
    """Codes as numbers that are one apart where the codes are neighbours."""
    if codes.dtype == np.int8:
        return codes.astype(int)
    bytes_ = codes.view(np.uint8).astype(int)
    return np.where(bytes_ >= 128, 128 - bytes_, bytes_)


def exact_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x · weightᵀ of codes, in float64, which holds every sum of integers there can be."""
    return x.astype(np.float64) @ weight.astype(np.float64).T


def _given(operator: Operator, arrays: Arrays) -> list[Parameter]:
    return [item for item in operator.inputs if item.name in arrays]


def _value(item: Parameter, array: np.ndarray, dtype: str) -> str:
    element = {"T": "float16", "float32": "float"}.get(item.type, item.type)
    return f"{element}[{', '.join(f'{item.name}_{i}' for i in range(array.ndim))}] in_{item.name}"


def _outside(item: Parameter, dtype: str, operator: Operator) -> str:
    if item.type == "T":
        return "float16" if dtype == "float16" else "float"
    return "float" if item.type == "float32" else item.type
