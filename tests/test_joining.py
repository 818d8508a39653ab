"""Which products are made one."""

from __future__ import annotations

import dataclasses

from qcompile.targets.ort_cpu import OrtCpu
from qcompile.targets.ort_cuda import OrtCuda

from qcompile.joining import plan_columns, plan_joins
from qcompile.precision import OpPlan, PrecisionPlan

OPS = (
    ("q", "attention", "weight4"),
    ("k", "attention", "weight4"),
    ("v", "attention", "weight8"),
    ("o", "values", "weight4"),
    ("gate", "mlp", "int8"),
    ("up", "mlp", "int8"),
    ("a", "other", "float"),
    ("b", "other", "float"),
)


def plan_of(width: int, outputs: int | None = None) -> PrecisionPlan:
    one = OpPlan("", "", "float", "", width, outputs or width, "")
    return PrecisionPlan(
        ops=tuple(
            dataclasses.replace(one, name=name, site=site, precision=precision)  # type: ignore[arg-type]
            for name, site, precision in OPS
        )
    )


def test_products_of_one_activation_and_precision() -> None:
    assert plan_joins(plan_of(8), OrtCpu("avx2")) == {"q", "k", "gate", "up"}
    assert not plan_joins(plan_of(8), OrtCuda("sm90"))


def test_int8_where_it_is_small() -> None:
    """Two weights of a mebibyte, and a little more."""
    assert plan_joins(plan_of(1024), OrtCpu("avx2")) == {"q", "k", "gate", "up"}
    assert plan_joins(plan_of(1025), OrtCpu("avx2")) == {"q", "k"}


def test_columns_of_few_inputs_are_scaled_behind() -> None:
    """What the kernel does for each output channel is little beside reading many codes."""
    assert plan_columns(plan_of(1024), OrtCpu("avx2"), last=False) == {"gate", "up"}
    assert not plan_columns(plan_of(1025), OrtCpu("avx2"), last=False)
    assert not plan_columns(plan_of(1024), OrtCuda("sm90"), last=False)


def test_a_large_vocabulary_is_scaled_of_the_last_token_alone() -> None:
    """Of a prompt its logits would be in memory twice."""
    for width, last in ((16384, False), (16385, True)):
        assert plan_columns(plan_of(8, width), OrtCpu("avx2"), last=last) == {"gate", "up"}
    assert not plan_columns(plan_of(8, 16385), OrtCpu("avx2"), last=False)
