"""What the tests of the CUDA operators on a GPU share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.targets.cuda.schema import Codes

from tests.targets.cuda_graphs import E4M3, E4M3_TYPE, Arrays, is_e4m3, library

PROVIDER = "CUDAExecutionProvider"
RNG = np.random.default_rng(7)

needs_gpu = pytest.mark.skipif(
    PROVIDER not in ort.get_available_providers(),
    reason="ONNX Runtime has no CUDA provider here",
)


def open_session(model: ir.Model, **options: str) -> ort.InferenceSession:
    """On the GPU alone: a node on the CPU is an error."""
    settings = ort.SessionOptions()
    settings.register_custom_ops_library(str(library()))
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=[(PROVIDER, options)]
    )


def on_gpu(
    session: ort.InferenceSession, arrays: Arrays, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Outputs by the operator's names, written into memory that was poisoned before."""
    binding = session.io_binding()
    kept = {}
    for name, array in arrays.items():
        kept[name], *place = _placed(array)
        binding.bind_input(f"in_{name}", "cuda", 0, *place)
    poisoned, kinds = {}, {}
    for output in session.get_outputs():
        kind = np.dtype(
            E4M3
            if is_e4m3(output)
            else {"tensor(int8)": np.int8, "tensor(float16)": np.float16}.get(
                output.type, np.float32
            )
        )
        fill = -99 if kind == np.int8 else np.nan
        array = np.full(shapes[output.name.removeprefix("out_")], fill, kind)
        poisoned[output.name], *place = _placed(array)
        binding.bind_output(output.name, "cuda", 0, *place)
        kinds[output.name] = kind
    session.run_with_iobinding(binding)
    return {
        name.removeprefix("out_"): value.numpy().view(kinds[name])
        for name, value in poisoned.items()
    }


def _placed(array: np.ndarray) -> tuple[ort.OrtValue, Any, tuple[int, ...], int]:
    """An array in the GPU's memory, and what binding it takes: type, shape, address."""
    e4m3 = array.dtype == E4M3
    value = ort.OrtValue.ortvalue_from_numpy(array.view(np.uint8) if e4m3 else array, "cuda")
    return value, E4M3_TYPE if e4m3 else array.dtype.type, array.shape, value.data_ptr()


def gemm_arrays(
    m: int, n: int, k: int, fill: int | None = None, codes: Codes = "int8"
) -> dict[str, np.ndarray]:
    x, weight = (RNG.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (n, k)))
    lowest = -128
    if codes != "int8":
        # Their bytes, but for the two that are NaN.
        x, weight = (np.where(each & 127 == 127, each - 1, each).view(E4M3) for each in (x, weight))
        lowest = -448
    if fill is not None:
        x[:], weight[:] = fill, lowest
    return {
        "x": x,
        "x_scale": (RNG.random((m, 1)) + 0.5).astype(np.float32),
        "weight": weight,
        "weight_scale": ((RNG.random(n) + 0.5) / (40 * k)).astype(np.float32),
        "bias": RNG.normal(size=n).astype(np.float32),
    }
