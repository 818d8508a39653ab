"""What equalisation and bias correction gain on image classifiers of random weights.

    python -m benchmarks.vision --json out.json

SQNR of the logits in dB on 128 new images, `w8a8` on `onnx-edge`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import publish
from qcompile import Artifact
from qcompile.metrics import sqnr_db
from tests.edge.vision_models import compiled, images, mobilenet, resnet, vit

CORRECTIONS = {
    "neither": (False, False),
    "bias correction": (False, True),
    "both": (True, True),
}
"""Equalisation, bias correction."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for make in (resnet, mobilenet, vit):
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = make()
            with tempfile.TemporaryDirectory() as folder:
                made = compiled(model, Path(folder), list(CORRECTIONS.values()))
                figures = [_sqnr(model, artifact) for artifact in made]
            by_name = dict(zip(CORRECTIONS, figures, strict=True))
            rows.append({"model": make.__name__, "seed": seed} | by_name)
    publish("SQNR of the logits, dB", rows, arguments.json)


def _sqnr(model: Any, artifact: Artifact) -> float:
    new = images(128, seed=2)
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(new)).logits.numpy()
    missed = wanted - artifact.session().run(None, {"pixel_values": new})[0]
    return sqnr_db(float(np.square(wanted).sum()), float(np.square(missed).sum()))


if __name__ == "__main__":
    main()
