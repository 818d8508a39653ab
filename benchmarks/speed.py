"""Speed of artifacts relative to the first one, interleaved in one process.

    python -m benchmarks.speed FP32_DIR W8A8_DIR [...] --lengths 128,512 --threads 2 --json out.json

Any folder that holds a ``model.onnx`` with token inputs will do: the exporter's plain graph too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.common import Feed, publish, session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--lengths", default="128,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--spinning",
        action="store_true",
        help="threads wait busily between runs, as ONNX Runtime's default is: they "
        "then hold the cores while another session is timed",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sessions = [
        session(folder, arguments.threads, spinning=arguments.spinning)
        for folder in arguments.folders
    ]
    rows: list[dict[str, Any]] = []
    for length in (int(n) for n in arguments.lengths.split(",")):
        ratios = interleaved(sessions, tokens(length), arguments.rounds)
        for folder, (median, low, high) in zip(arguments.folders, ratios, strict=True):
            rows.append(
                {"artifact": folder.name, "tokens": f"1×{length}", "speed": median,
                 "quartiles": f"{low:.2f} to {high:.2f}"}
            )  # fmt: skip
    publish(f"speed relative to {arguments.folders[0].name}", rows, arguments.json)


def tokens(length: int) -> Feed:
    """One sequence of `length` tokens."""
    ids = np.random.default_rng(0).integers(4, 200, (1, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.arange(length, dtype=np.int64)[None],
    }


def interleaved(
    sessions: list[ort.InferenceSession], feed: Feed, rounds: int
) -> list[tuple[float, float, float]]:
    """(median, quartiles) of the first session's time over each session's, round by round."""
    feeds = [{i.name: feed[i.name] for i in s.get_inputs()} for s in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 2):
        for at, (each, inputs) in enumerate(zip(sessions, feeds, strict=True)):
            start = time.perf_counter()
            each.run(None, inputs)
            if number >= 2:
                times[at].append(time.perf_counter() - start)
    result = []
    for mine in times:
        quotients = [a / b for a, b in zip(times[0], mine, strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        result.append((middle, low, high))
    return result


if __name__ == "__main__":
    main()
