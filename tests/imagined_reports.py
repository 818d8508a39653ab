"""A report with everything in it, and names that a careless page would trip over."""

from __future__ import annotations

from qcompile.precision import Label
from qcompile.ranges import Band, Ranges, SiteRanges, WeightRanges
from qcompile.report import (
    Cache,
    CacheEffect,
    CandidateRow,
    FrontRow,
    LeftoverRow,
    OpRow,
    Planning,
    Report,
    SiteRow,
    Speed,
    SummaryRow,
)

NASTY = """</script><script>alert(1)</script><b>&amp;"'${x}$ 層"""
"""Markup, quotes, a Matplotlib formula, and what its font has no glyph for."""

CHANNELS = 300
"""More than a picture has bars, and than a file has buckets."""


def _op(name: str, sqnr: float | None, size: int, label: Label = "static") -> OpRow:
    times = {"float": [100.0, 10.0], "static": [60.0, 7.0], "token": [70.0, 9.0]}
    return OpRow(
        name=name,
        precision="float" if label == "float" else "int8",
        reason=f"because of {name}",
        shape=(CHANNELS, size // CHANNELS),
        label=label,
        bytes=size,
        candidates=[
            CandidateRow(
                label=kind,  # type: ignore[arg-type]
                microseconds=spent,
                conversion=None,
                damage=0.0 if kind == "float" else 1e-5 * spent[1],
                bytes=size,
                chosen=kind == label,
            )
            for kind, spent in times.items()
        ],
        kernel="MatMul" if label == "float" else "com.microsoft.MatMulIntegerToFloat",
        sqnr_db=sqnr,
        saturation_safe=None if label == "float" else "always",
    )


OPS = [
    _op("model.layers.0.q_proj", 30.5, 900),
    _op("model.layers.0.fc1", 9.25, 90000),
    _op(f"model.layers.1.{NASTY}", 120.0, 12000, "token"),
    _op("model.layers.10.fc1", None, 600, "float"),
    _op("lm_head", 25.0, 3000, "float"),
]


def full_report() -> Report:
    """All that can be measured was."""
    smoothed = SummaryRow(absmax=41.5, std=1.0, kurtosis=300.0)
    return Report(
        model=f"model {NASTY}",
        task="text-generation",
        target="ort-cpu",
        scheme="w8a8kv8",
        calibration=f"texts {NASTY}",
        samples=8,
        held_back=2,
        warnings=[f"warned of {NASTY}"],
        refusals=[
            f"model.layers.1.{NASTY}: refused: a GELU is before it",
            "lm_head: refused: a GELU is before it",
            "model.layers.10.fc1: refused: the norm feeds a residual",
        ],
        bytes_float=4_000_000,
        bytes=1_000_000,
        accuracy={"kl": 0.0053, "top1_agreement": 0.952, "sqnr_db": 31.0},
        decoded={"kl": 0.006},
        cache=Cache(
            bits=8,
            granularity="per channel",
            bytes_per_token=1024,
            bytes_per_token_float=4096,
            samples=2,
            effect=[
                CacheEffect(
                    first=first,
                    last=first + 63,
                    kl={"float": 0.005, "keys": 0.0051, "values": 0.0052, "both": 0.0053},
                )
                for first in (0, 64)
            ],
        ),
        speed=[Speed(batch=1, sequence=128, ratio=1.72, rounds=30)],
        kernels={"com.microsoft.MatMulIntegerToFloat": 3, "MatMul": 2},
        sites=[
            SiteRow(
                name=op.name,
                before=smoothed,
                after=SummaryRow(absmax=4.0, std=1.0, kurtosis=4.0),
                smoothing=f"least predicted output error at {op.name}",
                alpha=0.5,
                activations="static",
                scale=0.01,
                zero_point=128,
            )
            for op in OPS
        ],
        ops=OPS,
        leftovers=[LeftoverRow(name="model.layers.0.attn", op="Attention", reason=f"of {NASTY}")],
        planning=Planning(
            objective="latency",
            limits={"max_kl": 0.01},
            shapes=[(1, 128), (1, 1)],
            unit="KL",
            speed=[1.7, 1.6],
            damage=0.004,
            bytes=1_000_000,
            method="cut",
            gap=0.0,
            measured=12,
            machine={"processor": f"a CPU {NASTY}"},
            sensitivity="gradient",
            front=[
                FrontRow(speed=[s, s], damage=d, bytes=10, ops={"static": 5}, changes={})
                for s, d in ((1.8, 0.009), (1.65, 0.004), (1.2, 0.001))
            ],
        ),
        seconds={"trace": 1.5, "verify": 2.0},
    )


def full_ranges() -> Ranges:
    """Of every op: one channel in front of all others, evened out by smoothing."""
    before = [1.0] * 255 + [41.5]
    after = [1.5] * 255 + [4.0]
    return Ranges(
        sites=[
            SiteRanges(
                name=op.name,
                ops=[op.name],
                channels=CHANNELS,
                outlier=299,
                before=Band(low=[-1.0] * 256, high=before, median=1.0, peak=41.5),
                after=Band(low=[-1.5] * 256, high=after, median=1.5, peak=4.0),
            )
            for op in OPS
        ],
        weights=[
            WeightRanges(
                name=op.name,
                inputs=[0.1] * 256,
                smoothed=[0.1] * 255 + [1.0],
                outputs=(0.05, 0.1, 1.0),
            )
            for op in OPS
        ],
    )
