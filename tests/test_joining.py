"""Which products are made one."""

from __future__ import annotations

import dataclasses

from qcompile.targets.ort_cpu import OrtCpu
from qcompile.targets.ort_cuda import OrtCuda

from qcompile.joining import plan_joins
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


def test_weights_alone_of_one_activation_and_precision() -> None:
    one = OpPlan("", "", "float", "", 8, 8, "")
    plan = PrecisionPlan(
        ops=tuple(
            dataclasses.replace(one, name=name, site=site, precision=precision)  # type: ignore[arg-type]
            for name, site, precision in OPS
        )
    )
    assert plan_joins(plan, OrtCpu("avx2")) == {"q", "k"}
    assert not plan_joins(plan, OrtCuda("sm90"))
