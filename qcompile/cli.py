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

import click

from qcompile.cli_compile import PATH, compile_command
from qcompile.cli_group import CompileByDefault
from qcompile.console import stdout
from qcompile.errors import ConfigError, QcompileError
from qcompile.terminating import STATUS as TERMINATED
from qcompile.terminating import Terminated, terminable

_INTERRUPTED = 130


@click.group(
    cls=CompileByDefault, context_settings={"help_option_names": ["--help"], "show_default": True}
)
@click.version_option(package_name="qcompile")
def cli() -> None:
    """Compile a model to a quantised, verified ONNX graph.

    MODEL is a Hugging Face folder or hub id, an .onnx file, or path/file.py:factory.
    `qcompile compile --help` lists the options.
    """


cli.add_command(compile_command)


@cli.command("targets", short_help="List targets and what they can run.")
def targets_command() -> None:
    """List targets, their variants and their capability tables."""
    from qcompile.summary import targets_table
    from qcompile.targets import available

    stdout().print(targets_table(available()))


@cli.command("schemes", short_help="List schemes.")
def schemes_command() -> None:
    """List quantisation schemes."""
    from qcompile.summary import scheme_lines

    for line in scheme_lines():
        click.echo(line)


@cli.command("inspect", short_help="Show an artifact's plan per op.")
@click.argument("folder", type=PATH)
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
        print_ops(report, stdout())


@cli.command("report", short_help="Draw an artifact's page again, or compare several.")
@click.argument("folders", nargs=-1, required=True, type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
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
@click.argument("folder", type=PATH)
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
@click.argument("folder", type=PATH)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option(
    "--temperature",
    type=click.FloatRange(0.0),
    default=0.0,
    help="0: always the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of what is drawn.")
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
@click.argument("folders", nargs=-1, required=True, type=PATH)
@click.option("--batch", type=click.IntRange(1), default=1)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--new-tokens", type=click.IntRange(1), default=128)
@click.option("--rounds", type=click.IntRange(1), default=5)
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
        stdout().print(rates_table(rates))


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
        _fail(f"terminated{_what_was_lost()}", TERMINATED)
    except (KeyboardInterrupt, click.Abort):
        _fail(f"interrupted{_what_was_lost()}", _INTERRUPTED)
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


def _what_was_lost() -> str:
    # Only compiling writes anything, and it is the default.
    compiling = not sys.argv[1:] or sys.argv[1] not in {*cli.commands} - {"compile"}
    return "; nothing was written" if compiling else ""


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
