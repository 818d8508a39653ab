"""Which activations to smooth, by how much, and into what: SmoothQuant (arXiv 2211.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.awq import ALPHAS as AWQ_ALPHAS
from qcompile.awq import awq_errors, awq_scale
from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig, Smooth
from qcompile.decomposition import find_outliers, scale_away, why_these
from qcompile.errors import ConfigError
from qcompile.gradients import Importance
from qcompile.linears import Linear, Site
from qcompile.methods import FOLDED
from qcompile.noise import WeightMoments, output_error
from qcompile.permuting import Permutation, find_permutable, last_places
from qcompile.precision import Choice, Floats
from qcompile.producers import Producer, Refusal, find_producer, inserted_mul
from qcompile.rounding import Rounding, rounding_of

Array = npt.NDArray[Any]

ALPHAS: Final = tuple(np.round(np.arange(0.0, 1.01, 0.1), 2).tolist())
"""The grid of `smooth = auto`; "not at all" is a further candidate."""

PAYS: Final = 0.7
"""A Mul is inserted where it brings the predicted output error to this part or less: it costs one
more pass over the activation."""

_FLOOR: Final = 1e-3
"""max|X_j| · max|W_j| counts as at least this part of its largest: a channel that calibration found
almost dead must not get an extreme scale."""


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """One site's decision.

    Attributes:
        site: its name.
        alpha: migration strength, or None where nothing is folded.
        reason: why this α, or why nothing.
        scale: s, float64 [channels of the site]; ones where nothing is folded.
        producer: what takes 1 / s.
        producer_scale: s as the producer's output channels see it.
        consumers: names of the Linears whose weight rows are multiplied by s.
        kept: int64 [k], channels that stay in float, which s divides out, or None.
        permutation: what puts them last, or None.
    """

    site: str
    alpha: float | None
    reason: str
    scale: Array
    producer: Producer | None = None
    producer_scale: Array | None = None
    consumers: tuple[str, ...] = ()
    kept: Array | None = None
    permutation: Permutation | None = None

    @property
    def places(self) -> Array | None:
        """Where the kept channels are in the graph that the plan was applied to."""
        if self.kept is None or self.permutation is None:
            return self.kept
        width = len(self.scale)
        return np.arange(width - len(self.kept), width)


@dataclasses.dataclass(frozen=True)
class SmoothingPlan:
    """Decisions for all sites: a value, made once, applied by `passes.smooth_quant`."""

    entries: tuple[Smoothing, ...] = ()

    @property
    def folded(self) -> tuple[tuple[Smoothing, Producer, Array], ...]:
        """(entry, producer, scale at the producer) of every site that is smoothed."""
        return tuple(
            (entry, entry.producer, entry.producer_scale)
            for entry in self.entries
            if entry.producer is not None and entry.producer_scale is not None
        )

    def of(self, site: str) -> Smoothing | None:
        """The decision for `site`, or None where there is none."""
        return next((entry for entry in self.entries if entry.site == site), None)

    @property
    def in_place(self) -> SmoothingPlan:
        """The same, all channels left where they are."""
        entries = (dataclasses.replace(entry, permutation=None) for entry in self.entries)
        return SmoothingPlan(tuple(entries))

    def scale_of(self, site: str) -> Array:
        """s of `site`, [channels].

        Raises:
            KeyError: the plan knows no such site.
        """
        entry = self.of(site)
        if entry is None:
            raise KeyError(site)
        return entry.scale


def plan_smoothing(
    sites: list[Site],
    stats: Mapping[str, Stats],
    config: CompileConfig,
    chosen: Mapping[str, Choice],
    replayed: Mapping[str, float | None] | None = None,
    importance: Importance | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
    floats: Floats = "float32",
) -> SmoothingPlan:
    """Decide α per site.

    Args:
        sites: in graph order.
        stats: by site name, with histograms; of sites that are going to be INT8 or are AWQ's.
        config: `smooth`, the method of weights alone, and the recipe.
        chosen: which Linears are going to be INT8; a site without any is left alone, but where
            weights alone are rounded by AWQ.
        replayed: α by site, of an earlier plan, in place of `smooth`.
        importance: of the channels of every Linear and site; None: all outputs count alike.
        kept: channels that stay in float by site, of an earlier plan, in place of a search.
        floats: the type of what stays in float.

    Raises:
        ConfigError: `kept` has one of several channels that are made as one, and not the others.
    """
    linears = [linear for site in sites for linear in site.linears]
    # What later folds do to a weight's output columns, by Linear. Sites are planned last to first:
    # then the columns of a site's consumers are already as they will be.
    columns: dict[str, Array] = {}
    entries: list[Smoothing] = []
    for site in reversed(sites):
        smooth = _smooth_of(site, config, replayed or {})
        forced = site.name in (replayed or {})
        moments = partial(_moments, site, columns, importance)
        rounding = _folded_rounding(site, chosen, config)
        if any(chosen[linear.name].label == "llm-int8" for linear in site.linears):
            given = (kept or {}).get(site.name)
            entry = _decomposed(site, linears, stats[site.name], config, columns, given, floats)
        else:
            entry = _plan_site(
                site, linears, stats.get(site.name), smooth, forced, columns, chosen, moments,
                rounding,
            )  # fmt: skip
        entries.append(entry)
        producer = entry.producer
        if producer is not None and producer.kind == "linear":
            assert entry.producer_scale is not None
            columns[producer.name] = entry.producer_scale
    return SmoothingPlan(tuple(reversed(entries)))


def _plan_site(
    site: Site,
    linears: list[Linear],
    stats: Stats | None,
    smooth: Smooth,
    forced: bool,
    columns: Mapping[str, Array],
    chosen: Mapping[str, Choice],
    moments: Callable[[], WeightMoments],
    rounding: Rounding | None,
) -> Smoothing:
    nothing = Smoothing(site.name, None, "", np.ones(site.channels))
    planned = [linear for linear in site.linears if chosen[linear.name].mode is not None]
    if not planned and rounding is None:
        return dataclasses.replace(nothing, reason="not quantised")
    assert stats is not None
    if smooth == "off":
        return dataclasses.replace(nothing, reason="off, as asked")
    producer = find_producer(site, linears)
    if isinstance(producer, Producer) and producer.name in columns:
        producer = Refusal(f"{producer.name} already takes another site's scale")
    refusal = producer.reason if isinstance(producer, Refusal) else None
    if isinstance(producer, Refusal):
        if not producer.insertable:
            return dataclasses.replace(nothing, reason=f"refused: {producer.reason}")
        producer = inserted_mul(site)
    weights = moments()
    groups = producer.channels
    candidates: dict[float | None, Array] = {None: np.ones(site.channels)}
    if rounding is not None:
        for alpha in AWQ_ALPHAS if smooth == "auto" else (float(smooth),):
            candidates[alpha] = awq_scale(stats, alpha, groups)
        errors = awq_errors(stats, weights.weights, candidates, rounding)
    else:
        choice = chosen[planned[0].name]
        assert choice.mode is not None
        for alpha in ALPHAS if smooth == "auto" else (float(smooth),):
            candidates[alpha] = smoothing_scale(stats.absmax, weights.largest, alpha, groups)
        predict = partial(
            output_error, stats, weights, activations=choice.mode, fp8=choice.precision == "fp8"
        )
        errors = {a: predict(s) for a, s in candidates.items()}
    alpha_best = min(errors, key=lambda a: errors[a]) if smooth == "auto" else float(smooth)
    if alpha_best is None:
        return dataclasses.replace(nothing, reason="smoothing would not lessen the output error")
    gain = errors[alpha_best] / errors[None] if errors[None] > 0 else 1.0
    predicted = f"{gain:.2f} of the unsmoothed"
    reason = f"least predicted output error, {predicted}" if smooth == "auto" else "as asked"
    if refusal is not None:
        if gain > PAYS and not forced:
            return dataclasses.replace(
                nothing, reason=f"refused: {refusal}; a Mul would not pay (error {predicted})"
            )
        reason = f"a Mul was inserted ({refusal}): error {predicted}"
    scale = candidates[alpha_best]
    producer_scale = np.ones(producer.width)
    producer_scale[groups] = scale
    return Smoothing(
        site=site.name,
        alpha=alpha_best,
        reason=reason,
        scale=scale,
        producer=producer,
        producer_scale=producer_scale,
        consumers=tuple(linear.name for linear in site.linears),
    )


def _decomposed(
    site: Site,
    linears: list[Linear],
    stats: Stats,
    config: CompileConfig,
    columns: Mapping[str, Array],
    given: Sequence[int] | None,
    floats: Floats,
) -> Smoothing:
    """Outlier channels divided out of the way of the others, for `qcompile.decomposition`."""
    nothing = Smoothing(site.name, None, "", np.ones(site.channels))
    producer = find_producer(site, linears)
    if isinstance(producer, Producer) and producer.name in columns:
        producer = Refusal(f"{producer.name} already takes another site's scale")
    how = "divided out where they are made"
    if isinstance(producer, Refusal):
        if not producer.insertable:
            why = f"refused: {producer.reason}, so that all are in int8 per token"
            return dataclasses.replace(nothing, reason=why)
        how = f"divided out by a Mul of their own ({producer.reason})"
        producer = inserted_mul(site)
    groups = producer.channels
    if given is None:
        outliers = find_outliers(stats, groups, config)
        found = why_these(stats, outliers, config)
    else:
        outliers = np.unique(np.array(given, np.int64))
        others = np.setdiff1d(np.flatnonzero(np.isin(groups, groups[outliers])), outliers)
        if len(others):
            raise ConfigError(
                f"channels of {site.name} that several heads share stay in float together: the "
                f"plan leaves {others[0]} out"
            )
        found = f"{len(outliers)} of {site.channels} channels stay in float, as the plan has it"
    if not len(outliers):
        return dataclasses.replace(nothing, reason=f"{found}, so that all are in int8 per token")
    rows = np.abs(_stacked(site, columns)).max(axis=1) if floats == "float16" else None
    scale = scale_away(stats, outliers, groups, rows)
    producer_scale = np.ones(producer.width)
    producer_scale[groups] = scale
    makers = find_permutable(site, linears)
    order = None if isinstance(makers, str) else last_places(site.channels, outliers)
    where = f"gathered from their places ({makers}), " if isinstance(makers, str) else (
        "sliced, since what makes them puts them last, "
    )  # fmt: skip
    return Smoothing(
        site=site.name,
        alpha=None,
        reason=f"{found}, {where}{how}",
        scale=scale,
        producer=producer,
        producer_scale=producer_scale,
        consumers=tuple(linear.name for linear in site.linears),
        kept=outliers,
        permutation=None
        if order is None or isinstance(makers, str)
        else Permutation(order, makers),
    )


def _folded_rounding(
    site: Site, chosen: Mapping[str, Choice], config: CompileConfig
) -> Rounding | None:
    """How weights of `site` are rounded, where it is by AWQ and no activation is quantised."""
    if any(chosen[linear.name].mode is not None for linear in site.linears):
        return None
    found = [rounding_of(x.name, chosen[x.name].precision, config) for x in site.linears]
    return next((r for r in found if r is not None and r.method in FOLDED), None)


def _moments(
    site: Site, columns: Mapping[str, Array], importance: Importance | None
) -> WeightMoments:
    """Of all consumers side by side, as later folds leave their columns."""
    weights = _stacked(site, columns)
    if importance is None or site.name not in importance.inputs:
        return WeightMoments.of(weights)
    parts = []
    for linear in site.linears:
        counts = importance.outputs.get(linear.name, np.zeros(linear.out_features))
        divisor = columns.get(linear.name)
        # An output that was divided by s moves the model s times as much.
        parts.append(counts if divisor is None else counts * np.square(divisor))
    outputs = np.concatenate(parts)
    if not outputs.any():
        return WeightMoments.of(weights)
    mean = float(outputs.mean())
    return WeightMoments.of(weights, outputs / mean, importance.inputs[site.name] / mean)


def _smooth_of(site: Site, config: CompileConfig, replayed: Mapping[str, float | None]) -> Smooth:
    if site.name in replayed:
        alpha = replayed[site.name]
        return "off" if alpha is None else alpha
    # Those of its Linears that are quantised agree: `find_options` has checked.
    rules = [config.recipe.rule_for(linear.name).smooth for linear in site.linears]
    return next((rule for rule in rules if rule is not None), config.smooth)


def smoothing_scale(
    activation: Array, weight: Array, alpha: float, groups: npt.NDArray[np.int64]
) -> Array:
    """s_j = max|X_j|^α / max|W_j|^(1−α), equation 4 of the paper, its geometric mean set to one.

    Args:
        activation: max|X_j|, [channels].
        weight: max over outputs and consumers of |W_j|, [channels].
        alpha: migration strength in [0, 1].
        groups: [channels]; channels of one number share one scale (grouped-query attention).
    """
    x, w = _share(activation, groups), _share(weight, groups)
    # The same as x^α / w^(1−α), but the floor is on the product: it does not change when a channel
    # is scaled up in one and down in the other, which is what an outlier channel is.
    product = x * w
    product = np.maximum(product, _FLOOR * product.max() if product.max() > 0 else 1.0)
    unread = w <= 1e-6 * w.max()
    scale = product**alpha / np.where(unread, 1.0, w)
    if not unread.all():
        scale[unread] = np.median(scale[~unread])
    scale = scale / np.exp(np.log(scale).mean())
    result: Array = np.clip(scale, 1e-4, 1e4)
    return result


def _share(values: Array, groups: npt.NDArray[np.int64]) -> Array:
    """The largest value of each group, at every member."""
    top = np.zeros(int(groups.max()) + 1)
    np.maximum.at(top, groups, values)
    result: Array = top[groups]
    return result


def _stacked(site: Site, columns: Mapping[str, Array]) -> Array:
    """All consumers' weights side by side, [K, ΣN], as later folds leave their columns."""
    parts = []
    for linear in site.linears:
        tensor = linear.weight.const_value
        assert tensor is not None
        weight = tensor.numpy()
        divisor = columns.get(linear.name)
        parts.append(weight if divisor is None else weight / divisor.astype(np.float32))
    return np.concatenate(parts, axis=1)
