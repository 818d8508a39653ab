"""``genai_config.json``: what onnxruntime-genai reads to generate with an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from qcompile.cache import PAST, PRESENT, is_past
from qcompile.errors import ModelError

CONFIG: Final = "genai_config.json"
_UNLIMITED: Final = 2048
"""Tokens to reserve memory for where a model takes any number."""
_CHOSEN: Final = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def genai_config(
    graph: ir.Graph,
    folder: Path,
    max_length: int | None,
    *,
    provider: str | None = None,
    library: str | None = None,
) -> dict[str, Any]:
    """The configuration of a graph with a cache.

    Args:
        graph: as it was emitted.
        folder: may hold ``config.json`` and ``generation_config.json``, which name the special
            tokens and how to sample.
        max_length: the most tokens in a sequence; None: the model does not say.
        provider: the execution provider as onnxruntime-genai names it, ``cuda``; None: the CPU.
        library: of custom operators, a file in `folder`.
    """
    given = model_settings(folder)
    inputs = {str(value.name): value for value in graph.inputs}
    past = inputs[PAST.format(0, "key")].shape
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    heads = attention.attributes.get_int("num_heads", 0)
    logits = next(value.shape for value in graph.outputs if value.name == "logits")
    assert past is not None and logits is not None
    size, end = int(past[3]), end_tokens(folder)  # type: ignore[arg-type]
    length = max_length or _UNLIMITED
    tokens = {
        name: given[name]
        for name in ("bos_token_id", "pad_token_id")
        if isinstance(given.get(name), int)
    }
    tokens.setdefault("pad_token_id", end[0] if end else 0)
    return {
        "model": {
            **tokens,
            "eos_token_id": end[0] if len(end) == 1 else end,
            "context_length": length,
            "type": "decoder",
            "vocab_size": int(logits[-1]),  # type: ignore[arg-type]
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "provider_options": [{provider: {}}] if provider else [],
                    **({"custom_ops_library": library} if library else {}),
                },
                "head_size": size,
                "hidden_size": given.get("hidden_size", given.get("n_embd", heads * size)),
                "num_attention_heads": heads,
                "num_hidden_layers": sum(map(is_past, inputs)) // 2,
                "num_key_value_heads": int(past[1]),  # type: ignore[arg-type]
                "inputs": {
                    **{n: n for n in inputs if not is_past(n)},
                    "past_key_names": PAST.format("%d", "key"),
                    "past_value_names": PAST.format("%d", "value"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": PRESENT.format("%d", "key"),
                    "present_value_names": PRESENT.format("%d", "value"),
                },
            },
        },
        "search": {
            **{name: given.get(name, default) for name, default in _CHOSEN.items()},
            "max_length": length,
            # The attention writes into the memory that it reads, which is reserved once.
            "past_present_share_buffer": True,
        },
    }


def model_settings(folder: Path) -> dict[str, Any]:
    """``config.json``, and what ``generation_config.json`` says otherwise.

    Raises:
        ModelError: one of them is damaged.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
            found |= {key: value for key, value in read.items() if value is not None}
    return found


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end a text, as the model's configuration names them."""
    found = model_settings(folder).get("eos_token_id", [])
    return [int(i) for i in (found if isinstance(found, list) else [found])]
