"""What smoothing is for: a model with outlier channels as large ones have them.

    python -m benchmarks.outliers MODEL --calibration calib.txt --evaluation eval.txt

Makes a copy of MODEL in which each norm's weight and bias are multiplied by 64 in six channels and
the consuming weights divided (the same function), and compiles both, with and without smoothing,
with scales per token, and with the outliers in float (llm-int8).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcompile
from benchmarks.common import accuracy, publish, session, windows

FACTOR, CHANNELS = 64.0, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--samples", type=int, default=64, help="to measure on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    feeds = list(
        windows(tokenizer, arguments.evaluation, bos, samples=arguments.samples, length=256)
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        outliers = scratch / "outliers"
        plant(arguments.model, outliers)
        reference = qcompile.compile(
            str(arguments.model), scheme="fp32", target=arguments.target, output=scratch / "fp32"
        ).session()
        for source, label, scheme, options in (
            (arguments.model, "clean", "w8a8", {}),
            (outliers, "outliers", "w8a8", {"smooth": "off"}),
            (outliers, "outliers", "w8a8", {}),
            (outliers, "outliers", "w8a8", {"activations": "token"}),
            (outliers, "outliers", "llm-int8", {}),
        ):
            artifact = qcompile.compile(
                str(source),
                target=arguments.target,
                scheme=scheme,
                calibration=arguments.calibration,
                # Unsmoothed, the copy is ruined: that is the point, and not to be refused here.
                config=qcompile.CompileConfig(objective="scheme", strict=False, **options),  # type: ignore[arg-type]
                output=scratch / "w8a8",
                overwrite=True,
            )
            figures = accuracy(reference, session(artifact.path), feeds)
            asked = ", ".join(f"{name} {value}" for name, value in options.items())
            rows.append({"model": label, "scheme": scheme, "": asked, **figures})
            print(rows[-1], flush=True)
    publish(f"{arguments.model.name}, ×{FACTOR:g} in {CHANNELS} channels", rows, arguments.json)


def plant(source: Path, target: Path) -> None:
    """Save a copy of a model with outlier channels after each norm before attention and MLP."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    decoder = getattr(model.model, "decoder", model.model)
    with torch.no_grad():
        for layer in decoder.layers:
            attention = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
            if hasattr(layer, "fc1"):
                norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
                readers: tuple[list[Any], ...] = (attention, [layer.fc1])
            else:
                norms = (layer.input_layernorm, layer.post_attention_layernorm)
                readers = (attention, [layer.mlp.gate_proj, layer.mlp.up_proj])
            for norm, consumers in zip(norms, readers, strict=True):
                channels = torch.randperm(len(norm.weight), generator=generator)[:CHANNELS]
                norm.weight[channels] *= FACTOR
                if getattr(norm, "bias", None) is not None:
                    norm.bias[channels] *= FACTOR
                for consumer in consumers:
                    consumer.weight[:, channels] /= FACTOR
    model.save_pretrained(target)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)


if __name__ == "__main__":
    main()
