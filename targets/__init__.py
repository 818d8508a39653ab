"""Targets, one file each, found by entry point: `pyproject.toml` lists ours, others list theirs."""

from __future__ import annotations

from importlib.metadata import entry_points

from qcompile.targets.base import Capability, Target

from qcompile.errors import ConfigError

__all__ = ["Capability", "Target", "available", "get_target"]

_GROUP = "qcompile.targets"


def available() -> dict[str, type[Target]]:
    """Every installed target by name."""
    return {entry.name: entry.load() for entry in entry_points(group=_GROUP)}


def get_target(spec: str) -> Target:
    """The target named by ``name`` or ``name:variant``.

    Raises:
        ConfigError: no such target, or no such variant of it.
    """
    name, _, variant = spec.partition(":")
    targets = available()
    if name not in targets:
        raise ConfigError(
            f"unknown target {name!r}", hint="one of " + ", ".join(sorted(targets) or ["(none)"])
        )
    return targets[name](variant)
