"""Everything that the README and the docs show runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import qcompile
from qcompile.cli import cli
from tests.cli_runner import RunCli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_setup_installs_what_the_tests_need_and_compiles_the_example() -> None:
    setup, tests = blocks(README, "bash")[:2]
    assert "pip install -q -c constraints.txt -e '.[test]'" in setup
    assert tests.strip().endswith("&& pytest -n 2 --dist loadfile")
    command = shlex.split(setup.rsplit("&& ", 1)[1])
    assert command[0] == "qcompile"
    context = cli.commands["compile"].make_context("compile", command[1:])
    assert (ROOT / context.params["model"] / "model.safetensors").is_file()
    assert (ROOT / context.params["calibration"]).is_file()


def test_the_commands(
    compiled_tiny: qcompile.Artifact,
    compile_cached: Callable[[str], qcompile.Artifact],
    run_cli: RunCli,
) -> None:
    shown = [line for block in blocks(README, "bash")[3:] for line in block.splitlines()]
    assert len(shown) == 11
    at = {
        "tiny-opt-ort-cpu-w8a8": compiled_tiny.path,
        "tiny-opt-cached": compile_cached("w8a8").path,
        "tiny-opt-cached-fp32": compile_cached("fp32").path,
    }
    for line in shown:
        words = shlex.split(line, comments=True)[1:]
        if "--cache" in words:
            # Compiling takes long; the same is done for the folders above.
            context = cli.commands["compile"].make_context("compile", words)
            assert context.params["cache"] and str(context.params["output"]) in at
            continue
        named = (
            ROOT / word if word.startswith("examples/") else at.get(word, word) for word in words
        )
        outcome = run_cli(*named)
        assert outcome.status == 0, line


def test_the_python_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(README, "python"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "tiny-opt-int8" / "model.onnx").is_file()
    assert getattr(scope["logits"], "shape", None) == (1, 8, 258)


def test_the_recipe() -> None:
    (text,) = blocks((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), "yaml")
    recipe = qcompile.Recipe.from_mapping(yaml.safe_load(text))
    assert recipe.rule_for("model.layers.0.fc2").precision == "float"
    assert recipe.rule_for("model.layers.1.fc2").activations == "token"
    assert recipe.rule_for("lm_head").precision == "float"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
