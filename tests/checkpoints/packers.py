"""Small checkpoints in the formats of other libraries, packed as their specifications say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from qcompile.float4 import TABLES, Float4

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Packed:
    """A folder, and the float32 weight [out, in] that the codes of each module stand for."""

    path: Path
    weights: dict[str, np.ndarray]


def tiny_llama(**changes: Any) -> Any:
    """Two layers of 64 channels, random weights."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(sizes | changes))
    model: Any = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        # Norms that are not all ones, weights that every format holds in float16.
        spread = 1.0 if "norm" in name else 0.2
        parameter.data = (parameter.data + spread * torch.randn(parameter.shape)).half().float()
    return model.eval()


def save(model: Any, folder: Path, settings: dict[str, Any], pack: Pack) -> Packed:
    """Write `model` with every Linear but the head packed, in float16 otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    weights = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for name, module in linears.items():
        parts, weights[name] = pack(module.weight.detach().numpy())
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in linears:
            tensors[name] = tensor.half().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": settings}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return Packed(folder, weights)


Pack = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
"""Of a weight [out, in]: the tensors in its place, and the weight that they stand for."""


def affine(
    weight: np.ndarray, index: np.ndarray, bits: int, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], float16 scales and zero points [groups, out] of the groups in `index`."""
    groups = int(index.max()) + 1
    columns = weight.T
    top = 2**bits - 1
    low = np.stack([np.minimum(columns[index == g].min(axis=0), 0) for g in range(groups)])
    high = np.stack([np.maximum(columns[index == g].max(axis=0), 0) for g in range(groups)])
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 1, top).astype(np.int64)
    if symmetric:
        zero[:] = 2 ** (bits - 1)
    codes = np.rint(columns / scale.astype(np.float32)[index]) + zero[index]
    return np.clip(codes, 0, top).astype(np.int64), scale, zero


def dequantized(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """The float32 weight [out, in]."""
    weight = (codes - zero[index]).astype(np.float32) * scale.astype(np.float32)[index]
    return np.ascontiguousarray(weight.T)


def words(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Codes put into int32 one after another along `axis`, the first in the lowest bits."""
    lines = np.moveaxis(codes, axis, -1)
    lines = np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, -lines.shape[-1] % (32 // bits))])
    made = np.zeros((*lines.shape[:-1], lines.shape[-1] * bits // 32), np.uint32)
    for at in range(lines.shape[-1]):
        word, place = divmod(at * bits, 32)
        made[..., word] |= (lines[..., at].astype(np.uint32)) << np.uint32(place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(made, -1, axis)).view(np.int32))


def gptq(
    folder: Path,
    model: Any,
    *,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    version: int = 1,
) -> Packed:
    """A folder of GPTQ: codes packed along input channels, zero points along output channels."""
    order = np.random.default_rng(3)

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        depth = weight.shape[1]
        index = np.arange(depth) // (group if group > 0 else depth)
        if act_order:
            index = order.permutation(index)
        codes, scale, zero = affine(weight, index, bits, symmetric=symmetric)
        parts = {
            "qweight": words(codes, bits, 0),
            "qzeros": words(zero - (1 if version == 1 else 0), bits, 1),
            "scales": torch.from_numpy(scale),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return parts, dequantized(codes, scale, zero, index)

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return save(model, folder, settings, pack)


def awq(folder: Path, model: Any, *, group: int = 32) -> Packed:
    """A folder of AWQ's gemm layout: output channels 0, 2, 4, 6, 1, 3, 5, 7 in a word."""
    places = [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(codes: np.ndarray) -> torch.Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., places].reshape(codes.shape), 4, 1)

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        index = np.arange(weight.shape[1]) // group
        codes, scale, zero = affine(weight, index, 4, symmetric=False)
        parts = {
            "qweight": mixed(codes),
            "qzeros": mixed(zero),
            "scales": torch.from_numpy(scale),
        }
        return parts, dequantized(codes, scale, zero, index)

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
    }
    return save(model, folder, settings, pack)


def float4(
    folder: Path, model: Any, *, kind: Float4 = "nf4", block: int = 64, double: bool = False
) -> Packed:
    """A folder of bitsandbytes' four bits: blocks of a weight's values in the order of its rows."""
    rng = np.random.default_rng(4)

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "shape": weight.shape}
        flat = np.pad(weight.reshape(-1), (0, -weight.size % block)).reshape(-1, block)
        scale = np.abs(flat).max(axis=1)
        parts = {"quant_map": torch.tensor(TABLES[kind])}
        if double:
            # Any table: the folder carries its own.
            table = np.sort(rng.normal(size=256)).astype(np.float32)
            codes = rng.integers(0, 256, scale.size).astype(np.uint8)
            largest = rng.uniform(0.01, 0.02, -(-scale.size // 16)).astype(np.float32)
            offset = 0.25
            state |= {"nested_blocksize": 16, "nested_offset": offset, "nested_dtype": "float32"}
            scale = table[codes] * np.repeat(largest, 16)[: scale.size] + np.float32(offset)
            parts |= {"absmax": torch.from_numpy(codes)}
            parts |= {"nested_absmax": torch.from_numpy(largest)}
            parts |= {"nested_quant_map": torch.from_numpy(table)}
        else:
            parts["absmax"] = torch.from_numpy(scale)
        nearest = np.abs((flat / scale[:, None])[..., None] - TABLES[kind]).argmin(axis=-1)
        restored = (TABLES[kind][nearest] * scale[:, None]).reshape(-1)[: weight.size]
        codes = nearest.reshape(-1)[: weight.size].astype(np.uint8)
        words = json.dumps(state).encode()
        parts[f"quant_state.bitsandbytes__{kind}"] = torch.tensor(list(words), dtype=torch.uint8)
        tensors = {f"weight.{part}": tensor for part, tensor in parts.items()}
        tensors["weight"] = torch.from_numpy((codes[::2] << 4) | codes[1::2]).reshape(-1, 1)
        return tensors, restored.reshape(weight.shape)

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
    }
    return save(model, folder, settings, pack)


def llm_int8(folder: Path, model: Any) -> Packed:
    """A folder of bitsandbytes' eight bits."""

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        largest = np.abs(weight).max(axis=1)
        codes = np.rint(weight * (127 / largest[:, None])).astype(np.int8)
        parts = {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(largest),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return parts, codes * (largest / np.float32(127))[:, None]

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
    return save(model, folder, settings, pack)
