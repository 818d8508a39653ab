"""Module paths: the names by which recipes match and reports print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

MODULE_PATH_KEY: Final = "qcompile.module_path"
PART_OF_KEY: Final = "qcompile.part_of"
"""The fused op that a node was a part of, where it makes no sense to quantise it apart."""
_SCOPES_KEY: Final = "pkg.torch.onnx.name_scopes"
_BESIDE: Final = " + "


def module_path(node: ir.Node) -> str:
    """The dotted path of the module that `node` came from, e.g. ``model.layers.0.mlp.fc1``.

    Read, in this order, from what a pass recorded, from the torch exporter's name scopes, and from
    a node name in the style of torch's older exporter (``/model/layers.0/mlp/fc1/MatMul``).
    Without any of these it is the node's own name.
    """
    recorded = node.metadata_props.get(MODULE_PATH_KEY)
    if recorded:
        return recorded
    scopes = node.metadata_props.get(_SCOPES_KEY)
    if scopes:
        try:
            # The last scope is the fx node itself, the one before it the innermost module.
            inner = json.loads(scopes.replace("'", '"'))[-2]
        except (ValueError, IndexError):
            inner = ""
        if inner:
            return str(inner)
    name = node.name or ""
    if name.startswith("/"):
        # The last part is the op; a module's own parameters may make it the only one.
        return ".".join(name.strip("/").split("/")[:-1]) or name.strip("/")
    return name


def set_module_path(node: ir.Node, path: str) -> None:
    """Record `path` on `node`, where it survives every later rewrite that keeps metadata."""
    node.metadata_props[MODULE_PATH_KEY] = path


def joined_name(names: Sequence[str]) -> str:
    """The name of one node that does what several did; `apart` takes it apart again."""
    return _BESIDE.join(names)


def apart(name: str) -> list[str]:
    """The names that the node `name` stands for: its own, and those of what was joined in it."""
    return list(dict.fromkeys([name, *name.split(_BESIDE)]))


def join_paths(paths: list[str]) -> str:
    """One name for several modules: ``a.b.{q,k,v}`` for ``a.b.q``, ``a.b.k`` and ``a.b.v``."""
    unique = list(dict.fromkeys(paths))
    if len(unique) == 1:
        return unique[0]
    split = [path.split(".") for path in unique]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({p[shared] for p in split}) == 1:
        shared += 1
    prefix = ".".join(split[0][:shared])
    rest = ",".join(".".join(parts[shared:]) for parts in split)
    return f"{prefix}.{{{rest}}}" if prefix else f"{{{rest}}}"


def unique_name(name: str, taken: set[str]) -> str:
    """`name`, numbered where it is among `taken`, to which it is added.

    A module that is called twice gives two ops of one name; reports must tell them apart.
    """
    found, call = name, 0
    while found in taken:
        call += 1
        found = f"{name}#{call}"
    taken.add(found)
    return found
