"""What the tests of the CUDA operators on a GPU share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.targets.cuda_graphs import Arrays, library

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
    for name, array in arrays.items():
        binding.bind_ortvalue_input(f"in_{name}", ort.OrtValue.ortvalue_from_numpy(array, "cuda"))
    poisoned = {}
    for output in session.get_outputs():
        kind = {"tensor(int8)": np.int8, "tensor(float16)": np.float16}.get(output.type, np.float32)
        fill = -99 if kind is np.int8 else np.nan
        array = np.full(shapes[output.name.removeprefix("out_")], fill, kind)
        poisoned[output.name] = ort.OrtValue.ortvalue_from_numpy(array, "cuda")
        binding.bind_ortvalue_output(output.name, poisoned[output.name])
    session.run_with_iobinding(binding)
    return {name.removeprefix("out_"): value.numpy() for name, value in poisoned.items()}


def gemm_arrays(m: int, n: int, k: int, fill: int | None = None) -> dict[str, np.ndarray]:
    x = RNG.integers(-128, 128, (m, k)).astype(np.int8)
    weight = RNG.integers(-128, 128, (n, k)).astype(np.int8)
    if fill is not None:
        x[:], weight[:] = fill, -128
    return {
        "x": x,
        "x_scale": (RNG.random((m, 1)) + 0.5).astype(np.float32),
        "weight": weight,
        "weight_scale": ((RNG.random(n) + 0.5) / (40 * k)).astype(np.float32),
        "bias": RNG.normal(size=n).astype(np.float32),
    }
