"""A model twice, with the products of one activation joined and apart, for `benchmarks.generation`.

python -m benchmarks.joined MODEL --scheme w4a16 -o FOLDER
python -m benchmarks.generation FOLDER/joined FOLDER/apart --steps
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import qcompile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    # As the scheme names it, so that both have the same products.
    config = qcompile.CompileConfig(cache=True, objective="scheme")

    def compile_(name: str) -> None:
        qcompile.compile(
            given.model,
            target="ort-cpu",
            scheme=given.scheme,
            calibration=given.calibration,
            config=config,
            output=given.output / name,
        )

    compile_("joined")
    with mock.patch("qcompile.pipeline.plan_joins", return_value=frozenset()):
        compile_("apart")


if __name__ == "__main__":
    main()
