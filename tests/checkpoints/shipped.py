"""The weights that an artifact ships, read from its graph alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.float4 import TABLES


def shipped_weights(folder: Path) -> dict[str, np.ndarray]:
    """The float32 weight [out, in] of every MatMulNBits and MatMulBnb4 of an artifact, by the op's
    name.

    Input channels are put back where a Gather before the op takes them from.
    """
    found = {}
    graph = ir.load(folder / "model.onnx").graph
    for node in graph:
        if node.op_type == "MatMulBnb4":
            found[str(node.name)] = _of_table(node)
        if node.op_type == "MatMulNBits":
            found[str(node.name)] = _weight(node)
            offset = _array(graph.initializers.get(f"{node.name}.weight_offset"))
            if offset is not None:
                size = node.attributes.get_int("block_size", 0)
                found[str(node.name)] += np.repeat(offset.T, size, axis=1)
    return found


def _weight(node: ir.Node) -> np.ndarray:
    depth, width, bits, block = (
        node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size")
    )
    packed, scale = (_array(node.inputs[at]) for at in (1, 2))
    assert packed is not None and scale is not None
    blocks = -(-depth // block)
    codes = _codes(packed.reshape(width, blocks, -1), bits)[..., :block]
    zero = np.full((width, blocks), 2 ** (bits - 1))
    points = _array(node.inputs[3]) if len(node.inputs) > 3 else None
    if points is not None:
        zero = _codes(points.reshape(width, -1), bits)[:, :blocks]
    values = (codes.astype(np.float32) - zero[..., None].astype(np.float32)) * (
        scale.reshape(width, blocks, 1)
    )
    weight: np.ndarray = values.reshape(width, -1)[:, :depth]
    gather = node.inputs[0].producer() if node.inputs[0] is not None else None
    if gather is not None and gather.op_type == "Gather" and gather.attributes["axis"].value == -1:
        order = _array(gather.inputs[1])
        assert order is not None
        back = np.empty_like(weight)
        back[:, order] = weight
        weight = back
    return weight


def _of_table(node: ir.Node) -> np.ndarray:
    depth, width, block, kind = (
        node.attributes.get_int(name, 0) for name in ("K", "N", "block_size", "quant_type")
    )
    packed, scale = (_array(node.inputs[at]) for at in (1, 2))
    assert packed is not None and scale is not None
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, block)
    weight: np.ndarray = TABLES["nf4" if kind else "fp4"][codes] * scale[:, None]
    return weight.reshape(width, depth)


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _array(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value else None
