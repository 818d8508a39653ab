"""The CUDA operators on a GPU: what they compute, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.targets.cuda.reference import with_reference
from qcompile.targets.cuda.schema import ACTIVATIONS, LARGEST, SUFFIX, Codes

from tests.targets.cuda_gpu import RNG, gemm_arrays, needs_gpu, on_gpu, open_session
from tests.targets.cuda_graphs import (
    CODES,
    E4M3,
    Arrays,
    exact_product,
    node_model,
    places,
    run,
    static_codes,
    token_codes,
)

pytestmark = needs_gpu

ROWS = (1, 3, 17, 127, 2049)
# Multiples of 16 and 32 that are no multiples of a tile, and one that is.
WEIGHTS = ((16, 32), (80, 160), (272, 416), (1040, 4128), (4096, 4096))

E4M3_SUM = 2.0**-4 * 33 / 32
"""The most that a sum of e4m3 products may lack, as a part of the sum of their magnitudes. Tensor
cores of sm_90 add 32 products to a sum and cut each of the 33 off below 2⁻¹³ of the largest, and it
goes on in float32 after 512 products at most (emulated so, the errors that were measured come out
to two digits)."""


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


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products_of_small_e4m3_are_exact(shape: tuple[int, int], dtype: str) -> None:
    """Sums of up to 2⁹ in steps of one: tensor cores of any precision hold them."""
    n, k = shape
    ones = {"x_scale": np.ones(1, np.float32), "weight_scale": np.ones(n, np.float32)}

    def arrays_for(m: int) -> dict[str, np.ndarray]:
        arrays = gemm_arrays(m, n, k, codes="float8e4m3fn") | ones
        for name, most in (("x", 2), ("weight", 3)):
            small = RNG.integers(-most, most, arrays[name].shape)
            # So few that no sum is large.
            kept = RNG.random(arrays[name].shape) < min(1.0, (512 / k) ** 0.5)
            arrays[name] = np.where(kept, small, 0).astype(E4M3)
        return arrays | {"bias": np.zeros(n, np.float32)}

    session = open_session(node_model("MatMulFp8", arrays_for(1), dtype=dtype))
    for m in ROWS:
        arrays = arrays_for(m)
        exact = exact_product(arrays["x"], arrays["weight"])
        assert np.abs(exact).max() <= 512
        made = on_gpu(session, arrays, {"y": (m, n)})["y"]
        np.testing.assert_array_equal(made, exact.astype(dtype))


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_products_of_e4m3(shape: tuple[int, int], dtype: str) -> None:
    n, k = shape
    first = gemm_arrays(1, n, k, codes="float8e4m3fn")
    session = open_session(node_model("MatMulFp8", first, dtype=dtype))
    bits = {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    for m in ROWS:
        for fill in (None, 448, -448, 0) if m < ROWS[-1] else (None,):
            arrays = gemm_arrays(m, n, k, fill, "float8e4m3fn")
            scales = arrays["x_scale"].astype(np.float64) * arrays["weight_scale"]
            expected = exact_product(arrays["x"], arrays["weight"]) * scales + arrays["bias"]
            size = exact_product(np.abs(arrays["x"]), np.abs(arrays["weight"])) * scales
            made = on_gpu(session, arrays, {"y": (m, n)})["y"].astype(np.float64)
            bound = np.abs(expected) * 2.0**-bits * 1.001 + 2.0**-24
            bound += E4M3_SUM * size + 2.0**-22 * np.abs(arrays["bias"])
            worst = float((np.abs(made - expected) / bound).max())
            assert worst <= 1, (m, fill, worst)


@pytest.mark.parametrize("rectified", [True, False])
def test_sums_of_usual_e4m3_lose_little(rectified: bool) -> None:
    """Coding itself makes an error of 3.7e-2 here, and of 2.7e-3 where signs are the same, so that
    all that is cut off adds up; 4.5e-4 at most was measured of sums."""
    n, k = 1024, 4096
    ones = {"x_scale": np.ones(1, np.float32), "weight_scale": np.full(n, 2.0**-12, np.float32)}
    for m in (1, 64, 256, 2048):
        x, weight = RNG.normal(size=(m, k)), RNG.normal(size=(n, k))
        if rectified:
            x, weight = np.maximum(x, 0), weight + 0.5
        arrays: dict[str, np.ndarray] = ones | {
            "x": token_codes(x, "float8e4m3fn")[0],
            "weight": token_codes(weight, "float8e4m3fn")[0],
        }
        # Every row the same and the bias minus the product: what is left is the error.
        arrays["x"] = np.ascontiguousarray(np.broadcast_to(arrays["x"][:1], (m, k)))
        exact = exact_product(arrays["x"][:1], arrays["weight"])[0] * 2.0**-12
        arrays["bias"] = -exact.astype(np.float32)
        session = open_session(node_model("MatMulFp8", arrays, dtype="bfloat16"))
        missed = on_gpu(session, arrays, {"y": (m, n)})["y"]
        size = np.sqrt(np.square(exact).mean())
        assert np.sqrt(np.square(missed, dtype=np.float64).mean()) < 1e-3 * size


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


EPSILON = 1e-5
COLUMNS = (32, 80, 1040, 4096, 5120, 11008, 32768)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_scales_and_codes_are_exact(columns: int, codes: Codes) -> None:
    model = node_model("Quantize" + SUFFIX[codes], {"x": rows_like(1, columns)})
    session = open_session(model)
    for m in ROWS[:4]:
        x = rows_like(m, columns)
        made = on_gpu(session, {"x": x}, {"codes": x.shape, "scale": (m, 1)})
        expected, scale = token_codes(x, codes)
        np.testing.assert_array_equal(made["scale"], scale)
        np.testing.assert_array_equal(places(made["codes"]), places(expected))


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


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_static_codes_are_exact(columns: int, codes: Codes) -> None:
    x = rows_like(17, columns)
    arrays = {"x": x, "scale": np.array([0.0123], np.float32)}
    session = open_session(node_model("Quantize" + SUFFIX[codes], arrays, outputs=["codes"]))
    made = on_gpu(session, arrays, {"codes": x.shape})
    expected = static_codes(x, arrays["scale"], codes)
    np.testing.assert_array_equal(places(made["codes"]), places(expected))


def test_e4m3_of_every_float16() -> None:
    """As the reference rounds them: halves to even, subnormals, saturation, NaN."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 4096)
    arrays: Arrays = {"x": x, "scale": np.ones(1, np.float32)}
    model = node_model("QuantizeFp8", arrays, outputs=["codes"])
    made = on_gpu(open_session(model), arrays, {"codes": x.shape})["codes"]
    expected = run(with_reference(model), arrays)["codes"]
    np.testing.assert_array_equal(made.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("value", "seen"), [(np.nan, np.isnan), (np.inf, np.isinf)])
def test_what_is_not_finite_shows_in_the_scale(value: float, seen: np.ufunc, codes: Codes) -> None:
    x = rows_like(5, 4096)
    x[2, 1234] = value
    session = open_session(node_model("Quantize" + SUFFIX[codes], {"x": x}))
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
    difference = np.abs(places(made["codes"]) - places(expected["codes"]))
    assert difference.max() <= 1
    assert (difference != 0).mean() < 2e-3
    if "scale" in made:
        np.testing.assert_allclose(made["scale"], expected["scale"], rtol=2e-6)
    if "sum" in made:
        np.testing.assert_array_equal(made["sum"], expected["sum"])


def norm_scales(name: str, arrays: Arrays, codes: Codes) -> np.ndarray:
    """What the scales of a norm are, in float64 but for the sum with the residual.

    Those of the body are no measure: on the CPU ONNX Runtime adds a row up number by number in
    float32, which alone is 2.0e-6 off in a row of 32768. A kernel's threads share a row, so that
    no sum in it is longer than some dozens: 2.4e-7 by the same arithmetic.
    """
    x = arrays["x"]
    if "residual" in arrays:
        x = (x.astype(np.float32) + arrays["residual"].astype(np.float32)).astype(x.dtype)
    value = x.astype(np.float64)
    if name == "LayerNorm":
        value -= value.mean(-1, keepdims=True)
    value /= np.sqrt(np.square(value).mean(-1, keepdims=True) + EPSILON)
    value = value * arrays["weight"] + arrays.get("bias", 0)
    return np.asarray(np.abs(value).max(-1, keepdims=True) / LARGEST[codes])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("columns", [32, 1040, 4096, 5120, 16384, 32768])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_norm(codes: Codes, name: str, columns: int, static: bool, residual: bool) -> None:
    for m in (1, 17, 127):
        arrays = {
            "x": RNG.normal(size=(m, columns)).astype(np.float16) + np.float16(0.5),
            "weight": RNG.normal(size=columns).astype(np.float16),
        }
        if name == "LayerNorm":
            arrays["bias"] = RNG.normal(size=columns).astype(np.float16)
        if residual:
            arrays["residual"] = RNG.normal(size=(m, columns)).astype(np.float16)
        if static:
            arrays["scale"] = np.array([0.03], np.float32)
        outputs = ["codes", "sum"] if static else ["codes", "scale", "sum"]
        if not residual:
            outputs.remove("sum")
        model = node_model(name + SUFFIX[codes], arrays, outputs=outputs, epsilon=EPSILON)
        shapes = {"codes": (m, columns), "scale": (m, 1), "sum": (m, columns)}
        made = on_gpu(open_session(model), arrays, shapes)
        expected = run(with_reference(model), arrays)
        if not static:
            expected["scale"] = norm_scales(name, arrays, codes)
        assert_close(made, expected)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "up", "packed"])
@pytest.mark.parametrize("static", [True, False])
def test_activation(codes: Codes, kind: str, gate: str, static: bool) -> None:
    for m, columns in ((1, 32), (17, 1040), (33, 14336)):
        width = 2 * columns if gate == "packed" else columns
        arrays = {"x": RNG.normal(size=(m, width)).astype(np.float16) * np.float16(3)}
        if gate == "up":
            arrays["up"] = RNG.normal(size=(m, columns)).astype(np.float16)
        if static:
            arrays["scale"] = np.array([0.05], np.float32)
        outputs = ["codes"] if static else ["codes", "scale"]
        packed = int(gate == "packed")
        name = "Activation" + SUFFIX[codes]
        model = node_model(name, arrays, outputs=outputs, kind=kind, packed=packed)
        made = on_gpu(open_session(model), arrays, {"codes": (m, columns), "scale": (m, 1)})
        assert_close(made, run(with_reference(model), arrays))
