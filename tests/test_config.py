"""Options and recipes: what is accepted, what wins, and one sentence for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from qcompile.config import CompileConfig, Recipe, SiteRule, parse_smooth
from qcompile.errors import ConfigError
from qcompile.schemes import CACHES, SCHEMES, get_scheme


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.read(path)


def refused(error: pytest.ExceptionInfo[ConfigError], *words: str) -> None:
    message = str(error.value)
    assert message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_defaults_are_those_of_the_command_line() -> None:
    config = CompileConfig()
    assert config == CompileConfig()
    assert (config.samples, config.seq_len, config.smooth) == (64, 256, "auto")
    assert (config.activations, config.ranges, config.seed) == ("auto", "minmax", 0)
    assert config.objective == "latency"
    assert config.strict
    assert not config.trust_remote_code


def test_a_config_is_frozen() -> None:
    config = CompileConfig(samples=3)
    with pytest.raises(pydantic.ValidationError):
        config.samples = 4
    assert config.samples == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("samples", -1),
        ("samples", "many"),
        ("seq_len", 1),
        ("smooth", "on"),
        ("smooth", -0.1),
        ("smooth", 1.1),
        ("smooth", float("nan")),
        ("activations", "float"),
        ("ranges", "max"),
        ("opset", 12),
        ("opset", 99),
        ("seed", -1),
        ("trust_remote_code", "perhaps"),
        ("recipe", "*.fc1"),
        ("bits", 8),
    ],
)
def test_a_bad_option_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        CompileConfig(**{field: value})
    refused(error, field)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, "opset: 12 is below 13"),
        ({"opset": 24}, "opset: 24 is above 23"),
        ({"max_kl": 0}, "max_kl: 0 is not above 0.0"),
        ({"format": "tflite"}, "format: 'tflite' is not 'onnx' or 'ort'"),
        ({"bits": 8}, "bits: there is no such option"),
    ],
)
def test_a_bad_option_is_told_in_our_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        CompileConfig(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_number_outside_the_unit_interval_is_told_its_bounds(value: float) -> None:
    with pytest.raises(ConfigError) as error:
        CompileConfig(smooth=value)
    message = str(error.value)
    assert "[0, 1]" in message or "equal to" in message


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", "auto"), ("off", "off"), ("0.5", 0.5), ("0", 0.0), ("1", 1.0)]
)
def test_smooth_from_the_command_line(text: str, expected: str | float) -> None:
    assert parse_smooth(text) == expected
    assert CompileConfig(smooth=parse_smooth(text)).smooth == expected


@pytest.mark.parametrize("text", ["", "on", "AUTO", "0,5", "half"])
def test_smooth_that_is_no_number(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_smooth(text)
    refused(error, "smooth", repr(text), "[0, 1]")


def test_a_recipe_of_short_and_long_rules(tmp_path: Path) -> None:
    read = recipe(
        tmp_path,
        """
        "*.lm_head": float
        "*.fc2": {activations: static, smooth: 0.25, ranges: mse}
        "*": {precision: w8a8}
        """,
    )
    assert read.rules == (
        ("*.lm_head", SiteRule(precision="float")),
        ("*.fc2", SiteRule(activations="static", smooth=0.25, ranges="mse")),
        ("*", SiteRule(precision="w8a8")),
    )


def test_json_is_read_too(tmp_path: Path) -> None:
    assert recipe(tmp_path, '{"*.fc1": "float"}').rule_for("a.fc1").precision == "float"


def test_the_last_rule_that_matches_wins_field_by_field() -> None:
    read = Recipe.from_mapping(
        {
            "*": {"activations": "token", "smooth": 0.3},
            "model.*": {"activations": "dynamic"},
            "*.fc2": "float",
        }
    )
    assert read.rule_for("lm_head") == SiteRule(activations="token", smooth=0.3)
    assert read.rule_for("model.fc1") == SiteRule(activations="dynamic", smooth=0.3)
    assert read.rule_for("model.fc2").model_dump(exclude_none=True) == {
        "precision": "float",
        "activations": "dynamic",
        "smooth": 0.3,
    }


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"activations": "token", "ranges": "mse"}, "token activations have none"),
        (
            {"precision": "float", "smooth": 0.5},
            "float takes no other field",
        ),
    ],
)
def test_a_rule_without_effect(rule: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Recipe.from_mapping({"*.fc1": rule})
    # Two rules that overlap may come to the same: each has its effect elsewhere.
    overlapping = {glob: {k: v} for glob, (k, v) in zip(("*", "*.fc1"), rule.items(), strict=True)}
    merged = Recipe.from_mapping(overlapping).rule_for("a.fc1")
    assert merged.model_dump(exclude_none=True) == rule


def test_ranges_of_activations_that_have_none() -> None:
    with pytest.raises(ConfigError, match="token activations have none"):
        CompileConfig(activations="token", ranges="mse")
    some = Recipe.from_mapping({"*.fc1": {"activations": "static"}})
    assert CompileConfig(activations="token", ranges="mse", recipe=some).ranges == "mse"


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("*.fc1", "model.layers.0.fc1", True),
        ("*.fc1", "fc1", False),
        ("model.layers.[01].*", "model.layers.1.fc1", True),
        ("model.layers.[01].*", "model.layers.2.fc1", False),
        ("model.layers.?.fc1", "model.layers.10.fc1", False),
        ("*.FC1", "model.fc1", False),
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
    ],
)
def test_globs(glob: str, path: str, matches: bool) -> None:
    read = Recipe.from_mapping({glob: "float"})
    assert (read.rule_for(path).precision == "float") is matches
    assert read.unmatched([path]) == ([] if matches else [glob])


def test_no_rule_changes_nothing() -> None:
    assert Recipe().rule_for("a.b") == SiteRule()
    assert Recipe().unmatched(["a.b"]) == []


def test_smooth_off_in_yaml_is_off(tmp_path: Path) -> None:
    # A bare `off` is the boolean False in YAML 1.1.
    assert recipe(tmp_path, '"*.fc2": {smooth: off}').rule_for("a.fc2").smooth == "off"


@pytest.mark.parametrize("value", ["true", "yes", "on"])
def test_a_truth_value_is_no_alpha(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(tmp_path, f'"*.fc2": {{smooth: {value}}}')
    refused(error, "*.fc2", "smooth")


@pytest.mark.parametrize(
    "rule",
    [
        {"precison": "float"},
        {"precision": "int3"},
        {"activations": "never"},
        {"ranges": "max"},
        {"smooth": 2},
        "w4a4",
        None,
        ["float"],
        8,
    ],
)
def test_a_bad_rule_is_named(rule: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.from_mapping({"*.fc1": rule})
    refused(error, "'*.fc1'")


@pytest.mark.parametrize("mapping", [None, [], "float", 3, [{"*": "float"}]])
def test_a_recipe_that_is_no_mapping(mapping: object) -> None:
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        Recipe.from_mapping(mapping)


@pytest.mark.parametrize(
    "text", ["*.fc1: float", "a: [1, 2", "a: b: c", "\ta: float", "a: \x00", "!!python/name:os a"]
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(tmp_path, text)
    refused(error, "recipe.yaml", "not valid YAML")


def test_a_recipe_file_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b'"*": "\xff"')
    for path in (tmp_path / "missing.yaml", tmp_path, latin):
        with pytest.raises(ConfigError) as error:
            Recipe.read(path)
        refused(error, str(path), "cannot be read")


def test_an_empty_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe .* is empty"):
        recipe(tmp_path, "")


def test_schemes() -> None:
    assert list(SCHEMES) == [
        "fp32", "fp16", "w8a8", "llm-int8", "fp8", "w8a16", "w4a16", "w4a8", "mixed",
        "zeroquant", "zeroquant4", "nf4", "fp4", "checkpoint",
    ]  # fmt: skip
    assert get_scheme("w8a8").quantizes
    with pytest.raises(ConfigError) as error:
        get_scheme("w3a3")
    refused(error, "w3a3", "fp32", "w8a8", "kv8")


@pytest.mark.parametrize("base", SCHEMES)
def test_a_cache_may_follow_any_scheme(base: str) -> None:
    plain = get_scheme(base)
    assert (plain.cache_bits, plain.base, plain.calibrates) == (None, base, plain.quantizes)
    for suffix, bits in CACHES.items():
        scheme = get_scheme(base + suffix)
        assert (scheme.name, scheme.base, scheme.cache_bits) == (base + suffix, base, bits)
        assert scheme.calibrates and scheme.labels == plain.labels


@pytest.mark.parametrize("name", ["kv8", "w8a8kv", "w8a8kv2", "w8a8kv8kv8", "w8a8 kv8", "w8a8KV8"])
def test_what_is_no_cache(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown scheme"):
        get_scheme(name)


def test_a_mapping_will_do_for_a_recipe() -> None:
    rules: Any = {"lm_head": "float"}
    assert CompileConfig(recipe=rules).recipe == Recipe.from_mapping(rules)
    rules = {"lm_head": "int3"}
    with pytest.raises(ConfigError, match="recipe rule 'lm_head'"):
        CompileConfig(recipe=rules)
