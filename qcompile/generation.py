"""Text, token by token, from a graph that keeps its keys and values."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qcompile.cache import bind_shared, has_cache, positions_of
from qcompile.errors import ConfigError, ModelError
from qcompile.session import device_of

Tokens: TypeAlias = npt.NDArray[np.int64]
Logits: TypeAlias = npt.NDArray[np.float32]

_LOGITS: Final = "logits"


class Decoder:
    """A session and its cache. Past and present share their memory, so that nothing is copied.

    Args:
        session: of a graph with ``past_key_values.N.key`` in and ``present.N.key`` out.
        batch: sequences at once.
        capacity: the most tokens in a sequence, prompt and padding included.

    Raises:
        ModelError: the graph keeps no keys and values, or has no logits.
        ConfigError: no sequence at all, which would end the process inside ONNX Runtime.
    """

    def __init__(self, session: ort.InferenceSession, batch: int, capacity: int) -> None:
        outputs = [o.name for o in session.get_outputs()]
        if not has_cache(session) or _LOGITS not in outputs:
            raise ModelError("the graph has no cache to generate with", hint="compile with --cache")
        if batch < 1:
            raise ConfigError(f"a batch of {batch} sequences cannot be decoded")
        self._session = session
        self._inputs = {i.name for i in session.get_inputs()}
        self._capacity = capacity
        self._mask = np.zeros((batch, 0), np.int64)
        self._binding = session.io_binding()
        self._binding.bind_output(_LOGITS, "cpu")  # the first to be bound is the first to be read
        device = device_of(session.get_providers()[0])
        bind_shared(session, self._binding, batch, capacity, device)

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return int(self._mask.shape[1])

    def step(self, ids: Tokens, mask: Tokens | None = None) -> Logits:
        """Logits [batch, sequence, vocabulary] of the tokens `ids` that follow what is cached.

        Args:
            ids: [batch, sequence]; on top of a cache, the op takes several tokens in a batch of
                one only.
            mask: zero for padding, [batch, sequence]; default no padding.

        Raises:
            ConfigError: there is no room for so many.
        """
        mask = np.ones_like(ids) if mask is None else mask
        if self.length + ids.shape[1] > self._capacity:
            raise ConfigError(f"the cache was made for {self._capacity} tokens, and this is more")
        self._mask = np.concatenate([self._mask, mask], axis=1)
        positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        bound = {n: np.ascontiguousarray(v) for n, v in given.items() if n in self._inputs}
        for name, value in bound.items():
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output(_LOGITS, "cpu")  # anew: its size changes
        self._session.run_with_iobinding(self._binding)
        logits: Logits = self._binding.get_outputs()[0].numpy().astype(np.float32, copy=False)
        return logits


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tokens, Tokens]:
    """Prompts of unequal length as one batch: tokens and mask, both [batch, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def generate(
    session: ort.InferenceSession,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[Tokens]:
    """The next token of every prompt, [batch], `new_tokens` times. The caller stops earlier.

    Args:
        session: of a graph with a cache.
        prompts: token ids, none of them empty.
        new_tokens: the most tokens to yield.
        temperature: 0: the likeliest token; else one is drawn, from the logits divided by it.
        seed: of the draws.

    Raises:
        ConfigError: no prompt, an empty one, or one of what is no token; less than none asked for,
            or more than the model has positions, where the graph says how many; a temperature that
            is none.
        ModelError: the graph has no cache.
    """
    size = next((o.shape[-1] for o in session.get_outputs() if o.name == _LOGITS), None)
    rows = _checked(prompts, size if isinstance(size, int) else None)
    if new_tokens < 0:
        raise ConfigError(f"{new_tokens} tokens cannot be generated")
    check_temperature(temperature)
    ids, mask = pad_left(rows)
    most = positions_of(session)
    # The last token is not read again, so that it needs no position.
    if most is not None and ids.shape[1] + max(new_tokens, 1) - 1 > most:
        raise ConfigError(
            f"a prompt of {ids.shape[1]} tokens and {new_tokens} new ones are more than the "
            f"model's {most} positions"
        )
    decoder = Decoder(session, len(rows), ids.shape[1] + new_tokens)
    return _steps(decoder, ids, mask, new_tokens, temperature, np.random.default_rng(seed))


def check_temperature(temperature: float) -> None:
    """Raises ConfigError for what logits cannot be divided by, but for 0."""
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise ConfigError(f"temperature {temperature} is no number from 0 on")


def _checked(prompts: Sequence[Sequence[int]], vocabulary: int | None) -> list[list[int]]:
    """`prompts` as lists of integers.

    Raises:
        ConfigError: see `generate`.
    """
    try:
        rows = [list(prompt) for prompt in prompts]
    except TypeError:  # also of numbers in the place of prompts
        raise ConfigError("prompts are a list with a list of token ids for each") from None
    if not rows or not all(rows):
        raise ConfigError("a prompt has no tokens" if rows else "there is no prompt")
    for given in (token for row in rows for token in row):
        try:
            known = operator.index(given) >= 0 and (vocabulary is None or given < vocabulary)
        except TypeError:
            known = False
        if not known:
            raise ConfigError(
                f"a prompt holds {given!r}, which is no token of the model",
                hint="prompts are token ids; the model's tokenizer makes them of text",
            )
    return rows


def _steps(
    decoder: Decoder,
    ids: Tokens,
    mask: Tokens,
    new_tokens: int,
    temperature: float,
    rng: np.random.Generator,
) -> Iterator[Tokens]:
    logits = decoder.step(ids, mask)[:, -1]
    for left in range(new_tokens - 1, -1, -1):
        token = _drawn(logits, temperature, rng)
        yield token
        if left:
            logits = decoder.step(token[:, None])[:, -1]


def _drawn(logits: Logits, temperature: float, rng: np.random.Generator) -> Tokens:
    if temperature == 0.0:
        return np.asarray(logits.argmax(axis=-1))
    # The largest of logits with Gumbel noise is a draw from their softmax.
    noise = -np.log(-np.log(rng.random(logits.shape)))
    below = logits - logits.max(
        axis=-1, keepdims=True
    )  # so that no quotient is infinite at the top
    return np.asarray((below / temperature + noise).argmax(axis=-1))
