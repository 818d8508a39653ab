"""``qcompile compile``, the default command, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from qcompile.console import plain, stdout
from qcompile.errors import ConfigError

PATH: Final = click.Path(path_type=Path)


@click.command("compile", short_help="Compile MODEL (the default command).")
@click.argument("model")
@click.option("--target", default="ort-cpu", help="See `qcompile targets`.")
@click.option(
    "--scheme",
    help="See `qcompile schemes`.  [default: w8a8, or what a quantised checkpoint holds]",
)
@click.option(
    "--compare",
    help="Several schemes, like w8a8,w4a16:gptq: each into a folder of its own, and one table.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Folder to write.  [default: MODEL-target-scheme]",
)
@click.option(
    "--calibration",
    type=click.Path(),
    help="Text (.txt, .jsonl), a folder of images, or inputs by name (.npz, .npy for one input).",
)
@click.option("--samples", type=int, default=64, help="Calibration samples.")
@click.option("--seq-len", type=int, default=256, help="Tokens per sample.")
@click.option(
    "--smooth",
    default="auto",
    help="SmoothQuant: auto (α searched per site), off, or α in [0, 1].",
)
@click.option(
    "--activations",
    type=click.Choice(["auto", "static", "dynamic", "token"]),
    default="auto",
    help="The paper's O3, O2, O1, or whichever pays, per site.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "size", "accuracy", "scheme"]),
    default="latency",
    help="What the precision of every op is chosen for; scheme: as --scheme says, unmeasured.",
)
@click.option("--max-kl", type=float, help="Limit: mean KL to float on held-back text.")
@click.option("--min-speedup", type=float, help="Limit: times float's speed, at every shape.")
@click.option("--max-size", help="Limit: bytes of the weights, e.g. 20MB.")
@click.option(
    "--costs",
    type=PATH,
    help="File of measured times, read and added to; another machine's is used as it is.",
)
@click.option("--plan-out", type=PATH, help="Write the plan there, too.")
@click.option("--plan-in", type=PATH, help="Replay a plan, choose nothing.")
@click.option(
    "--ranges",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    default="minmax",
    help="How a static range is drawn from what calibration saw.",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="Of weights alone: input channels that share a scale.  [default: 32]",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Of weights alone: blocks without or with zero points.  [default: as the method has it]",
)
@click.option(
    "--outlier-threshold",
    type=float,
    help="llm-int8: magnitude from which on a channel stays in float.  [default: 6]",
)
@click.option(
    "--outlier-share",
    type=float,
    help="llm-int8, spqr: part of the input channels that stays in float, up to 0.125.",
)
@click.option(
    "--equalize/--no-equalize",
    default=None,
    help="Move scales between ops (cross-layer equalisation).  [default: on onnx-edge]",
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=None,
    help="Add what rounding shifts on average to biases.  [default: on onnx-edge]",
)
@click.option("--recipe", type=PATH, help="YAML: module-path glob -> overrides.")
@click.option("--task", help="Task of the model, as optimum names it.  [default: inferred]")
@click.option("--opset", type=int, default=23, help="ONNX opset; 13 to 23 for onnx-edge.")
@click.option("--seed", type=int, default=0, help="For generated data.")
@click.option(
    "--shapes",
    help="Batch x sequence that matter: timed, and planned for.  "
    "[default: 1x128, and 1x1 for what generates]",
)
@click.option(
    "--shape",
    "input_shapes",
    multiple=True,
    help="onnx-edge: an input's shape for good, like input_ids=1x128; may be repeated.",
)
@click.option(
    "--weights",
    type=click.Choice(["per-channel", "per-tensor"]),
    help="onnx-edge: scales of a weight.  [default: per channel where the profile has it]",
)
@click.option(
    "--activation-type",
    type=click.Choice(["uint8", "int8", "uint16", "int16"]),
    help="onnx-edge: codes of activations.  [default: as the profile prefers]",
)
@click.option(
    "--symmetric-activations", is_flag=True, help="onnx-edge: zero in the middle of their codes."
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model folder.")
@click.option(
    "--cache/--no-cache",
    default=None,
    help="A language model keeps keys and values: for `qcompile run`.  [default: with kv8, kv4]",
)
@click.option("--last-logits", is_flag=True, help="With a cache: of a prompt, the last logits.")
@click.option("--adapter", help="Folder or hub id of a PEFT adapter (LoRA) for MODEL.")
@click.option(
    "--keep-adapter",
    "adapter_mode",
    flag_value="keep",
    default="merge",
    show_default=False,
    help="Keep it beside the weights, in float.  [default: merge it into them]",
)
@click.option(
    "--strict/--no-strict",
    default=True,
    show_default=False,
    help="Fail where verification does not hold, or only report it.  [default: strict]",
)
@click.option(
    "--format",
    type=click.Choice(["onnx", "ort"]),
    default="onnx",
    help="ort: model.ort too, for reduced builds, and the operators that one needs.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def compile_command(
    model: str,
    target: str,
    scheme: str | None,
    compare: str | None,
    output: Path | None,
    calibration: str | None,
    recipe: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    smooth: str,
    shapes: str | None,
    max_size: str | None,
    block_size: str | None,
    input_shapes: tuple[str, ...],
    weights: str | None,
    activation_type: str | None,
    symmetric_activations: bool,
    **options: Any,
) -> None:
    """Compile MODEL: a Hugging Face folder or hub id, an .onnx file, or path/file.py:factory."""
    from qcompile.checkpoints.scheme import choose_scheme
    from qcompile.config import CompileConfig, Recipe, parse_size, parse_smooth
    from qcompile.edge.options import EdgeOptions, parse_input_shapes
    from qcompile.shapes import parse_shapes
    from qcompile.staging import check_output
    from qcompile.targets import get_target

    edge = EdgeOptions(
        shapes=parse_input_shapes(input_shapes),
        weights=weights,  # type: ignore[arg-type]
        activation_type=activation_type,  # type: ignore[arg-type]
        symmetric_activations=symmetric_activations,
    )
    config = CompileConfig(
        edge=edge,
        smooth=parse_smooth(smooth),
        max_size=parse_size(max_size) if max_size is not None else None,
        block_size=int(block_size) if block_size else None,  # type: ignore[arg-type]
        shapes=parse_shapes(shapes) if shapes is not None else (),
        recipe=Recipe.read(recipe) if recipe else Recipe(),
        **options,
    )
    if compare is not None:
        if scheme is not None:
            raise ConfigError("--compare names the schemes, so --scheme has no effect")
        from qcompile.cli_compare import compare_command

        compare_command(
            model, compare, stdout(), target=target, calibration=calibration, config=config,
            output=output, overwrite=overwrite, as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    # What can be known to be wrong without the model is said before torch is imported.
    get_target(target)
    chosen = choose_scheme(model, scheme)
    from qcompile import default_output

    folder = output or default_output(model, target, chosen.name)
    check_output(folder, overwrite=overwrite)

    from qcompile.pipeline import compile_model
    from qcompile.progress import Phases
    from qcompile.summary import print_summary

    console = Console(stderr=True)
    artifact = compile_model(
        model,
        target=target,
        scheme=chosen,
        calibration=calibration,
        config=config,
        output=folder,
        overwrite=overwrite,
        phases=Phases(console if console.is_terminal and not quiet else None),
    )
    for warning in artifact.report.warnings:
        console.print(f"[yellow]warning:[/] {plain(warning)}", highlight=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"path": str(artifact.path), **artifact.report.summary()}, indent=1))
    elif not quiet:
        print_summary(artifact, stdout())
