"""Estimated damage against the truth: every op quantised alone, and all of them together.

    python -m benchmarks.sensitivity MODEL --calibration calib.txt --json out.json

The truth costs a run of the model per op and implementation; the estimate a backward pass.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from qcompile.passes.smooth_quant import SmoothQuant
from qcompile.passes.untie import Untie
from qcompile.targets import get_target
from scipy import stats

import qcompile
from benchmarks.common import Feed, publish, windows
from qcompile.calibration.data import TOKEN_SAMPLES
from qcompile.calibration.run import calibrate
from qcompile.choosing import scheme_choice
from qcompile.gradients import Leaves, Tensor, evaluated, measure_gradients
from qcompile.linears import find_linears, find_sites
from qcompile.measuring import damage_by_gradient, short_samples
from qcompile.options import find_options
from qcompile.precision import LABELS, PrecisionPlan
from qcompile.schemes import get_scheme
from qcompile.sensitivity import TOKENS, quantized_activation
from qcompile.smoothing import plan_smoothing
from qcompile.spill import spill
from qcompile.torch_graph import evaluate, frontier
from qcompile.trials import trial_plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--labels", default="static,dynamic,token,split,weight8,weight4")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(arguments, Path(scratch))
    publish(f"{arguments.model.name}: estimated against measured KL", rows, arguments.json)


def compare(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row per implementation: rank correlation, and sums of both."""
    from transformers import AutoTokenizer

    plain = qcompile.compile(str(arguments.model), scheme="fp32", output=work / "fp32")
    tokenizer = AutoTokenizer.from_pretrained(plain.path)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    feeds = list(
        windows(tokenizer, arguments.calibration, bos, samples=32 + TOKEN_SAMPLES + 8, length=256)
    )
    graph = spill(ir.load(plain.path / "model.onnx"), work, "float")
    # Every implementation is wanted, whatever the default objective leaves out.
    config = qcompile.CompileConfig(objective="size")
    target = get_target(arguments.target)
    sites = find_sites(graph.graph)
    seen = calibrate(graph, sites, feeds[:32], work)
    options = find_options(sites, config, get_scheme("w8a8"), target)
    chosen = scheme_choice(options)
    samples = short_samples(work / "float.onnx", feeds[32:], TOKEN_SAMPLES, TOKENS)
    gradients = measure_gradients(work / "float.onnx", samples, "text-generation")
    smoothed = graph.clone()
    Untie(list(chosen))(smoothed)
    smoothing = plan_smoothing(
        find_sites(smoothed.graph), seen, config, chosen, importance=gradients.importance
    )
    SmoothQuant(smoothing)(smoothed)
    damage = damage_by_gradient(graph, gradients, options, seen, smoothing, config, target)
    smoothed = spill(smoothed, work, "trial")
    plans = trial_plans(find_sites(smoothed.graph), seen, smoothing, options, config, target)
    path = work / "trial.onnx"
    held_back = short_samples(path, feeds[32 + TOKEN_SAMPLES :], 8, TOKENS)
    truth = Truth(path, held_back, blockwise=target.blockwise)
    rows = []
    for label in (known for known in LABELS if known in arguments.labels.split(",")):
        names = [name for name, parts in damage.items() if label in parts]
        estimated = [damage[name][label] for name in names]
        alone = [truth({name}, plans[label]) for name in names]
        rows.append(
            {
                "label": label,
                "rank correlation": float(stats.spearmanr(estimated, alone).statistic),
                "sum estimated": sum(estimated),
                "sum, each alone": sum(alone),
                "all at once": truth(set(names), plans[label]),
            }
        )
        print(rows[-1], flush=True)
    return rows


class Truth:
    """Mean KL of the model with some ops quantised, the others in float."""

    def __init__(self, path: Path, feeds: list[Feed], *, blockwise: bool) -> None:
        self.blockwise = blockwise
        self.model = ir.load(path)
        self.names = {linear.matmul: linear.name for linear in find_linears(self.model.graph)}
        self.nodes = evaluated(self.model.graph)
        self.constants: dict[ir.Value, Tensor] = {}
        leaves = Leaves(self.model, frontier(self.nodes), path)
        self.given = [leaves(feed) for feed in feeds]
        self.reference = [self._log_probabilities(given, (), None) for given in self.given]

    def __call__(self, ops: Collection[str], plan: PrecisionPlan) -> float:
        divergences = []
        for given, p in zip(self.given, self.reference, strict=True):
            q = self._log_probabilities(given, ops, plan)
            divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return float(np.mean(divergences))

    def _log_probabilities(
        self, given: Any, ops: Collection[str], plan: PrecisionPlan | None
    ) -> Tensor:
        def replaced(node: ir.Node, inputs: list[Any]) -> Tensor:
            name = self.names.get(node, "")
            if plan is None or name not in ops:
                return torch.matmul(*inputs)
            op = plan.op(name)
            assert op.weight is not None
            weight = torch.from_numpy(op.weight.dequantized())
            x = quantized_activation(inputs[0], op, plan, blockwise=self.blockwise)
            return x @ weight

        with torch.no_grad():
            values = evaluate(self.nodes, given, self.constants, replaced)
        return torch.log_softmax(values[self.model.graph.outputs[0]].double(), -1)


if __name__ == "__main__":
    main()
