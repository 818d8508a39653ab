"""Text, token by token, from a graph that keeps its keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qcompile.cache import bind_shared, has_cache
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
    """

    def __init__(self, session: ort.InferenceSession, batch: int, capacity: int) -> None:
        outputs = [o.name for o in session.get_outputs()]
        if not has_cache(session) or _LOGITS not in outputs:
            raise ModelError("the graph has no cache to generate with", hint="compile with --cache")
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
    """
    ids, mask = pad_left(prompts)
    decoder = Decoder(session, len(prompts), ids.shape[1] + new_tokens)
    rng = np.random.default_rng(seed)
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
