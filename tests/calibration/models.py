"""Small traced models and tokenizers for the tests of calibration data, and how they load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tokenizers
import transformers

from qcompile.calibration.data import CalibrationData, load_calibration
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError
from qcompile.traced import Batch, Kind, TracedModel
from tests.support import from_text

WORDS = 40
SPECIAL = {"[UNK]": 0, "<s>": 1, "[CLS]": 2, "[SEP]": 3}
VOCABULARY = WORDS + len(SPECIAL)
BOS, CLS, SEP = 1, 2, 3


def tokenizer(*, encoder: bool = False) -> Any:
    """Words w0, w1, … by white space; an encoder's adds [CLS] and [SEP]."""
    vocabulary = SPECIAL | {f"w{i}": i + len(SPECIAL) for i in range(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if encoder:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    make: Any = transformers.PreTrainedTokenizerFast  # without types of its own
    return make(
        tokenizer_object=model, unk_token="[UNK]", bos_token="<s>", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=16,
    )  # fmt: skip


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % WORDS}" for i in range(count))


def traced(text: str, kind: Kind = "other", **fields: Any) -> TracedModel:
    weights: dict[str, np.ndarray] = fields.pop("weights", {})
    return TracedModel(ir=from_text(text, **weights), name="tiny", task=kind, kind=kind, **fields)


def language_model(
    inputs: str = "int64[b, s] input_ids, int64[b, s] attention_mask, int32[b, s] position_ids",
    *,
    bigram: np.ndarray | None = None,
    kind: Kind = "text-generation",
    **fields: Any,
) -> TracedModel:
    """Logits of the next token are a row of `bigram`, which the last token picks."""
    table = np.zeros((VOCABULARY, VOCABULARY), dtype=np.float32) if bigram is None else bigram
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        lm ({inputs}, float[v, w] table) => (float logits) {{
            logits = Gather(table, input_ids)
        }}"""
    fields.setdefault("tokenizer", tokenizer(encoder=kind != "text-generation"))
    fields.setdefault("bos_token_id", BOS if kind == "text-generation" else None)
    return traced(text, kind, weights={"table": table}, **fields)


def encoder(inputs: str = "int64[b, s] input_ids, float[b, s] token_type_ids") -> TracedModel:
    return language_model(inputs, kind="feature-extraction")


def float_model(inputs: str = "float[b, 3] x, int32[b] k") -> TracedModel:
    return traced(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        f ({inputs}) => (float y) {{ y = Abs(x) }}"""
    )


def session(model: TracedModel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model.ir).SerializeToString(), options)


def rows(batches: tuple[Batch, ...], name: str = "input_ids") -> list[tuple[int, ...]]:
    """Every row of one input, in order."""
    return [tuple(row) for feed in batches for row in feed[name].tolist()]


LM = language_model()
SMALL = CompileConfig(samples=4, seq_len=8, objective="scheme")


def load(source: Any, model: TracedModel = LM, config: CompileConfig = SMALL) -> CalibrationData:
    return load_calibration(source, model, config)


def refusal(source: Any, model: TracedModel = LM) -> str:
    with pytest.raises(CalibrationError) as caught:
        load(source, model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
