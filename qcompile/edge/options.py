"""What a user may ask of `onnx-edge` and of no other target."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal, TypeAlias

import pydantic

from qcompile.errors import ConfigError

ActivationType: TypeAlias = Literal["uint8", "int8", "uint16", "int16"]
Dims: TypeAlias = tuple[Annotated[int, pydantic.Field(ge=1)], ...]

_SHAPE: Final = re.compile(r"([^=]+)=([1-9]\d*(?:[x×][1-9]\d*)*)")


class EdgeOptions(pydantic.BaseModel):
    """Options of a compilation for `onnx-edge`.

    Attributes:
        shapes: input name -> dimensions that the graph is given for good.
        weights: whether a weight has a scale per output channel, where the profile allows it, or
            one; None: per channel.
        activation_type: of the codes of activations; None: what the profile prefers.
        symmetric_activations: whether zero is in the middle of their codes.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    shapes: dict[str, Dims] = {}
    weights: Literal["per-channel", "per-tensor"] | None = None
    activation_type: ActivationType | None = None
    symmetric_activations: bool = False


def parse_input_shapes(texts: Iterable[str]) -> dict[str, Dims]:
    """``input_ids=1x128`` as name and dimensions.

    Raises:
        ConfigError: anything else, or one input twice.
    """
    shapes: dict[str, Dims] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"shape: {text!r} is not like input_ids=1x128")
        name = match[1].strip()
        if name in shapes:
            raise ConfigError(f"shape: input {name} is given twice")
        shapes[name] = tuple(int(n) for n in re.split("[x×]", match[2]))
    return shapes
