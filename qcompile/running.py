"""`qcompile run`: text from an artifact that generates."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qcompile.artifact import load, read_record
from qcompile.cache import has_cache
from qcompile.errors import ConfigError, ModelError, StandInWarning
from qcompile.genai import end_tokens
from qcompile.generation import check_temperature, generate
from qcompile.targets import available, get_target


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a text came: tokens, and seconds for the prompt and for what followed."""

    prompt: int
    new: int
    prefill: float
    decode: float
    notes: tuple[str, ...] = ()
    """What has to be known of text or speed."""

    def __str__(self) -> str:
        decoded = f", {(self.new - 1) / self.decode:.1f} tokens/s after" if self.new > 1 else ""
        return (
            f"{self.prompt} tokens of prompt at {self.prompt / self.prefill:.1f} tokens/s, "
            f"{self.new} generated{decoded}" + "".join(f"; {note}" for note in self.notes)
        )


def run_prompt(
    folder: Path,
    prompt: str,
    write: Callable[[str], None],
    *,
    new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Rates:
    """Continue `prompt`, or answer it where the tokenizer has a chat template.

    Args:
        folder: the artifact.
        prompt: text.
        write: takes the text piece by piece.
        new_tokens: the most to generate; a token that ends the text, or the end of the model's
            positions, stops it earlier.
        temperature: 0: always the likeliest token.
        seed: of the draws, where the temperature is not 0.

    Raises:
        ModelError: no artifact, or one without cache or tokenizer.
        ConfigError: an empty prompt, one that is no text or leaves no position for a token, or a
            temperature that is none.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not valid UTF-8") from error
    check_temperature(temperature)
    record = read_record(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", StandInWarning)
        session = load(folder)
    check_cache(folder, record, session)
    tokenizer = load_tokenizer(folder)
    ids = prompt_tokens(tokenizer, prompt)
    if not ids:
        raise ConfigError("the prompt has no tokens")
    most = record.get("max_length")
    if most is not None and len(ids) >= most:
        raise ConfigError(f"the prompt has {len(ids)} tokens, and the model {most} positions")
    room = new_tokens if most is None else min(new_tokens, most - len(ids))
    stream, ends = Stream(tokenizer, write), set(end_tokens(folder))
    start = time.perf_counter()  # to make the cache is a part of the prompt's time
    tokens = generate(session, [ids], room, temperature=temperature, seed=seed)
    seconds = []
    while True:
        token = next(tokens, None)
        if token is None:
            break
        seconds.append(time.perf_counter() - start)
        if int(token[0]) in ends:
            break
        stream.put(int(token[0]))
        start = time.perf_counter()
    stream.finish()
    notes = [str(warning.message) for warning in told]
    if len(seconds) == room < new_tokens:
        notes.append("the model has no more positions")
    return Rates(len(ids), len(seconds), seconds[0], sum(seconds[1:]), tuple(notes))


def check_cache(folder: Path, record: Mapping[str, Any], session: ort.InferenceSession) -> None:
    """Refuse an artifact that cannot generate.

    Args:
        folder: the artifact.
        record: its ``qcompile.json``.
        session: on its graph.

    Raises:
        ModelError: it has no cache; says what can be done.
    """
    if has_cache(session):
        return
    if record["kind"] != "text-generation":
        raise ModelError(f"{folder} cannot generate: it is no causal language model")
    message, hint = f"{folder} has no cache to generate with", "compile the model with --cache"
    if not get_target(record["target"]).caches:
        others = " or ".join(name for name, target in sorted(available().items()) if target.caches)
        message += f", and target {record['target']} has none"
        hint += f" for {others}"
    raise ModelError(message, hint=hint)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of an artifact.

    Raises:
        ModelError: it has none, or one that cannot be read.
    """
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in folder.iterdir()):
        raise ModelError(f"{folder} has no tokenizer", hint="put the model's own files there")
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its readers raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the tokenizer of {folder} cannot be read: {lines[0]}") from error


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt`, put into the chat template where there is one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        found = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        found = tokenizer(prompt)["input_ids"]
    return [int(i) for i in found]


@dataclasses.dataclass
class Stream:
    """Tokens in, text out as soon as its characters are whole."""

    tokenizer: Any
    write: Callable[[str], None]
    tokens: list[int] = dataclasses.field(default_factory=list)
    written: int = 0

    def put(self, token: int) -> None:
        self.tokens.append(token)
        text = self._text()
        # Half a character is decoded as U+FFFD.
        if text.endswith("\ufffd"):
            return
        self._flush(text)
        if text.endswith("\n"):
            self.tokens, self.written = [], 0

    def finish(self) -> None:
        self._flush(self._text())

    def _flush(self, text: str) -> None:
        self.write(text[self.written :])
        self.written = len(text)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
