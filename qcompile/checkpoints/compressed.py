"""compressed-tensors folders, as llm-compressor writes them: integer weights, float activations or
8-bit ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompile.checkpoints import StoredActivation
from qcompile.checkpoints.folder import TensorFolder
from qcompile.checkpoints.layout import in_blocks, unpack_words
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

PARTS: Final = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
_FORMATS: Final = ("pack-quantized", "int-quantized", "naive-quantized")
_BITS: Final = (4, 8)
_CHANNEL: Final = ("channel", "tensor")


def check(settings: Mapping[str, Any]) -> str:
    """What the folder says of itself, in words.

    Raises:
        ModelError: a format, weights or activations that are not read.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError("compressed-tensors: there are no config_groups")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ModelError(f"compressed-tensors: the sparse format {sparsity} is not read")
    words = []
    for group in groups.values():
        layout = group.get("format") or settings.get("format")
        if layout not in _FORMATS:
            hint = ", ".join(_FORMATS)
            raise ModelError(f"compressed-tensors: the format {layout} is not read", hint=hint)
        words.append(_check_group(group))
    return f"compressed-tensors, {', '.join(dict.fromkeys(words))}"


def _check_group(group: Mapping[str, Any]) -> str:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy")
    if kind != "int" or bits not in _BITS:
        raise ModelError(
            f"compressed-tensors: {kind}{bits} weights are not read", hint="int4, int8"
        )
    if strategy not in (*_CHANNEL, "group"):
        raise ModelError(f"compressed-tensors: weight scales by {strategy} are not read")
    if inputs is None:
        return f"W{bits}A16"
    if inputs.get("type", "int") != "int" or inputs.get("num_bits") != 8:
        kind = f"{inputs.get('type')}{inputs.get('num_bits')}"
        raise ModelError(f"compressed-tensors: {kind} activations are not read", hint="int8 are")
    how = (bool(inputs.get("dynamic")), inputs.get("strategy"))
    if how not in ((False, "tensor"), (True, "token")):
        dynamic = "dynamic" if how[0] else "static"
        raise ModelError(
            f"compressed-tensors: {dynamic} activation scales by {how[1]} are not read",
            hint="static by tensor and dynamic by token are",
        )
    return f"W{bits}A8 {'dynamic' if how[0] else 'static'}"


def read(tensors: TensorFolder, name: str, settings: Mapping[str, Any]) -> QuantizedWeight:
    """The weight of the module `name`.

    Raises:
        ModelError: tensors are missing or do not go together.
    """
    weights = _group_of(name, settings)["weights"]
    bits = int(weights["num_bits"])
    scale = tensors.floats(f"{name}.weight_scale")
    packed = f"{name}.weight_packed" in tensors
    if packed:
        shape = tensors.integers(f"{name}.weight_shape", (torch.int32, torch.int64)).tolist()
        words = tensors.integers(f"{name}.weight_packed")
        codes = unpack_words(words, bits, 1)
        if len(shape) != 2 or len(codes) != shape[0] or not 0 <= codes.shape[1] - shape[1] < 32:
            raise ModelError(
                f"{name}: weight_packed does not hold {'×'.join(map(str, shape))} codes"
            )
        codes = codes[:, : shape[1]]
    else:
        signed = tensors.integers(f"{name}.weight", (torch.int8,))
        codes = (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
        if (codes >= 2**bits).any():
            raise ModelError(f"{name}.weight holds codes of more than {bits} bits")
    width, depth = codes.shape
    group = int(weights.get("group_size") or depth) if weights["strategy"] == "group" else depth
    scale = _by_channel(scale, width)
    zeros = np.full(scale.shape, 2 ** (bits - 1), np.uint8)
    if f"{name}.weight_zero_point" in tensors:
        zeros = _zero_points(tensors, name, bits, scale.shape)
    order = None
    if f"{name}.weight_g_idx" in tensors:
        index = tensors.integers(f"{name}.weight_g_idx", (torch.int32, torch.int64))
        if index.min() >= 0:  # −1: not used
            order = np.argsort(index, kind="stable")
            if index.shape != (depth,) or (index[order] != np.arange(depth) // group).any():
                raise ModelError(f"{name}: weight_g_idx does not make groups of {group}")
            codes = codes[:, order]
    return in_blocks(
        name, codes.T, scale.T, zeros.T, bits=bits, group=group, order=order
    )  # fmt: skip


def activation(
    tensors: TensorFolder, name: str, settings: Mapping[str, Any]
) -> StoredActivation | None:
    """How the activation that `name` reads is quantised, or None where it is not.

    Raises:
        ModelError: a static scale is missing or no single number, a zero point no code.
    """
    inputs = _group_of(name, settings).get("input_activations")
    if inputs is None:
        return None
    if inputs.get("dynamic"):
        return StoredActivation("token")
    scale = tensors.floats(f"{name}.input_scale")
    if scale.size != 1 or not scale.item() > 0:
        raise ModelError(f"{name}.input_scale is not one positive number")
    zero = 0
    if f"{name}.input_zero_point" in tensors:
        zero = int(tensors.tensor(f"{name}.input_zero_point").item())
        if not -128 <= zero <= 127:
            raise ModelError(f"{name}.input_zero_point is {zero}, which is no int8")
    return StoredActivation("static", scale.item(), zero)


def _by_channel(scale: Array, width: int) -> Array:
    """[N, groups], of one scale for all too."""
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    result: Array = np.repeat(scale, width, axis=0) if len(scale) == 1 < width else scale
    return result


def _zero_points(
    tensors: TensorFolder, name: str, bits: int, shape: tuple[int, ...]
) -> Array:  # fmt: skip
    """Unsigned, [N, groups]; packed along output channels, or signed as they are.

    Raises:
        ModelError: one is no code.
    """
    stored = tensors.tensor(f"{name}.weight_zero_point")
    if stored.dtype == torch.int32 and tuple(stored.shape) != shape:
        return unpack_words(stored.numpy(), bits, 0)[: shape[0]]
    points = stored.to(torch.int64).numpy().reshape(-1, shape[1]) + 2 ** (bits - 1)
    if points.min() < 0 or points.max() >= 2**bits:
        raise ModelError(f"{name}.weight_zero_point holds values of more than {bits} bits")
    unsigned: Array = np.broadcast_to(points, shape).astype(np.uint8)
    return unsigned


def _group_of(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of `config_groups` whose targets say `name`: itself, a pattern, or its class."""
    groups = settings["config_groups"].values()
    for group in groups:
        for target in group.get("targets") or ():
            if target == name:
                return group  # type: ignore[no-any-return]
    for group in groups:
        for target in group.get("targets") or ():
            if target.startswith("re:") and re.match(target.removeprefix("re:"), name):
                return group  # type: ignore[no-any-return]
    for group in groups:
        if "Linear" in (group.get("targets") or ()):
            return group  # type: ignore[no-any-return]
    raise ModelError(f"compressed-tensors: no group of config_groups is for {name}")
