"""Methods that round weights: what each promises, on problems of any numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.targets import get_target

from qcompile.clipping import clipped_range
from qcompile.config import CompileConfig, Recipe
from qcompile.descent import damped, output_errors, refine
from qcompile.errors import ConfigError
from qcompile.gptq import importance_in_blocks, quantize_gptq
from qcompile.hqq import quantize_hqq
from qcompile.limits import check_target
from qcompile.methods import METHODS, SUMMARIES
from qcompile.rounding import rounding_of
from qcompile.schemes import get_scheme
from qcompile.weight_blocks import full_range, in_blocks, quantize_blocks

seeds = st.integers(0, 2**32 - 1)
depths = st.sampled_from([16, 33, 64])
bits_of_code = st.sampled_from([4, 8])


def problem(seed: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [depth, 5] and correlated inputs [200, depth] of very different size."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((depth, 5)) * rng.lognormal(0, 1, (depth, 1))).astype(np.float32)
    mixing = rng.standard_normal((depth, depth)) / np.sqrt(depth) + np.eye(depth)
    x = rng.standard_normal((200, depth)) @ mixing * rng.lognormal(0, 1, depth)
    return weight, x.astype(np.float32)


def missed(weight: np.ndarray, found: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Squared error of each output."""
    error: np.ndarray = np.square(x.astype(np.float64) @ (found - weight)).sum(axis=0)
    return error


@settings(max_examples=30)
@given(seeds, depths, bits_of_code, st.booleans())
def test_gptq_is_never_worse_than_its_grid_rounded_to_nearest(
    seed: int, depth: int, bits: int, symmetric: bool
) -> None:
    weight, x = problem(seed, depth)
    hessian = x.astype(np.float64).T @ x
    found = quantize_gptq(weight, hessian, bits=bits, block_size=32, symmetric=symmetric)
    half = 2 ** (bits - 1)
    assert found.codes.min() >= -half and found.codes.max() < half
    assert (found.zero_point is None) == symmetric
    counts = importance_in_blocks(np.diagonal(hessian), 32)
    blocks = in_blocks(weight, 32)
    grid = clipped_range(blocks, counts, bits=bits, symmetric=symmetric)
    nearest = grid.weight(grid.nearest(blocks), depth).dequantized()
    errors = missed(weight, found.dequantized(), x)
    # The two are compared in float32.
    assert (errors <= missed(weight, nearest, x) * (1 + 1e-3)).all()


def test_gptq_makes_up_for_what_it_rounds() -> None:
    weight, x = problem(0, 64)
    found = quantize_gptq(weight, x.T @ x, bits=4, block_size=32, symmetric=False)
    nearest = quantize_blocks(weight, bits=4, symmetric=False)
    assert (
        missed(weight, found.dequantized(), x).sum()
        < 0.5 * missed(weight, nearest.dequantized(), x).sum()
    )


@settings(max_examples=30)
@given(seeds, bits_of_code, st.booleans())
def test_descent_lessens_every_error(seed: int, bits: int, symmetric: bool) -> None:
    weight, x = problem(seed, 64)
    blocks = in_blocks(weight, 32)
    grid = full_range(blocks, bits=bits, symmetric=symmetric)
    codes = grid.nearest(blocks)
    gram = damped(x.T @ x)
    moved, found = refine(weight, grid, codes, gram, rounds=2)
    assert found.min() >= grid.lowest and found.max() <= grid.highest
    before = output_errors(weight, grid, codes, gram)
    after = output_errors(weight, moved, found, gram)
    # It is computed in float32.
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < before.sum()


def test_gptq_of_channels_that_are_dead() -> None:
    weight, x = problem(3, 33)
    x[:, 4:20] = 0.0
    found = quantize_gptq(weight, x.T @ x, bits=4, block_size=32, symmetric=True).dequantized()
    assert np.isfinite(found).all()
    assert np.abs(found[4:20] - weight[4:20]).max() <= np.abs(weight).max()
    nothing = quantize_gptq(weight, np.zeros((33, 33)), bits=4, block_size=32, symmetric=True)
    assert np.isfinite(nothing.dequantized()).all()


@given(seeds, depths, bits_of_code, st.booleans(), st.booleans())
def test_clipping_never_adds_to_the_error(
    seed: int, depth: int, bits: int, symmetric: bool, weighted: bool
) -> None:
    weight, x = problem(seed, depth)
    blocks = in_blocks(weight, 16)
    moment = np.square(x).mean(axis=0) if weighted else np.ones(depth)
    counts = np.pad(moment, (0, -depth % 16)).reshape(-1, 16).astype(np.float32)
    grid = clipped_range(blocks, counts if weighted else None, bits=bits, symmetric=symmetric)
    full = full_range(blocks, bits=bits, symmetric=symmetric)

    def error(of: np.ndarray) -> np.ndarray:
        result: np.ndarray = (np.square(of - blocks) * counts[:, :, None]).sum(axis=1)
        return result

    clipped, whole = (error(g.values(g.nearest(blocks))) for g in (grid, full))
    assert (clipped <= whole * (1 + 1e-5)).all()


@given(seeds, depths, bits_of_code)
def test_hqq_never_adds_to_the_error(seed: int, depth: int, bits: int) -> None:
    weight, _ = problem(seed, depth)
    found = quantize_hqq(weight, bits=bits, block_size=16)
    nearest = quantize_blocks(weight, bits=bits, block_size=16, symmetric=False)
    assert found.zero_point is not None
    assert found.zero_point.dtype == np.int8 and found.zero_point.shape == found.scale.shape
    errors = [
        np.square(in_blocks(each.dequantized() - weight, 16)).sum(axis=1)
        for each in (found, nearest)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_zero_points_help_where_blocks_are_lopsided() -> None:
    weight = np.random.default_rng(0).uniform(-0.1, 1.0, (64, 8)).astype(np.float32)
    errors = [
        np.square(quantize_blocks(weight, bits=4, symmetric=s).dequantized() - weight).sum()
        for s in (True, False)
    ]
    # 15 steps for a range of 1.1 against eight for one of 1.0: half a step each, squared.
    assert errors[1] < 0.5 * errors[0]


@given(seeds, depths, bits_of_code)
def test_what_is_on_the_grid_comes_back(seed: int, depth: int, bits: int) -> None:
    weight, _ = problem(seed, depth)
    once = quantize_blocks(weight, bits=bits, symmetric=False).dequantized()
    again = quantize_blocks(once, bits=bits, symmetric=False).dequantized()
    np.testing.assert_allclose(again, once, rtol=0, atol=1e-5 * np.abs(once).max())


# names


def test_every_method_has_a_summary() -> None:
    assert set(SUMMARIES) == set(METHODS)


def test_a_scheme_names_its_method() -> None:
    scheme = get_scheme("w4a16kv8:awq+gptq")
    assert (scheme.base, scheme.method, scheme.cache_bits) == ("w4a16", "awq+gptq", 8)
    assert get_scheme("w4a16").method is None
    assert get_scheme("zeroquant4kv8").method == "lkd"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16:best", "unknown method 'best'"),
        ("w4a16:", "names no method after its colon"),
        ("fp8:gptq", "scheme fp8 has no methods"),
        ("zeroquant:gptq", "scheme zeroquant has no methods"),
        ("nf4:dq", "takes them as floats"),
        ("nf4:gptq", "scheme nf4 has no methods"),
        ("checkpoint:gptq", "scheme checkpoint has no methods"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_scheme(name)


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"block_size": 64}, {"symmetric": True}])
def test_a_checkpoint_is_not_rounded(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="scheme checkpoint rounds nothing"):
        check_target(get_target("ort-cpu"), get_scheme("checkpoint"), CompileConfig(**options))


def test_a_recipe_names_methods() -> None:
    recipe = Recipe.from_mapping({"*.fc2": "w4a16:gptq", "*.fc1": {"method": "hqq"}})
    config = CompileConfig(recipe=recipe, method="awq", block_size=64)
    found = {name: rounding_of(f"m.{name}", "weight4", config) for name in ("fc1", "fc2", "q")}
    assert {n: r.method for n, r in found.items() if r} == {"fc1": "hqq", "fc2": "gptq", "q": "awq"}
    assert all(r is not None and (r.block_size, r.symmetric) == (64, False) for r in found.values())
    assert rounding_of("m.fc1", "int8", config) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": {"*": "fp8:gptq"}}, "fp8 has no methods"),
        ({"recipe": {"*": "w4a16:best"}}, "recipe rule"),
        ({"method": "hqq", "symmetric": True}, "symmetric blocks have none"),
        ({"recipe": {"*": "w4a16:hqq"}, "symmetric": True}, "symmetric blocks have none"),
        ({"block_size": 48}, "block_size"),
    ],
)
def test_options_that_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompileConfig(**fields)  # type: ignore[arg-type]
