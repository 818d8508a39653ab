"""Transformers models, from a folder or from the hub."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from optimum.exporters.tasks import TasksManager

from qcompile.checkpoints import Checkpoint, quantization_settings
from qcompile.config import CompileConfig
from qcompile.errors import ConfigError, ModelError
from qcompile.frontend.adapter import add_adapter, check_no_adapter
from qcompile.frontend.export import check_finite_weights, export_module
from qcompile.frontend.gguf import is_gguf, load_gguf, load_gguf_tokenizer, read_gguf_config
from qcompile.frontend.image import (
    PROCESSOR,
    OneImageOutput,
    any_size,
    image_example,
    load_image_processor,
)
from qcompile.frontend.loading import check_loaded, guarded
from qcompile.frontend.opset import OPSET
from qcompile.frontend.quantized import load_quantized
from qcompile.hub import model_folder, why_not_fetched
from qcompile.spill import spill
from qcompile.traced import POSITIONS, Kind, TracedModel

# Task -> (attribute of the model's output, how it is measured).
_TASKS: Final[dict[str, tuple[str, Kind]]] = {
    "text-generation": ("logits", "text-generation"),
    "fill-mask": ("logits", "text-classification"),
    "token-classification": ("logits", "text-classification"),
    "text-classification": ("logits", "text-classification"),
    "image-classification": ("logits", "image-classification"),
    "feature-extraction": ("last_hidden_state", "feature-extraction"),
    "sentence-similarity": ("last_hidden_state", "feature-extraction"),
}

_ASSET_PATTERNS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    PROCESSOR,
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def load_huggingface(source: str, config: CompileConfig, work: Path) -> TracedModel:
    """Load, check and trace a Transformers model.

    Args:
        source: a folder in Hugging Face form, a hub id, or a .gguf file.
        config: task, opset, trust_remote_code.
        work: folder for the traced graph.

    Raises:
        ModelError: missing or corrupt files, custom code that is not trusted, an architecture or
            weights that do not fit the task, NaN or Inf in the weights.
        ConfigError: a task that does not exist or that qcompile does not compile.
    """
    given, source = source, str(model_folder(source))
    hf_config = _read_config(source, given, config.trust_remote_code)
    task = config.task or ("text-generation" if is_gguf(source) else _infer_task(hf_config))
    if task not in _TASKS:
        raise ConfigError(
            f"task {task!r} is not one that qcompile compiles",
            hint="one of " + ", ".join(_TASKS),
        )
    output, kind = _TASKS[task]
    _check_task(source, task, hf_config)
    source = str(model_folder(given, weights=True))
    module, checkpoint = _load_weights(source, task, hf_config, config.trust_remote_code)
    added = frozenset[str]()
    if config.adapter is not None:
        module, checkpoint, added = add_adapter(
            module, checkpoint, config.adapter, config.adapter_mode
        )
    check_finite_weights(module)
    batch = torch.export.Dim("batch", min=1, max=65536)
    wrapper: torch.nn.Module
    if kind == "image-classification":
        tokenizer, max_length = None, None
        processor = guarded(
            "image processor", source, load_image_processor, source, config.trust_remote_code
        )
        wrapper, example = OneImageOutput(module, output), image_example(module, processor)
        axes: dict[int, Any] = {0: batch}
        if any_size(module, processor):
            axes |= dict.fromkeys((2, 3), torch.export.Dim.AUTO)
    else:
        processor, tokenizer = None, _load_tokenizer(source, config.trust_remote_code)
        max_length = _max_length(module)
        wrapper = _OneOutput(module, output)
        example = _example(module, tokenizer, kind, max_length)
        axes = {0: batch, 1: torch.export.Dim("sequence", min=1, max=max_length or 1 << 20)}
    exported = export_module(
        wrapper.eval(),
        example,
        dict.fromkeys(example, axes),
        [output],
        opset=OPSET,
    )
    graph = spill(exported, work, "traced")
    # Not by `del`: torch.export's and onnxscript's caches keep the module.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0)
    return TracedModel(
        ir=graph,
        name=_name(given),
        task=task,
        kind=kind,
        tokenizer=tokenizer,
        image_processor=processor,
        assets=find_assets(_assets_folder(source, hf_config, tokenizer or processor, work)),
        max_length=max_length,
        bos_token_id=_token_id(getattr(hf_config, "bos_token_id", None)),
        checkpoint=checkpoint,
        adapter=added,
    )


def _name(source: str) -> str:
    return Path(source).stem if is_gguf(source) else Path(source).name


class _OneOutput(torch.nn.Module):
    """Names the model's inputs and its one output; attributes keep the model's own paths."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.inner = model  # the name that export.WRAPPED strips from paths
        self.output = output

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Named one by one: torch.export matches dynamic shapes against this signature.
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        kwargs: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if "use_cache" in inspect.signature(self.inner.forward).parameters:
            kwargs["use_cache"] = False
        result: torch.Tensor = getattr(self.inner(**kwargs), self.output)
        return result


def _assets_folder(source: str, hf_config: Any, preprocessor: Any, work: Path) -> Path:
    """The model's folder; for a file one below `work`, filled from what was loaded."""
    if Path(source).is_dir():
        return Path(source)
    folder = work / "assets"
    hf_config.save_pretrained(folder)
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)
    return folder


def find_assets(folder: Path) -> tuple[Path, ...]:
    """The configuration and tokenizer files of a model folder, weights and code left out."""
    found = {p for pattern in _ASSET_PATTERNS for p in folder.glob(pattern) if p.is_file()}
    return tuple(sorted(found))


def _read_config(source: str, given: str, trust: bool) -> Any:
    """Of the model in `source`, which the user calls `given`."""
    folder = Path(source)
    if is_gguf(source):
        return guarded("configuration", source, read_gguf_config, source)
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{source} is neither a model folder nor an .onnx file")
    if not folder.exists():
        raise ModelError(f"model {given} does not exist", hint=why_not_fetched(given))
    if not (folder / "config.json").is_file():
        check_no_adapter(folder, given)
        raise ModelError(f"{given} has no config.json", hint="give a folder in Hugging Face form")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{source}/config.json is damaged: no valid JSON") from error
    if isinstance(raw, dict) and raw.get("auto_map") and not trust:
        raise ModelError(
            f"{source} wants to run Python code of its own (auto_map in config.json)",
            hint="read that code, then pass --trust-remote-code",
        )
    return guarded(
        "configuration",
        source,
        transformers.AutoConfig.from_pretrained,
        source,
        trust_remote_code=trust,
    )


def _infer_task(hf_config: Any) -> str:
    for name in hf_config.architectures or ():
        architecture = getattr(transformers, name, None)
        if architecture is not None:
            try:
                return str(TasksManager.infer_task_from_model(architecture))
            except ValueError:
                continue
    raise ModelError(
        f"the task of {hf_config.model_type} cannot be inferred from its architectures "
        f"({hf_config.architectures})",
        hint="give --task",
    )


def _check_task(source: str, task: str, hf_config: Any) -> None:
    auto_class = TasksManager.get_model_class_for_task(task)
    # A model with code of its own says for itself what it can do.
    own_code = bool(getattr(hf_config, "auto_map", None))
    if not own_code and type(hf_config) not in auto_class._model_mapping:
        raise ModelError(
            f"{source} is of type {hf_config.model_type}, which Transformers has not for task "
            f"{task!r}",
            hint=f"leave --task out, or give another of {', '.join(_TASKS)}",
        )


def _load_weights(
    source: str, task: str, hf_config: Any, trust: bool
) -> tuple[Any, Checkpoint | None]:
    auto_class = TasksManager.get_model_class_for_task(task)
    settings, checkpoint = quantization_settings(Path(source)), None
    if is_gguf(source):
        module, info, checkpoint = guarded("weights", source, load_gguf, source, auto_class)
    elif settings:
        module, info, checkpoint = guarded(
            "weights", source, load_quantized, Path(source), hf_config, auto_class, settings, trust
        )
    else:
        module, info = guarded(
            "weights",
            source,
            auto_class.from_pretrained,
            source,
            dtype=torch.float32,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # they are refused by name
            output_loading_info=True,
        )
    check_loaded(source, info, module.state_dict(), task)
    return module.eval(), checkpoint


def _load_tokenizer(source: str, trust: bool) -> Any:
    folder = Path(source)
    if is_gguf(source):
        return guarded("tokenizer", source, load_gguf_tokenizer, source)
    if not any(p.name.startswith(("tokenizer", "vocab")) for p in folder.iterdir()):
        return None
    return guarded(
        "tokenizer",
        source,
        transformers.AutoTokenizer.from_pretrained,
        source,
        trust_remote_code=trust,
    )


def _example(
    module: Any, tokenizer: Any, kind: Kind, max_length: int | None
) -> dict[str, torch.Tensor]:
    """Two sequences of seven tokens: sizes that collide with no other dimension of a model."""
    parameters = inspect.signature(module.forward).parameters
    wanted = ["input_ids", "attention_mask"]
    wanted += [n for n in getattr(tokenizer, "model_input_names", ()) if n not in wanted]
    if kind == "text-generation":
        wanted.append("position_ids")
    length = min(7, max_length or 7)
    made = {
        "input_ids": torch.ones(2, length, dtype=torch.int64),
        "attention_mask": torch.ones(2, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(2, length, dtype=torch.int64),
        # Explicit, with a batch axis: left out, the rotary cache is exported for batch one.
        "position_ids": torch.arange(length).expand(2, length).contiguous(),
    }
    example = {name: made[name] for name in wanted if name in parameters and name in made}
    if "input_ids" not in example:
        raise ModelError(f"{type(module).__name__} does not take input_ids: not a text model")
    return example


def _max_length(module: Any) -> int | None:
    for name in POSITIONS:
        value = getattr(module.config, name, None)
        if isinstance(value, int) and value > 0:
            return value - _reserved_positions(module)
    return None


def _reserved_positions(module: Any) -> int:
    """RoBERTa and its kin count positions from padding_idx + 1, in a table that is no longer."""
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.padding_idx) + 1
    return 0


def _token_id(value: Any) -> int | None:
    return value if isinstance(value, int) else None
