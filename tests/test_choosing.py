"""Why an op became what it did: the reason that the report gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcompile.choosing import STEPS, Measured, decide, weight_bytes
from qcompile.config import CompileConfig
from qcompile.linears import Site, find_sites
from qcompile.options import Options
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

TEXT = """g (float[B,8] x, float[8,4] v, float[8,4] w) => (float[B,4] p, float[B,4] q) {
  p = MatMul (x, v) q = MatMul (x, w) }"""


@pytest.fixture
def site() -> Site:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, 4)).astype(np.float32) for n in "vw"}
    model = typed(from_text(HEADER + TEXT, **weights))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    (found,) = find_sites(model.graph)
    return found


def measured(
    site: Site,
    int8: float,
    *,
    conversion: float = 0.1,
    saved: float = 0.0,
    damage: float = 0.0,
) -> Measured:
    """Two ops of one second each in float, `q` of them with `damage`."""
    return Measured(
        sites=[site],
        options={name: Options(("token", "float"), "scheme w8a8") for name in "pq"},
        shapes=[(1, 1)],
        float_times=[4.0],
        times={"p": {"float": [1.0], "token": [0.5]}, "q": {"float": [1.0], "token": [int8]}},
        conversions={site.name: {"token": [conversion]}},
        savings={site.name: {"token": [saved]}},
        damage={"p": {"token": 1e-3}, "q": {"token": damage}},
        other_bytes=0,
        machine={},
        taken=0,
    )


def test_what_gains_nothing_says_so(site: Site) -> None:
    found = decide(measured(site, 1.2), CompileConfig()).chosen
    assert found["p"].label == "token"
    assert found["p"].reason == "cost: token at 1.67 of float's speed"
    assert found["q"].label == "float"
    assert found["q"].reason == "cost: token at 0.77 of float's speed"


def test_what_gains_too_little_for_its_damage_says_so(site: Site) -> None:
    found = decide(measured(site, 0.98, conversion=0.01, damage=50.0), CompileConfig()).chosen
    assert found["q"].label == "float"
    assert found["q"].reason == "damage: token at 1.01 of float's speed is not worth 5.0e+01"


def test_a_conversion_that_is_part_of_something_else_is_not_counted(site: Site) -> None:
    """Alone `q` would lose a little, but with it both are had without a conversion."""
    apart = decide(measured(site, 1.1, conversion=0.4), CompileConfig())
    fused = decide(measured(site, 1.1, conversion=0.4, saved=0.6), CompileConfig())
    assert apart.chosen["q"].label == "float"
    assert {choice.label for choice in fused.chosen.values()} == {"token"}
    assert fused.chosen["p"].reason == "cost: token at 2.00 of float's speed"
    # 4 s in all, 2 of them Linears; 1.6 s and what the fused kernel is faster by are left of those.
    assert fused.measured.speeds(fused.solution.cost) == [pytest.approx(4.0 / (2.0 + 1.6 - 0.2))]


def test_bytes_are_of_the_type_that_is_kept(site: Site) -> None:
    linear = site.linears[0]
    assert weight_bytes(linear, "float") == 2 * weight_bytes(linear, "float", "float16") == 128
    assert weight_bytes(linear, "weight8") - weight_bytes(linear, "weight8", "float16") == 2 * 4


def test_where_there_is_a_cache_steps_count_for_more(site: Site) -> None:
    """Slower at a prompt by as much as it is faster at a step: a tie otherwise, which damage
    decides."""
    at_two = dataclasses.replace(
        measured(site, 0.0, conversion=0.0, damage=1e-3),
        shapes=[(1, 128), (1, 1)],
        float_times=[4.0, 4.0],
        times={name: {"float": [1.0, 1.0], "token": [1.2, 0.8]} for name in "pq"},
        conversions={site.name: {"token": [0.0, 0.0]}},
        savings={},
    )
    labels = {
        steps: {c.label for c in decide(replaced, CompileConfig()).chosen.values()}
        for steps in (1, STEPS)
        for replaced in [dataclasses.replace(at_two, steps=steps)]
    }
    assert labels == {1: {"float"}, STEPS: {"token"}}
