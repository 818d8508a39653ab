"""Sessions with the CUDA operators on a GPU: threads, memory, captured graphs, carried bodies."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from qcompile.targets.cuda.reference import with_reference

from tests.targets.cuda_gpu import PROVIDER, RNG, gemm_arrays, needs_gpu, on_gpu, open_session
from tests.targets.cuda_graphs import exact_product, library, node_model

pytestmark = needs_gpu


def test_two_sessions_in_two_threads() -> None:
    """Each with its own shapes, both at once, from threads that never touched the GPU before."""
    failures: list[str] = []

    def work(n: int, k: int) -> None:
        session = open_session(node_model("MatMulInt8", gemm_arrays(1, n, k)))
        for step in range(30):
            m = (1, 17, 130, 600)[step % 4]
            arrays = gemm_arrays(m, n, k)
            exact = exact_product(arrays["x"], arrays["weight"])
            expected = exact * arrays["x_scale"] * arrays["weight_scale"] + arrays["bias"]
            made = on_gpu(session, arrays, {"y": (m, n)})["y"]
            if not np.allclose(made, expected, rtol=2e-3, atol=2e-3):
                failures.append(f"{m} rows by [{n}, {k}]")

    threads = [threading.Thread(target=work, args=shape) for shape in ((272, 416), (512, 1024))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def free_memory() -> int:
    cuda = ctypes.CDLL("libcuda.so.1")
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert cuda.cuDevicePrimaryCtxRelease_v2(0) == 0
    return free.value


def mlp(columns: int, inner: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Norm, product, activation, product: every operator that quantises but one."""
    arrays: dict[str, np.ndarray] = {
        "w1": RNG.integers(-127, 128, (inner, columns)).astype(np.int8),
        "w2": RNG.integers(-127, 128, (columns, inner)).astype(np.int8),
        "s1": (RNG.random(inner) / 1000).astype(np.float32),
        "s2": (RNG.random(columns) / 1000).astype(np.float32),
        "g": RNG.normal(size=columns).astype(np.float16),
    }
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "qcompile" : 1]>
        mlp (float16[m, {columns}] x, float16[m, {columns}] r,
             int8[{inner}, {columns}] w1, int8[{columns}, {inner}] w2,
             float[{inner}] s1, float[{columns}] s2, float16[{columns}] g)
          => (float16[m, {columns}] y, float16[m, {columns}] sum) {{
          c, cs, sum = qcompile.RMSNormInt8<epsilon=1e-5>(x, g, r)
          h = qcompile.MatMulInt8<dtype=10>(c, cs, w1, s1)
          d, ds = qcompile.ActivationInt8<kind="silu", packed=0>(h)
          y = qcompile.MatMulInt8<dtype=10>(d, ds, w2, s2)
        }}"""
    )
    return model, arrays


def test_kernels_run_where_bodies_are_carried(tmp_path: Path) -> None:
    """A model with references runs the kernels, not the bodies, where the library is there."""
    model, arrays = mlp(64, 96)
    x = RNG.normal(size=(5, 64)).astype(np.float16)
    feeds = arrays | {"x": x, "r": x}
    carrying = with_reference(model)
    settings = ort.SessionOptions()
    settings.register_custom_ops_library(str(library()))
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(
        ir.to_proto(carrying).SerializeToString(), settings, providers=[PROVIDER]
    )
    made = session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert {node.op_type for node in model.graph} <= ran
    assert ran <= {node.op_type for node in model.graph} | {"MemcpyFromHost", "MemcpyToHost"}
    plain = open_session(model).run(None, feeds)
    for one, other in zip(made, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_does_not_grow() -> None:
    model, arrays = mlp(1024, 4096)
    session = open_session(model)

    def steps(count: int) -> None:
        for step in range(count):
            m = 1 + (step * 37) % 300
            x = np.ones((m, 1024), np.float16)
            session.run(None, arrays | {"x": x, "r": x})

    steps(300)  # every shape once: ONNX Runtime's own arena grows until then
    before = free_memory()
    steps(1000)
    assert free_memory() >= before


def test_graph_capture() -> None:
    """Captured in the first runs, replayed on new contents of the bound inputs."""
    model, arrays = mlp(1024, 4096)
    m = 33
    reference = ort.InferenceSession(
        ir.to_proto(with_reference(model)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    session = open_session(model, enable_cuda_graph="1")
    values = arrays | {name: np.zeros((m, 1024), np.float16) for name in ("x", "r")}
    bound = {name: ort.OrtValue.ortvalue_from_numpy(v, "cuda") for name, v in values.items()}
    out = ort.OrtValue.ortvalue_from_numpy(np.full((m, 1024), np.nan, np.float16), "cuda")
    total = ort.OrtValue.ortvalue_from_numpy(np.full((m, 1024), np.nan, np.float16), "cuda")
    binding = session.io_binding()
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y", out)
    binding.bind_ortvalue_output("sum", total)
    for _ in range(5):
        feeds = arrays | {
            name: RNG.normal(size=(m, 1024)).astype(np.float16) for name in ("x", "r")
        }
        for name in ("x", "r"):
            bound[name].update_inplace(feeds[name])
        out.update_inplace(np.full((m, 1024), np.nan, np.float16))
        session.run_with_iobinding(binding)
        expected = reference.run(None, feeds)
        np.testing.assert_array_equal(total.numpy(), expected[1])
        error = out.numpy().astype(np.float64) - expected[0]
        assert np.linalg.norm(error) < 5e-3 * np.linalg.norm(expected[0].astype(np.float64))
