"""Estimated damage against the truth: every op quantised alone, run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.quantize import Quantize
from qcompile.passes.weight_only import WeightOnlyMatMul

from qcompile.errors import CalibrationError
from qcompile.gradients import measure_gradients
from qcompile.linears import find_linears, find_sites
from qcompile.outliers import Split
from qcompile.planning import weight_of
from qcompile.precision import (
    MODES,
    ActivationQuant,
    Choice,
    Label,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
    uint8_affine,
)
from qcompile.sensitivity import Damage, measure_damage, unit_of
from qcompile.torch_graph import UnsupportedOpError
from qcompile.traced import Batch, Kind
from qcompile.weight_blocks import BITS, quantize_blocks
from qcompile.weights import quantize_weight
from tests.networks import CLASSIFIER, HIDDEN, IN, TOKENS, inputs, loaded, network, weights
from tests.support import run_model

LABELS: tuple[Label, ...] = (*MODES, "split", "weight8", "weight4")
FACTOR = 1.3


def plans_of(
    path: Path, feeds: list[Batch], floats: tuple[str, ...] = ()
) -> dict[Label, PrecisionPlan]:
    """A plan per label, for every op but `floats`; static ranges are those of `feeds`."""
    model = loaded(path)
    sites = find_sites(model.graph)
    watched = model.clone()
    values = ir.convenience.create_value_mapping(watched.graph)
    watched.graph.outputs.extend(values[str(site.x.name)] for site in sites[1:])
    seen = [feed | run_model(watched, feed, optimise=False) for feed in feeds]
    plans: dict[Label, PrecisionPlan] = {}
    for label in LABELS:
        choice = Choice(label, "test")
        planned_sites, ops = [], []
        for site in sites:
            x = np.concatenate([batch[str(site.x.name)] for batch in seen])
            x = x.reshape(-1, site.channels)
            split = None
            if label == "split":
                split = Split(np.sort(np.argsort(np.abs(x).max(axis=0))[-3:]), 2)
                x = split.extend(x.T, split.copies).T
            scale, zero = uint8_affine(float(x.min()), float(x.max()))
            names = tuple(linear.name for linear in site.linears if linear.name not in floats)
            if choice.mode is not None and names:
                static = choice.mode == "static"
                activation = ActivationQuant(
                    choice.mode,
                    scale if static else None,
                    zero if static else None,
                    np.full(site.channels, 255),
                    split,
                )
                planned_sites.append(SitePlan(site.name, str(site.x.name), activation, names))
            for linear in site.linears:
                array = np.array(weight_of(linear))
                if split is not None and linear.name in names:
                    array = split.extend(array)
                if linear.name in floats:
                    weight = None
                elif choice.precision in BITS:
                    weight = quantize_blocks(array, bits=BITS[choice.precision])
                else:
                    weight = quantize_weight(array)
                ops.append(
                    OpPlan(
                        linear.name,
                        site.name,
                        "float" if weight is None else choice.precision,
                        "test",
                        linear.in_features,
                        linear.out_features,
                        str(linear.output.name),
                        weight,
                    )
                )
        plans[label] = PrecisionPlan(tuple(planned_sites), tuple(ops))
    return plans


def only(plan: PrecisionPlan, name: str) -> PrecisionPlan:
    """`plan` for one op, the others in float."""
    sites = [dataclasses.replace(s, ops=(name,)) for s in plan.sites if name in s.ops]
    ops = [
        op if op.name == name else dataclasses.replace(op, precision="float", weight=None)
        for op in plan.ops
    ]
    return PrecisionPlan(tuple(sites), tuple(ops))


def output_of(model: ir.Model, feed: Batch) -> np.ndarray:
    """In the order of the ops, nothing fused: no integer kernel saturates."""
    found = next(iter(run_model(model, feed, optimise=False).values()))
    return found.astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def divergence(kind: Kind, reference: np.ndarray, found: np.ndarray) -> float:
    """Of one feed, the mean over what the kind counts."""
    if kind in ("text-generation", "text-classification"):
        p, q = log_softmax(reference), log_softmax(found)
        return float((np.exp(p) * (p - q)).sum(axis=-1).mean())
    if kind == "feature-extraction":
        a, b = reference.sum(axis=1), found.sum(axis=1)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float((1.0 - (a * b).sum(axis=-1) / norms).mean())
    return float(np.square(found - reference).sum() / np.square(reference).sum())


def measured(
    path: Path,
    plans: dict[Label, PrecisionPlan],
    feeds: list[Batch],
    kind: Kind,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Damage:
    """The estimate for every op of a graph that is not smoothed."""
    gradients = measure_gradients(path, feeds, kind, seed=seed, progress=progress)
    found = {
        linear.name: measure_damage(linear, plans, gradients.seen[linear.name], gradients.rows)
        for linear in find_linears(loaded(path).graph)
    }
    return {name: parts for name, parts in found.items() if parts}


def truth(path: Path, plans: dict[Label, PrecisionPlan], feeds: list[Batch], kind: Kind) -> Damage:
    """What `measured` estimates, by quantising each op alone."""
    model = loaded(path)
    reference = [output_of(model, feed) for feed in feeds]
    damage: Damage = {}
    for label, plan in plans.items():
        for op in plan.quantized:
            trial = model.clone()
            for pass_ in (Quantize(only(plan, op.name)), WeightOnlyMatMul()):
                pass_(trial)
            parts = [
                divergence(kind, wanted, output_of(trial, feed))
                for wanted, feed in zip(reference, feeds, strict=True)
            ]
            damage.setdefault(op.name, {})[label] = float(np.mean(parts))
    return damage


def assert_near(estimated: Damage, wanted: Damage, factor: float = FACTOR) -> None:
    """Every part within `factor`, and those that differ by more than its square in right order."""
    assert {n: set(parts) for n, parts in estimated.items()} == {
        n: set(parts) for n, parts in wanted.items()
    }
    pairs = [(estimated[n][k], wanted[n][k], f"{n} {k}") for n in wanted for k in wanted[n]]
    for found, right, where in pairs:
        assert right / factor < found < right * factor, where
    apart = 0
    for (a, true_a, where), (b, true_b, other) in itertools.permutations(pairs, 2):
        if true_a > factor * true_b:
            apart += 1
            assert a > b, f"{where} against {other}"
    assert apart > len(pairs), "most differ enough to be told apart"


# against the truth


@pytest.mark.parametrize("external", [True, False])
def test_kl_of_every_op_quantised_alone(external: bool, tmp_path: Path) -> None:
    path = network(CLASSIFIER, tmp_path, external=external)
    feeds: list[Batch] = [{"x": inputs(128, seed=seed)} for seed in range(4)]
    plans = plans_of(path, feeds)
    done: list[tuple[int, int]] = []
    estimated = measured(
        path, plans, feeds, "text-classification", progress=lambda *at: done.append(at)
    )
    assert set(estimated) == {"m", "n"}
    assert_near(estimated, truth(path, plans, feeds, "text-classification"))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    names = {"float.onnx", "float.onnx.data"} if external else {"float.onnx"}
    assert {file.name for file in tmp_path.iterdir()} == names, "what it wrote is gone"


def test_kl_of_every_token(tmp_path: Path) -> None:
    path = network(TOKENS.format(output="logits"), tmp_path)
    feeds: list[Batch] = [{"x": inputs(1, 128, seed=seed)} for seed in range(4)]
    plans = plans_of(path, feeds)
    estimated = measured(path, plans, feeds, "text-generation")
    assert set(estimated) == {"m", "g", "logits"}
    assert_near(estimated, truth(path, plans, feeds, "text-generation"))


def test_cosine_of_pooled_embeddings(tmp_path: Path) -> None:
    path = network(TOKENS.format(output="last_hidden_state"), tmp_path)
    feeds: list[Batch] = [{"x": inputs(128, 4, seed=seed)} for seed in range(4)]
    plans = plans_of(path, feeds)
    estimated = measured(path, plans, feeds, "feature-extraction")
    assert_near(estimated, truth(path, plans, feeds, "feature-extraction"))


def test_squared_error_of_anything_else(tmp_path: Path) -> None:
    path = network(TOKENS.format(output="y"), tmp_path)
    feeds: list[Batch] = [{"x": inputs(4, 8, seed=seed)} for seed in range(32)]
    plans = plans_of(path, feeds)
    estimated = measured(path, plans, feeds, "other")
    assert_near(estimated, truth(path, plans, feeds, "other"))


def test_units() -> None:
    kinds: tuple[Kind, ...] = ("text-generation", "text-classification", "feature-extraction")
    assert [unit_of(kind) for kind in kinds] == ["KL", "KL", "1 − cosine"]
    assert unit_of("other") == "relative squared error"


# what counts


@pytest.mark.parametrize("kind", ["text-generation", "feature-extraction"])
def test_masked_tokens_do_not_count(kind: Kind, tmp_path: Path) -> None:
    """As if they were not there: the same draws, the same damage."""
    path = network(TOKENS.format(output="last_hidden_state"), tmp_path)
    x, loud = inputs(3, 16), inputs(3, 9, seed=2) * 100
    mask = np.repeat([[1] * 16 + [0] * 9], 3, axis=0)
    plans = plans_of(path, [{"x": x}])
    del plans["dynamic"]  # its range is the whole tensor's
    short = measured(path, plans, [{"x": x}], kind)
    padded: Batch = {"x": np.concatenate([x, loud], axis=1), "attention_mask": mask}
    found = measured(path, plans, [padded], kind)
    for name, parts in short.items():
        assert found[name] == pytest.approx(parts, rel=1e-4)


def test_damage_is_a_mean_over_rows(tmp_path: Path) -> None:
    """Feeds count by their rows: one of three samples as three of one."""
    path = network(CLASSIFIER, tmp_path)
    x = inputs(300)
    plans = plans_of(path, [{"x": x}])
    del plans["dynamic"]
    whole = measured(path, plans, [{"x": x}], "text-classification")
    parts: list[Batch] = [{"x": x[:200]}, {"x": x[200:]}]
    apart = measured(path, plans, parts, "text-classification")
    for name, labels in whole.items():  # of other draws
        assert apart[name] == pytest.approx(labels, rel=0.2)


def test_the_same_seed_gives_the_same_damage(tmp_path: Path) -> None:
    path = network(CLASSIFIER, tmp_path)
    feeds: list[Batch] = [{"x": inputs(16, seed=seed)} for seed in range(2)]
    plans = plans_of(path, feeds)
    first, again, other = (
        measured(path, plans, feeds, "text-classification", seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_what_a_plan_leaves_in_float_has_no_entry(tmp_path: Path) -> None:
    path = network(CLASSIFIER, tmp_path)
    feeds: list[Batch] = [{"x": inputs(16)}]
    plans = plans_of(path, feeds)
    plans["token"] = plans_of(path, feeds, floats=("m",))["token"]
    damage = measured(path, plans, feeds, "text-classification")
    assert set(damage["m"]) == set(LABELS) - {"token"}
    assert set(damage["n"]) == set(LABELS)
    last = {label: plans_of(path, feeds, floats=("m",))[label] for label in LABELS}
    assert set(measured(path, last, feeds, "text-classification")) == {"n"}


def test_an_exact_op_does_no_damage(tmp_path: Path) -> None:
    """Weights that are codes already, and activations too."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (IN, HIDDEN)).astype(np.int8)
    codes[0] = 127
    scale = np.full(HIDDEN, 2.0**-9, np.float32)
    path = network(CLASSIFIER, tmp_path, w=codes * scale)
    x = rng.integers(-128, 128, (8, IN)).astype(np.float32) / 64
    plan = plans_of(path, [{"x": x}])["static"]
    exact = ActivationQuant("static", 1 / 64, 128, np.full(IN, 255))
    sites = tuple(
        dataclasses.replace(site, activation=exact) if "m" in site.ops else site
        for site in plan.sites
    )
    ops = tuple(
        dataclasses.replace(op, weight=QuantizedWeight(codes, scale)) if op.name == "m" else op
        for op in plan.ops
    )
    plans: dict[Label, PrecisionPlan] = {"static": PrecisionPlan(sites, ops)}
    damage = measured(path, plans, [{"x": x}], "text-classification")
    assert damage["m"]["static"] < 1e-9 * damage["n"]["static"]


# what cannot be


@pytest.mark.parametrize("kind", ["feature-extraction", "other"])
def test_a_model_of_nan_is_refused(kind: Kind, tmp_path: Path) -> None:
    feeds: list[Batch] = [{"x": inputs(4)}]
    plans = plans_of(network(CLASSIFIER, tmp_path), feeds)
    broken = weights()["u"]
    broken[3, 4] = np.nan
    path = network(CLASSIFIER, tmp_path, u=broken)
    with pytest.raises(CalibrationError, match="outputs or gradients are NaN or infinite"):
        measured(path, plans, feeds, kind)


def test_an_op_that_is_not_known_is_named(tmp_path: Path) -> None:
    text = CLASSIFIER.replace("h = Tanh (a)", "h = Softsign (a)")
    path = network(text, tmp_path)
    feeds: list[Batch] = [{"x": inputs(4)}]
    with pytest.raises(UnsupportedOpError, match=r"ai\.onnx\.Softsign"):
        measured(path, plans_of(path, feeds), feeds, "text-classification")
