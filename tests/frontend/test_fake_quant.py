"""Torch modules with fake quantisation: the scales that were trained ship as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, QConfig
from torch.ao.quantization.observer import MovingAveragePerChannelMinMaxObserver

import qcompile
from qcompile.errors import ConfigError, ModelError
from qcompile.frontend.fake_quant import fixed_scales, has_fake_quantise

K, N = 64, 32


FAKE: Any = FakeQuantize


def activations(**options: Any) -> Any:
    return FAKE.with_args(observer=MovingAverageMinMaxObserver, **options)


WEIGHTS = FAKE.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127,
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0,
)  # fmt: skip
FULL = {"quant_min": 0, "quant_max": 255}


class Block(torch.nn.Module):
    """Trained with fake quantisation: what it reads, its weight, what it gives."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        quantised = activations(**options)
        self.enter = quantised()
        config: Any = QConfig(quantised, WEIGHTS)  # type: ignore[no-untyped-call]
        self.fc: Any = torch.ao.nn.qat.Linear(K, N, qconfig=config)
        self.head = torch.nn.Linear(N, 4)
        for _ in range(3):
            self(torch.randn(16, K))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.relu(self.fc(self.enter(x))))
        return result


X = torch.randn(8, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("highest", [255, 127])
def test_scales_ship_as_they_were_trained(tmp_path: Path, highest: int) -> None:
    module = Block(quant_min=0, quant_max=highest)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    # Codes of seven bits cannot saturate, so that a machine with saturation takes them too.
    target = "ort-cpu:vnni" if highest == 255 else "ort-cpu:avx2"
    artifact = qcompile.compile((module, X), target=target, output=tmp_path / "out")
    report = artifact.report
    assert report.scheme == "checkpoint"
    ops = {op.name: op for op in report.ops}
    assert ops["fc"].kernel == "com.microsoft.MatMulIntegerToFloat"
    assert ops["fc"].reason == "from the checkpoint: Q/DQ nodes, scales of weights and activations"
    assert ops["head"].precision == "float"
    # The module as it was: its observers have not seen what traced it.
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Values beyond the range that was seen, too.
    x = 3 * X
    with torch.no_grad(), fixed_scales(module):
        expected = module(x).numpy()
    (found,) = qcompile.load(artifact.path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_modules_that_round_no_more_are_float(tmp_path: Path) -> None:
    module = Block(**FULL)
    module.apply(torch.ao.quantization.disable_fake_quant)
    assert not has_fake_quantise(module)
    report = qcompile.compile((module, X), scheme="fp32", output=tmp_path / "out").report
    assert not any("dequantised" in line for line in report.warnings)


def test_other_schemes_would_round_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantised already, by fake-quantise modules"):
        qcompile.compile((Block(**FULL), X), scheme="w8a8", output=tmp_path / "out")


class Bare(torch.nn.Module):
    """Fake-quantise ops without modules: known when it is traced."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(K, N)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            result: torch.Tensor = self.fc(x)
            return result
        weight = torch.fake_quantize_per_tensor_affine(self.fc.weight, self.scale, 0, -128, 127)
        return torch.nn.functional.linear(x, weight, self.fc.bias)


def test_what_only_tracing_tells(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scales of weights.*a second time"):
        qcompile.compile((Bare(0.001), X), output=tmp_path / "out")
    with pytest.raises(ConfigError, match="quantised already: bare is not"):
        qcompile.compile((Bare(None), X), scheme="checkpoint", output=tmp_path / "out")
    report = qcompile.compile((Bare(0.001), X), scheme="checkpoint", output=tmp_path / "out").report
    assert [op.precision for op in report.ops] == ["weight8"]


def test_codes_of_other_ranges_are_named(tmp_path: Path) -> None:
    module = Block(**FULL)
    module.head = Block(quant_min=0, quant_max=15).enter
    before = dict(module.named_modules())
    with pytest.raises(ModelError, match="codes from 0 to 15, which are not read"):
        qcompile.compile((module, X), output=tmp_path / "out")
    assert dict(module.named_modules()) == before


def test_a_tied_weight_is_as_it_was() -> None:
    module, other = Block(**FULL), Block(**FULL)
    module.again, other.fc.weight = other.fc, module.fc.weight
    trained = module.fc.weight.detach().clone()
    with fixed_scales(module):
        assert not torch.equal(module.fc.weight, trained)
    assert torch.equal(module.fc.weight, trained)


@pytest.mark.parametrize("source", [("model", X), (torch.nn.Linear(2, 2),)])
def test_a_tuple_that_is_no_module_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has to be"):
        qcompile.compile(source, output=tmp_path / "out")
