"""Limits that the user set: whether a model can have them, and whether an artifact keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompile.cache import PAST
from qcompile.calibration.tokens import check_positions
from qcompile.config import CompileConfig
from qcompile.costs import open_costs
from qcompile.edge.options import EdgeOptions
from qcompile.errors import ConfigError, ModelError, check_reachable
from qcompile.hub import model_folder
from qcompile.methods import PER_CHANNEL
from qcompile.planfile import PlanFile
from qcompile.precision import PrecisionPlan
from qcompile.schemes import Scheme, check_method, rounds_alike
from qcompile.shapes import check_lengths
from qcompile.targets import Target
from qcompile.traced import LOGITS, POSITIONS, TracedModel
from qcompile.verify import Verification

_EDGE_TAKES: Final = (("activations", "static"), ("objective", "scheme"))
"""Options that say what target onnx-edge does anyway."""


def check_plan_files(scheme: Scheme, config: CompileConfig) -> None:
    """Find bad paths, and a plan of another scheme, before anything is computed.

    Raises:
        ConfigError: a plan to replay cannot be read, or would be rounded otherwise than it was
            made, or a file cannot be written where it should.
    """
    if config.plan_in is not None:
        made, asked = PlanFile.read(config.plan_in).scheme, scheme.by(config.method)
        if not rounds_alike(made, asked):
            raise ConfigError(
                f"{config.plan_in} was made under scheme {made}, and this is {asked}",
                hint=f"--scheme {made}",
            )
    for path in (config.plan_out, config.costs):
        if path is not None:
            check_reachable(path, ConfigError)
            check_reachable(path.parent, ConfigError)
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder")
    if config.costs is not None and config.costs.exists():
        open_costs(config.costs, {})


def check_target(target: Target, scheme: Scheme, config: CompileConfig) -> None:
    """Refuse what `target` cannot do, before anything is computed.

    Raises:
        ConfigError: no such scheme there, nothing to compile for, or a choice that would have to
            be measured and cannot.
    """
    if scheme.base not in target.schemes:
        raise ConfigError(
            f"target {target.name} has no scheme {scheme.base}",
            hint="one of " + ", ".join(target.schemes),
        )
    lacking = target.scheme_obstacle(scheme.base)
    if lacking is not None:
        raise ConfigError(f"scheme {scheme.base}: {lacking}")
    if config.cache and (scheme.floats or target.floats) not in target.caches:
        raise ConfigError(
            f"scheme {scheme.name}: target {target.name} has attention with a cache in "
            f"{' and '.join(target.caches) or 'no type'}"
        )
    if scheme.cache_bits is not None:
        if config.cache is False:
            raise ConfigError(
                f"scheme {scheme.name} is for a model with a cache", hint=f"or {scheme.base}"
            )
        missing = target.cache_obstacle(scheme.cache_bits)
        if missing is not None:
            raise ConfigError(f"scheme {scheme.name}: {missing}")
    if config.last_logits and not config.cache and scheme.cache_bits is None:
        raise ConfigError("last_logits are for generating, so they want a cache")
    if config.format == "ort" and target.ort_style is None:
        raise ConfigError(
            f"format ort is for reduced builds of ONNX Runtime, and target {target.name} runs by "
            "operators of its own, which no such build has",
            hint="leave --format ort out",
        )
    if config.equalize and not target.equalizes:
        raise ConfigError(
            f"target {target.name} gives each output channel a scale and smooths what Linears "
            "read, so equalize has no effect",
            hint="--smooth moves scales there",
        )
    if config.equalize and not scheme.quantizes:
        raise ConfigError(f"scheme {scheme.name} quantises nothing, so equalize has no effect")
    if config.bias_correction and (scheme.keeps or not scheme.quantizes):
        what = "keeps its codes as they are" if scheme.keeps else "quantises nothing"
        raise ConfigError(f"scheme {scheme.name} {what}, so bias_correction has no effect")
    if target.obstacle is not None:
        raise ConfigError(target.obstacle)
    if scheme.method is not None and config.method not in (None, scheme.method):
        raise ConfigError(f"scheme {scheme.name} and method {config.method} contradict each other")
    in_blocks = scheme.in_blocks or any(rule.in_blocks for _, rule in config.recipe.rules)
    if config.method is not None and not in_blocks:
        check_method(scheme, config.method)
    for field in ("method", "block_size", "symmetric"):
        asked = getattr(config, field) != CompileConfig.model_fields[field].default
        sized = field == "block_size" and bool(scheme.labels) and not scheme.keeps
        also = (field == "symmetric" and scheme.modes) or (field == "method" and scheme.methods)
        if asked and not (in_blocks or sized or also):
            why = "rounds nothing" if scheme.keeps else "has no weights in blocks"
            raise ConfigError(f"scheme {scheme.name} {why}, so {field} has no effect")
    if scheme.quantizes and not scheme.modes and not config.recipe.codes:
        why = f"scheme {scheme.name} quantises no activations"
        if scheme.keeps:
            why = "a checkpoint that is quantised already says how activations are"
        for field in ("activations", "smooth", "ranges"):
            if getattr(config, field) != CompileConfig.model_fields[field].default:
                raise ConfigError(f"{why}, so {field} has no effect")
    if scheme.labels == ("llm-int8",) and not config.recipe.codes:
        for field in ("activations", "smooth", "ranges"):
            if getattr(config, field) != CompileConfig.model_fields[field].default:
                raise ConfigError(
                    f"scheme {scheme.name} has activations per token, and outliers in float in the "
                    f"place of smoothing, so {field} has no effect"
                )
    _check_outliers(scheme, config)
    if scheme.keeps:
        chooses = [name for name in ("plan_in", "costs") if getattr(config, name) is not None]
        chooses += ["recipe"] if config.recipe.rules else []
        chooses += [config.objective] if config.objective in ("size", "accuracy") else []
        if chooses:
            raise ConfigError(
                f"a checkpoint that is quantised already leaves nothing to choose, so {chooses[0]} "
                "has no effect"
            )
    asked = [name for name in config.plans if name not in ("plan_in", "plan_out")]
    if config.objective not in ("latency", "scheme"):
        asked.append(f"objective {config.objective}")
    if config.costs is not None and not target.runs_here and not config.costs.exists():
        raise ConfigError(
            f"there is no {config.costs}, and its times cannot be taken here",
            hint="compile once with the same --costs file and --shapes on that machine",
        )
    if config.costs is None and target.unmeasured is not None and asked:
        raise ConfigError(f"{asked[0]} wants measured times: {target.unmeasured}")
    if config.min_speedup is not None and config.costs is None and not target.runs_here:
        raise ConfigError(
            "min_speedup is a limit on the whole model, and the stored times are of Linears alone",
            hint="--costs with a file of times that were taken on such a machine",
        )


def check_seq_len(source: object, calibration: object, config: CompileConfig) -> None:
    """Refuse samples and shapes of more tokens than the model has positions, before it is traced
    for minutes.

    What cannot be told from a model's ``config.json`` is told later.

    Raises:
        ConfigError: they are longer.
        ModelError: a hub id whose configuration cannot be had.
    """
    arrays = calibration is not None and not (
        isinstance(calibration, str | Path) and Path(calibration).suffix in (".txt", ".jsonl")
    )
    if not isinstance(source, str | Path):
        return
    path = model_folder(str(source)) / "config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return  # said by what reads it
    found = [settings.get(n) for n in POSITIONS] if isinstance(settings, dict) else []
    positions = next((n for n in found if isinstance(n, int) and n > 0), None)
    check_lengths(config.shapes, positions)
    if not arrays and not config.edge.shapes:
        check_positions(config.seq_len, positions, Path(source).name)


def _check_outliers(scheme: Scheme, config: CompileConfig) -> None:
    """Refuse to say which channels stay in float where all are codes.

    Raises:
        ConfigError: neither the scheme nor the recipe keeps any.
    """
    rules = [rule for _, rule in config.recipe.rules]
    decomposed = "llm-int8" in scheme.labels or any(r.precision == "llm-int8" for r in rules)
    methods = {scheme.method or config.method, *(rule.method for rule in rules)}
    if config.outlier_threshold is not None and not decomposed:
        raise ConfigError(
            f"scheme {scheme.name} looks for no outliers, so outlier_threshold has no effect"
        )
    if config.outlier_share is not None and not decomposed and "spqr" not in methods:
        raise ConfigError(
            f"scheme {scheme.name} keeps no channels in float, so outlier_share has no effect"
        )


def incomparable(target: Target, scheme: Scheme, config: CompileConfig) -> str | None:
    """Why there is nothing to compare the compiled model's speed with, or None."""
    if scheme.quantizes or not config.cache or "float32" in target.caches:
        return None
    return (
        f"speed was not measured: target {target.name} has attention with a cache in "
        f"{' and '.join(target.caches)} only, so that float32 does not run there"
    )


def ragged(plan: PrecisionPlan) -> list[str]:
    """What to know of a plan by which a text depends on what is computed together with it."""
    paths = [site.name for site in plan.sites if site.activation.mode == "dynamic"]
    if not paths:
        return []
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: dynamic activations "
        "have one scale for all that is computed together, so that a text depends on the others of "
        "its batch and on padding; --activations static or token does without"
    ]


def check_limits(config: CompileConfig, model: TracedModel) -> None:
    """Refuse what means nothing for `model`.

    Raises:
        ConfigError: a cache where nothing is generated, a limit on KL where the outputs are no
            logits.
    """
    if config.cache and model.kind != "text-generation":
        raise ConfigError(
            f"a cache is for a causal language model, and this one does {model.task}",
            hint="leave --cache out",
        )
    if config.max_kl is not None and model.kind not in LOGITS:
        raise ConfigError(
            f"max_kl is a limit on logits, and the outputs of a {model.task} model are none",
            hint="--objective accuracy with --min-speedup trades the same way",
        )


def check_cache_bits(path: Path, bits: int) -> None:
    """Refuse codes of `bits` for the heads of the float graph in `path`, one with a cache.

    Raises:
        ModelError: heads of an odd size, where two channels share a byte.
    """
    past = next(v for v in ir.load(path).graph.inputs if v.name == PAST.format(0, "key"))
    size = past.shape[-1] if past.shape is not None else None
    if bits == 4 and isinstance(size, int) and size % 2:
        raise ModelError(
            f"the model cannot have a cache of {bits} bits: its heads have {size} channels, "
            "and two share a byte",
        )


def broken_limits(
    config: CompileConfig, findings: Verification, graph: ir.Model, *, here: bool = True
) -> list[str]:
    """Limits of `config` that do not hold as measured, in sentences.

    Args:
        findings: of the verification.
        graph: what was emitted.
        here: whether the limit on speed is for this machine.
    """
    problems = []
    kl = findings.accuracy.get("kl")
    if config.max_kl is not None and kl is not None and kl > config.max_kl:
        problems.append(f"KL is {kl:.3g} on held-back data, above max_kl {config.max_kl:g}")
    for speed in findings.speed if config.min_speedup is not None and here else ():
        assert config.min_speedup is not None
        if speed.ratio < config.min_speedup:
            problems.append(
                f"{speed.ratio:.2f} times float's speed at {speed.shape}, "
                f"below min_speedup {config.min_speedup:g}"
            )
    if config.max_size is not None:
        tensors = (value.const_value for value in graph.graph.initializers.values())
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if size > config.max_size:
            problems.append(f"the weights take {size} bytes, above max_size {config.max_size}")
    return problems


def check_edge(target: Target, config: CompileConfig) -> None:
    """Refuse options of `onnx-edge` for another target, and others' options for it.

    Raises:
        ConfigError: naming the first of them.
    """
    if not target.tensors:
        if config.opset != CompileConfig.model_fields["opset"].default:
            raise ConfigError(f"opset {config.opset} is for target onnx-edge; {target.name} has 23")
        plain = EdgeOptions()
        for field in EdgeOptions.model_fields:
            if getattr(config.edge, field) != getattr(plain, field):
                raise ConfigError(f"{field} is for target onnx-edge, and not for {target.name}")
        return
    for field in (
        *("activations", "objective", "max_kl", "min_speedup", "costs", "plan_in"),
        *("plan_out", "shapes", "cache", "last_logits", "block_size", "symmetric"),
    ):
        given, default = getattr(config, field), CompileConfig.model_fields[field].default
        if given != default and (field, given) not in _EDGE_TAKES:
            raise ConfigError(f"{field} has no effect on target {target.name}")
    for _, rule in config.recipe.rules:
        said = rule.model_dump(exclude_none=True)
        rounds = said.pop("method", None) in PER_CHANNEL and said in ({}, {"precision": "w8a8"})
        if not rounds and said != {"precision": "float"}:
            raise ConfigError(
                f"a recipe for target {target.name} says only which modules stay in float, and by "
                "which method others are rounded: w8a8:gptq"
            )
