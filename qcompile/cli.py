"""The command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qcompile.cli_group import CompileByDefault
from qcompile.errors import ConfigError, QcompileError
from qcompile.terminating import STATUS as TERMINATED
from qcompile.terminating import Terminated, terminable

_INTERRUPTED = 130


@click.group(cls=CompileByDefault, context_settings={"help_option_names": ["--help"]})
@click.version_option(package_name="qcompile")
def cli() -> None:
    """Compile a model to a quantised, verified ONNX graph.

    MODEL is a Hugging Face folder or hub id, an .onnx file, or path/file.py:factory.
    `qcompile compile --help` lists the options.
    """


@cli.command("compile", short_help="Compile MODEL (the default command).")
@click.argument("model")
@click.option("--target", default="ort-cpu", show_default=True, help="See `qcompile targets`.")
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
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: MODEL-target-scheme]",
)
@click.option(
    "--calibration",
    type=click.Path(),
    help="Text (.txt, .jsonl), a folder of images, or inputs by name (.npz, .npy for one input).",
)
@click.option("--samples", type=int, default=64, show_default=True, help="Calibration samples.")
@click.option("--seq-len", type=int, default=256, show_default=True, help="Tokens per sample.")
@click.option(
    "--smooth",
    default="auto",
    show_default=True,
    help="SmoothQuant: auto (α searched per site), off, or α in [0, 1].",
)
@click.option(
    "--activations",
    type=click.Choice(["auto", "static", "dynamic", "token"]),
    default="auto",
    show_default=True,
    help="The paper's O3, O2, O1, or whichever pays, per site.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "size", "accuracy", "scheme"]),
    default="latency",
    show_default=True,
    help="What the precision of every op is chosen for; scheme: as --scheme says, unmeasured.",
)
@click.option("--max-kl", type=float, help="Limit: mean KL to float on held-back text.")
@click.option("--min-speedup", type=float, help="Limit: times float's speed, at every shape.")
@click.option("--max-size", help="Limit: bytes of the weights, e.g. 20MB.")
@click.option(
    "--costs",
    type=click.Path(path_type=Path),
    help="File of measured times, read and added to; another machine's is used as it is.",
)
@click.option("--plan-out", type=click.Path(path_type=Path), help="Write the plan there, too.")
@click.option("--plan-in", type=click.Path(path_type=Path), help="Replay a plan, choose nothing.")
@click.option(
    "--ranges",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    default="minmax",
    show_default=True,
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
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="YAML: module-path glob -> overrides."
)
@click.option("--task", help="Task of the model, as optimum names it.  [default: inferred]")
@click.option(
    "--opset", type=int, default=23, show_default=True, help="ONNX opset; 13 to 23 for onnx-edge."
)
@click.option("--seed", type=int, default=0, show_default=True, help="For generated data.")
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
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Folder of a PEFT adapter (LoRA) for MODEL."
)
@click.option(
    "--keep-adapter",
    "adapter_mode",
    flag_value="keep",
    default="merge",
    help="Keep it beside the weights, in float.  [default: merge it into them]",
)
@click.option(
    "--strict/--no-strict",
    default=True,
    help="Fail where verification does not hold, or only report it.  [default: strict]",
)
@click.option(
    "--format",
    type=click.Choice(["onnx", "ort"]),
    default="onnx",
    show_default=True,
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
            model, compare, _stdout(), target=target, calibration=calibration, config=config,
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
        console.print(f"[yellow]warning:[/] {_plain(warning)}", highlight=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"path": str(artifact.path), **artifact.report.summary()}, indent=1))
    elif not quiet:
        print_summary(artifact, _stdout())


@cli.command("targets", short_help="List targets and what they can run.")
def targets_command() -> None:
    """List targets, their variants and their capability tables."""
    from qcompile.summary import targets_table
    from qcompile.targets import available

    _stdout().print(targets_table(available()))


@cli.command("schemes", short_help="List schemes.")
def schemes_command() -> None:
    """List quantisation schemes."""
    from qcompile.summary import scheme_lines

    for line in scheme_lines():
        click.echo(line)


@cli.command("inspect", short_help="Show an artifact's plan per op.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def inspect_command(folder: Path, as_json: bool) -> None:
    """Show, for each op of the artifact FOLDER, its precision, kernel, candidates and reason."""
    from qcompile.artifact import damaged_files, read_record
    from qcompile.report import Report
    from qcompile.summary import print_ops

    report = Report.read(folder)
    changed = sorted(damaged_files(folder, read_record(folder)))
    if changed:
        named = ", ".join(changed)
        click.echo(f"warning: {named}: missing or changed since the artifact was made", err=True)
    if as_json:
        click.echo(report.model_dump_json(indent=1))
    else:
        print_ops(report, _stdout())


@cli.command("report", short_help="Draw an artifact's page again, or compare several.")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write.  [default: report.html in FOLDER, if there is one]",
)
def report_command(folders: tuple[Path, ...], output: Path | None) -> None:
    """Draw the page of the artifact FOLDERS: of one as compiling does, of several side by side."""
    from qcompile.redrawing import draw_again, draw_to

    if output is not None:
        for note in draw_to(output, folders):
            click.echo(f"warning: {note}", err=True)
        click.echo(output)
        return
    if len(folders) > 1:
        raise ConfigError("several artifacts make a page of their own", hint="name it with -o FILE")
    click.echo(draw_again(folders[0]))


@cli.command("check", short_help="Verify an artifact again, on this machine.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--trust-library", is_flag=True, help="Load the operators that FOLDER carries.")
def check_command(folder: Path, as_json: bool, trust_library: bool) -> None:
    """Verify the artifact FOLDER on this machine: files, kernels, saturation, accuracy."""
    from qcompile.check import check_artifact

    findings = check_artifact(folder, trust_library=trust_library)
    if as_json:
        click.echo(json.dumps(findings, indent=1))
        return
    click.echo(f"{folder}: sound on this machine")
    for name, value in findings.items():
        click.echo(f"  {name}: {value}")


@cli.command("run", short_help="Generate text with an artifact.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0.0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn."
)
def run_command(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Continue PROMPT with the artifact FOLDER, or answer it where there is a chat template.

    The text goes to stdout as it comes, tokens per second to stderr.
    """
    from qcompile.running import run_prompt

    rates = run_prompt(
        folder,
        prompt,
        lambda text: click.echo(text, nl=False),
        new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    click.echo()
    click.echo(str(rates), err=True)


@cli.command("bench", short_help="Compare how fast artifacts generate.")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_command(
    folders: tuple[Path, ...],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Time prefill and decoding of the artifacts FOLDERS, in turn in one process.

    The tokens per second of one run are worth little; the ratios to the first artifact are.
    """
    from qcompile.benching import bench
    from qcompile.summary import rates_table

    rates = bench(folders, batch=batch, prompt=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(rate) for rate in rates], indent=1))
    else:
        _stdout().print(rates_table(rates))


def main() -> None:
    """Entry point: one line for every deliberate error, and the exit status."""
    _quiet_libraries()
    try:
        with terminable():
            cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except QcompileError as error:
        _fail(str(error), 1)
    except Terminated:
        _fail("terminated", TERMINATED)
    except (KeyboardInterrupt, click.Abort):
        # Only compiling writes anything, and it is the default.
        compiling = not sys.argv[1:] or sys.argv[1] not in {*cli.commands} - {"compile"}
        _fail(f"interrupted{'; nothing was written' if compiling else ''}", _INTERRUPTED)
    except BrokenPipeError:
        # `qcompile inspect DIR | head`: the reader has gone, and that is no error.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 1)
    except MemoryError:
        _fail("out of memory", 1)


def _fail(message: str, status: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _quiet_libraries() -> None:
    """Deprecation notes of libraries are for us, who run the tests with warnings as errors."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # It tells of each intermediate value whose type the exporter left out.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    # It tells of a font cache that takes long to build.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _stdout() -> Console:
    """Tables folded to the terminal; into a pipe or a file, wide enough to search in."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
