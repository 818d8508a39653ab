"""The CUDA operators on a GPU. Every test here skips where ONNX Runtime has no CUDA provider."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.targets.cuda.reference import with_reference
from qcompile.targets.cuda.schema import ACTIVATIONS

from tests.targets.cuda_graphs import (
    Arrays,
    exact_product,
    library,
    node_model,
    run,
    static_codes,
    token_codes,
)

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="ONNX Runtime has no CUDA provider here",
)

PROVIDER = "CUDAExecutionProvider"
ROWS = (1, 3, 17, 127, 2049)
# Multiples of 16 and 32 that are no multiples of a tile, and one that is.
WEIGHTS = ((16, 32), (80, 160), (272, 416), (1040, 4128), (4096, 4096))
RNG = np.random.default_rng(7)


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


# GEMM


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("fill", [None, -128, 127, 0])
def test_products_are_exact(shape: tuple[int, int], fill: int | None) -> None:
    """In float32 with scales of one the result is the integer itself, rounded to float32 once."""
    n, k = shape
    ones = {"x_scale": np.ones(1, np.float32), "weight_scale": np.ones(n, np.float32)}
    session = open_session(node_model("MatMulInt8", gemm_arrays(1, n, k) | ones, dtype="float32"))
    for m in ROWS:
        arrays = gemm_arrays(m, n, k, fill) | ones
        exact = exact_product(arrays["x"], arrays["weight"])
        made = on_gpu(session, arrays | {"bias": np.zeros(n, np.float32)}, {"y": (m, n)})
        np.testing.assert_array_equal(made["y"], exact.astype(np.float32))


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("fill", [None, -128, 127, 0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_are_exact_in_half_precision(
    shape: tuple[int, int], fill: int | None, dtype: str
) -> None:
    """Every row the same and the bias minus the product: anything but zero is a wrong sum."""
    n, k = shape
    ones = {"x_scale": np.ones(1, np.float32), "weight_scale": np.ones(n, np.float32)}
    session = open_session(node_model("MatMulInt8", gemm_arrays(1, n, k) | ones, dtype=dtype))
    for m in ROWS:
        arrays = gemm_arrays(m, n, k, fill) | ones
        arrays["x"] = np.ascontiguousarray(np.broadcast_to(arrays["x"][:1], (m, k)))
        exact = exact_product(arrays["x"][:1], arrays["weight"])[0]
        made = on_gpu(session, arrays | {"bias": -exact.astype(np.float32)}, {"y": (m, n)})
        np.testing.assert_array_equal(made["y"], 0)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_epilogue_rounds_once(
    shape: tuple[int, int], dtype: str, biased: bool, per_token: bool
) -> None:
    n, k = shape

    def arrays_for(m: int, fill: int | None = None) -> dict[str, np.ndarray]:
        arrays = gemm_arrays(m, n, k, fill)
        if not per_token:
            arrays["x_scale"] = arrays["x_scale"][0]
        if not biased:
            del arrays["bias"]
        return arrays

    session = open_session(node_model("MatMulInt8", arrays_for(1), dtype=dtype))
    bits = 11 if dtype == "float16" else 8
    for m in ROWS:
        for fill in (None, -128):
            arrays = arrays_for(m, fill)
            exact = exact_product(arrays["x"], arrays["weight"])
            expected = exact * arrays["x_scale"] * arrays["weight_scale"]
            expected = expected + arrays.get("bias", np.float64(0))
            made = on_gpu(session, arrays, {"y": (m, n)})["y"].astype(np.float64)
            # Half a unit in the last place, and what float32 arithmetic before it adds.
            slack = np.abs(exact * arrays["x_scale"] * arrays["weight_scale"]).max() * 2.0**-22
            bound = np.abs(expected) * 2.0**-bits * 1.001 + slack + 2.0**-24
            assert (np.abs(made - expected) <= bound).all()


def test_leading_dimensions_and_no_rows() -> None:
    arrays = gemm_arrays(6, 48, 64)
    shaped = arrays | {
        "x": arrays["x"].reshape(2, 3, 64),
        "x_scale": arrays["x_scale"].reshape(2, 3, 1),
    }
    flat = on_gpu(open_session(node_model("MatMulInt8", arrays)), arrays, {"y": (6, 48)})
    session = open_session(node_model("MatMulInt8", shaped))
    made = on_gpu(session, shaped, {"y": (2, 3, 48)})
    np.testing.assert_array_equal(made["y"].reshape(6, 48), flat["y"])
    empty = shaped | {
        "x": np.zeros((2, 0, 64), np.int8),
        "x_scale": np.zeros((2, 0, 1), np.float32),
    }
    feeds = {f"in_{name}": array for name, array in empty.items()}
    assert session.run(None, feeds)[0].shape == (2, 0, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((48, 32), np.int8)}, r"weight has the shape \[48, 32\]"),
        ({"weight_scale": np.zeros(16, np.float32)}, "weight_scale has the shape"),
        ({"x_scale": np.zeros((3, 1), np.float32)}, "x_scale has the shape"),
        ({"bias": np.zeros(47, np.float32)}, "bias has the shape"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, np.ndarray], message: str) -> None:
    arrays = gemm_arrays(6, 48, 64)
    session = open_session(node_model("MatMulInt8", arrays))
    with pytest.raises(Exception, match=message):
        on_gpu(session, arrays | change, {"y": (6, 48)})


@pytest.mark.parametrize(("n", "k", "message"), [(24, 64, "24 output"), (16, 48, "48 input")])
def test_shapes_without_a_kernel_are_named(n: int, k: int, message: str) -> None:
    arrays = gemm_arrays(6, n, k)
    with pytest.raises(Exception, match=message):
        on_gpu(open_session(node_model("MatMulInt8", arrays)), arrays, {"y": (6, n)})


# rows


def rows_like(m: int, columns: int) -> np.ndarray:
    x = (RNG.normal(size=(m, columns)) * np.exp(RNG.normal(size=(m, 1)))).astype(np.float16)
    if m > 4:
        x[1], x[2, 0], x[3] = 0, 65504, np.float16(6e-8)
    return x


COLUMNS = (32, 80, 1040, 4096, 5120, 11008, 32768)


@pytest.mark.parametrize("columns", COLUMNS)
def test_scales_and_codes_are_exact(columns: int) -> None:
    model = node_model("QuantizeInt8", {"x": rows_like(1, columns)})
    session = open_session(model)
    for m in ROWS[:4]:
        x = rows_like(m, columns)
        made = on_gpu(session, {"x": x}, {"codes": x.shape, "scale": (m, 1)})
        codes, scale = token_codes(x)
        np.testing.assert_array_equal(made["scale"], scale)
        np.testing.assert_array_equal(made["codes"], codes)


def test_codes_of_bfloat16() -> None:
    x = rows_like(9, 256)
    brain = (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    x = brain.astype(np.float16)  # exact in both, but for the smallest
    x[3] = 0
    session = open_session(node_model("QuantizeInt8", {"x": x}, dtype="bfloat16"))
    made = on_gpu(session, {"x": x}, {"codes": x.shape, "scale": (9, 1)})
    keep = np.abs(x.astype(np.float32)).max(-1) > 1e-3
    codes, scale = token_codes(x)
    np.testing.assert_array_equal(made["scale"][keep], scale[keep])
    np.testing.assert_array_equal(made["codes"][keep], codes[keep])


@pytest.mark.parametrize("columns", COLUMNS)
def test_static_codes_are_exact(columns: int) -> None:
    x = rows_like(17, columns)
    arrays = {"x": x, "scale": np.array([0.0123], np.float32)}
    session = open_session(node_model("QuantizeInt8", arrays, outputs=["codes"]))
    made = on_gpu(session, arrays, {"codes": x.shape})
    np.testing.assert_array_equal(made["codes"], static_codes(x, arrays["scale"]))


@pytest.mark.parametrize(("value", "seen"), [(np.nan, np.isnan), (np.inf, np.isinf)])
def test_what_is_not_finite_shows_in_the_scale(value: float, seen: np.ufunc) -> None:
    x = rows_like(5, 4096)
    x[2, 1234] = value
    session = open_session(node_model("QuantizeInt8", {"x": x}))
    made = on_gpu(session, {"x": x}, {"codes": x.shape, "scale": (5, 1)})
    np.testing.assert_array_equal(seen(made["scale"][:, 0]), np.arange(5) == 2)


def test_rows_that_are_too_wide_are_refused() -> None:
    x = np.zeros((2, 65536), np.float16)
    with pytest.raises(Exception, match="65536 columns"):
        on_gpu(
            open_session(node_model("QuantizeInt8", {"x": x})),
            {"x": x},
            {"codes": x.shape, "scale": (2, 1)},
        )


def assert_close(made: Arrays, expected: Arrays) -> None:
    """Equal but for the order of sums: a code moves by one where a value lies between two."""
    assert made.keys() == expected.keys()
    difference = np.abs(made["codes"].astype(int) - expected["codes"])
    assert difference.max() <= 1
    assert (difference != 0).mean() < 2e-3
    if "scale" in made:
        np.testing.assert_allclose(made["scale"], expected["scale"], rtol=2e-6)
    if "sum" in made:
        np.testing.assert_array_equal(made["sum"], expected["sum"])


@pytest.mark.parametrize("name", ["LayerNormInt8", "RMSNormInt8"])
@pytest.mark.parametrize("columns", [32, 1040, 4096, 5120, 16384, 32768])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_norm(name: str, columns: int, static: bool, residual: bool) -> None:
    for m in (1, 17, 127):
        arrays = {
            "x": RNG.normal(size=(m, columns)).astype(np.float16) + np.float16(0.5),
            "weight": RNG.normal(size=columns).astype(np.float16),
        }
        if name == "LayerNormInt8":
            arrays["bias"] = RNG.normal(size=columns).astype(np.float16)
        if residual:
            arrays["residual"] = RNG.normal(size=(m, columns)).astype(np.float16)
        if static:
            arrays["scale"] = np.array([0.03], np.float32)
        outputs = ["codes", "sum"] if static else ["codes", "scale", "sum"]
        if not residual:
            outputs.remove("sum")
        model = node_model(name, arrays, outputs=outputs, epsilon=1e-5)
        shapes = {"codes": (m, columns), "scale": (m, 1), "sum": (m, columns)}
        made = on_gpu(open_session(model), arrays, shapes)
        assert_close(made, run(with_reference(model), arrays))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "up", "packed"])
@pytest.mark.parametrize("static", [True, False])
def test_activation(kind: str, gate: str, static: bool) -> None:
    for m, columns in ((1, 32), (17, 1040), (33, 14336)):
        width = 2 * columns if gate == "packed" else columns
        arrays = {"x": RNG.normal(size=(m, width)).astype(np.float16) * np.float16(3)}
        if gate == "up":
            arrays["up"] = RNG.normal(size=(m, columns)).astype(np.float16)
        if static:
            arrays["scale"] = np.array([0.05], np.float32)
        outputs = ["codes"] if static else ["codes", "scale"]
        packed = int(gate == "packed")
        model = node_model("ActivationInt8", arrays, outputs=outputs, kind=kind, packed=packed)
        made = on_gpu(open_session(model), arrays, {"codes": (m, columns), "scale": (m, 1)})
        assert_close(made, run(with_reference(model), arrays))


# sessions


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
