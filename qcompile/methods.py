"""Methods that find the codes of weights: what may follow a scheme's name after a colon."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

Method: TypeAlias = Literal[
    "rtn", "mse", "hqq", "awq", "gptq", "awq+gptq", "adaround", "lkd", "spqr"
]

METHODS: Final[tuple[Method, ...]] = get_args(Method)

SUMMARIES: Final[dict[Method, str]] = {
    "rtn": "each weight to the nearest code; the default of blocks",
    "mse": "a smaller range where that lessens the squared error",
    "hqq": "half-quadratic zero points, no data (Badri and Shaji, 2023)",
    "awq": "input channels scaled by what calibration saw, ranges searched (arXiv 2306.00978)",
    "gptq": "errors made up for by the weights rounded later, layer after layer (arXiv 2210.17323)",
    "awq+gptq": "both: AWQ's scales, then GPTQ's rounding",
    "adaround": "up or down learned for the outputs, from GPTQ's grid (arXiv 2004.10568)",
    "lkd": "layers distilled one by one: weights and scales learned (ZeroQuant, arXiv 2206.01861)",
    "spqr": "as gptq, the input channels that rounding hurts most in float (arXiv 2306.03078)",
}

FOLDED: Final[tuple[Method, ...]] = ("awq", "awq+gptq")
"""Methods that scale a weight's input channels, as smoothing does."""

SEQUENTIAL: Final[tuple[Method, ...]] = ("gptq", "awq+gptq", "adaround", "lkd", "spqr")
"""Methods that see what the layers before, already rounded, hand on."""

PER_CHANNEL: Final[tuple[Method, ...]] = ("rtn", "mse", "gptq", "adaround")
"""Methods for weights with a scale per output channel, where activations have codes, too."""

OTHERWISE: Final[dict[Method, str]] = {
    "hqq": "it moves zero points, and these weights have none",
    "awq": "it scales input channels, as --smooth does there",
    "awq+gptq": "it scales input channels, as --smooth does there",
    "lkd": "it is for weights in blocks, as scheme zeroquant has them",
    "spqr": "scheme llm-int8 keeps input channels in float beside int8",
}
"""Why the others are not."""

UNAVAILABLE: Final[dict[str, str]] = {
    "spqr-sparse": "ONNX Runtime has no fast product of a sparse matrix: single weights in float "
    "would cost as much as all",
    "spqr-bilevel": "scales that are quantised themselves: ONNX Runtime's MatMulNBits takes floats",
}
"""Forms of a method that no kernel runs, with the reason."""

BLOCK_SIZES: Final = (32, 64, 128)


def is_symmetric(method: Method | None, asked: bool | None) -> bool:
    """Whether blocks have no zero point: as asked, else only where weights are rounded to nearest,
    whose artifacts stay what they were."""
    return method in (None, "rtn") if asked is None else asked
