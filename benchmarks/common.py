"""What the benchmarks share: documents as token windows, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from qcompile.metrics import Accuracy
from qcompile.session import run_outputs

Feed = dict[str, np.ndarray]


def windows(tokenizer: Any, text: Path, bos: int, *, samples: int, length: int) -> Iterator[Feed]:
    """The first `length` tokens of `samples` documents that are long enough, BOS first."""
    made = 0
    for document in text.read_text(encoding="utf-8").split("<|endoftext|>"):
        ids = [bos, *tokenizer(document.strip(), add_special_tokens=False)["input_ids"]]
        if len(ids) < length or made == samples:
            continue
        made += 1
        array = np.array([ids[:length]], np.int64)
        yield {
            "input_ids": array,
            "attention_mask": np.ones_like(array),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }


def accuracy(
    reference: ort.InferenceSession, compiled: ort.InferenceSession, feeds: Sequence[Feed]
) -> dict[str, float]:
    """KL, top-1 agreement and perplexity of a language model against its float graph."""
    figures = Accuracy("text-generation")
    for feed in feeds:
        figures.add_all(feed, run_outputs(reference, feed), run_outputs(compiled, feed))
    return figures.result()


def session(folder: Path, threads: int = 0, *, spinning: bool = True) -> ort.InferenceSession:
    """A plain session with default options, the number of threads apart.

    Without `spinning` its threads sleep between runs: those of one session would otherwise hold
    the cores while another is timed.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def publish(title: str, rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print `rows` as a table and write them as JSON."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)
    if output:
        output.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n", "utf-8")
