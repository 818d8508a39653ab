"""What is said first of an artifact, by the terminal and by the page: size, accuracy, speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from qcompile.report import Cache, Report, Speed

FIGURES: Final = {
    "kl": ("mean KL to float", "{:.5f} nats per row"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "perplexity_float": ("perplexity, float", "{:.4g}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "cosine": ("cosine similarity, mean", "{:.5f}"),
    "cosine_min": ("cosine similarity, worst", "{:.5f}"),
    "sqnr_db": ("SQNR of the output", "{:.1f} dB"),
}


def headline(report: Report) -> dict[str, str]:
    """Figures of the whole model in words, by what they are called."""
    rows = {
        "target, scheme": f"{report.target}, {report.scheme}",
        "size": size_text(report),
        "Linears by precision": ", ".join(
            f"{n} {name}" for name, n in report.ops_by_precision.items() if n
        )
        or "none",
    }
    if report.leftovers:
        counts = Counter(row.op for row in report.leftovers)
        rows["others, in float"] = ", ".join(f"{n} {op}" for op, n in counts.items())
    rows |= dict(accuracy_text(name, value) for name, value in report.accuracy.items())
    if report.decoded:
        label, text = accuracy_text("kl", report.decoded["kl"])
        rows[f"{label}, decoded with the cache"] = text
    if report.cache is not None:
        rows |= dict(_cache_rows(report.cache))
    for speed in report.speed:
        rows[f"speed at {speed.shape}"] = speed_text(report, speed)
    what = "samples that calibrated, too" if report.seen else "held-back samples"
    rows["measured on"] = f"{report.held_back} {what} ({report.calibration})"
    return rows


def accuracy_text(name: str, value: float) -> tuple[str, str]:
    """What a figure of `Report.accuracy` is called, and its value."""
    label, form = FIGURES.get(name, (name, "{:.4g}"))
    return label, form.format(value)


def size_text(report: Report) -> str:
    """Megabytes, and the part of float's."""
    ratio = report.bytes / report.bytes_float if report.bytes_float else 1.0
    return f"{megabytes(report.bytes)} ({ratio:.0%} of float)"


def speed_text(report: Report, speed: Speed) -> str:
    """Relative to float of the kind that the target has."""
    return f"{speed.ratio:.2f}× {baseline(report)}, same process"


def baseline(report: Report) -> str:
    """What speeds are relative to."""
    return "float" if report.floats == "float32" else report.floats


def megabytes(size: int) -> str:
    """Millions of bytes."""
    return f"{size / 1e6:.1f} MB"


def _cache_rows(cache: Cache) -> Iterator[tuple[str, str]]:
    """How large the cache is, and what its codes do to the divergence, by position."""
    part = cache.bytes_per_token / cache.bytes_per_token_float
    yield (
        "keys and values",
        f"{cache.bits} bits {cache.granularity}, {cache.bytes_per_token} bytes a token "
        f"({part:.1%} of float32)",
    )
    for row in cache.effect:
        base = row.kl["float"]
        added = ", ".join(
            f"{form} {row.kl[form] - base:+.5f}" for form in row.kl if form != "float"
        )
        yield f"KL at positions {row.first} to {row.last}", f"{base:.5f} kept in float; {added}"
