"""Decoders of known shapes with random weights: INT8 and FP8 against float16, on the GPU at hand.

    python -m benchmarks.cuda_models [--models opt-6.7b] [--layers 4] [--cache] [--json PATH]

The graph is what a frontend gives, written by hand; the target lowers it twice, for the schemes
fp16 and w8a8 or fp8 (`--scheme`; activations per token). Weights are random codes times a scale, so
that both compute the same function but for rounding. Without the output head, which would weigh
more in a few layers than in the whole model. Inputs and outputs are bound to GPU memory; the two
sessions run in turns in one process; medians. `padded` masks the first quarter of every sequence;
`captured` replays a captured CUDA graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import ShapeInferencePass
from qcompile.passes.kv_cache import KvCache
from qcompile.passes.quantize import Quantize
from qcompile.targets.ort_cuda import OrtCuda

from benchmarks.bound import Timed
from qcompile.cache import bind_shared
from qcompile.e4m3 import E4M3
from qcompile.linears import find_linears, find_sites
from qcompile.precision import ActivationQuant, OpPlan, PrecisionPlan, QuantizedWeight, SitePlan
from qcompile.session import open_session


@dataclasses.dataclass(frozen=True)
class Feed:
    """What a row of the table is of.

    Attributes:
        batch, sequence: of the new tokens.
        padded: whether the first quarter of each sequence is padding.
        captured: whether a captured graph is replayed.
        past: tokens in the cache.
    """

    batch: int
    sequence: int
    padded: bool = False
    captured: bool = False
    past: int = 0

    def __str__(self) -> str:
        said = f"{self.batch}x{self.sequence}{' padded' if self.padded else ''}"
        said += f" after {self.past}" if self.past else ""
        return said + (" captured" if self.captured else "")

    def arrays(self, vocabulary: int) -> dict[str, np.ndarray]:
        """The graph's inputs but for the cache."""
        ids = np.random.default_rng(1).integers(0, vocabulary, (self.batch, self.sequence))
        mask = np.ones((self.batch, self.past + self.sequence), np.int64)
        if self.padded:
            mask[:, : self.sequence // 4] = 0
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, self.past :]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


FEEDS: Final = (
    Feed(1, 2048),
    Feed(8, 512),
    Feed(8, 512, padded=True),
    Feed(16, 1),
    Feed(16, 1, captured=True),
)
CACHED: Final = (
    Feed(1, 2048),
    Feed(8, 512, padded=True),
    Feed(16, 1, past=1024),
    Feed(16, 1, captured=True, past=1024),
)

SCALE: Final = 3e-4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder. Without groups it is an OPT, with them a Llama."""

    width: int
    heads: int
    inner: int
    vocabulary: int
    groups: int | None = None


SHAPES: Final = {
    "tiny-opt": Shape(256, 4, 1024, 1000),
    "tiny-llama": Shape(256, 4, 704, 1000, 2),
    "opt-6.7b": Shape(4096, 32, 16384, 50272),
    "opt-13b": Shape(5120, 40, 20480, 50272),
    "llama-3-8b": Shape(4096, 32, 14336, 128256, 8),
}


def text_of(shape: Shape, layers: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The graph as ONNX text, and its weights' shapes by name."""
    c, inner = shape.width, shape.inner
    weights: dict[str, tuple[int, ...]] = {"embed": (shape.vocabulary, c)}
    body = [
        "same = Equal(attention_mask, attention_mask)  ones = Cast<to=7>(same)",
        "at = CumSum(ones, axis)",
        "rows = Unsqueeze(at, row_axes)  columns = Unsqueeze(at, column_axes)",
        "causal = LessOrEqual(columns, rows)  real = Cast<to=9>(attention_mask)",
        "keys = Unsqueeze(real, column_axes)  keep = And(causal, keys)",
        "x0 = Gather(embed, input_ids)",
    ]
    if shape.groups:
        weights["frequencies"] = (c // shape.heads // 2,)
        body.append("place = Unsqueeze(position_ids, last)  wide = Cast<to=1>(place)")
        body.append("angle = Mul(wide, frequencies)  cosine = Cos(angle)  sine = Sin(angle)")

    def linear(source: str, result: str, name: str, k: int, n: int) -> None:
        weights[name] = (k, n)
        if shape.groups:
            body.append(f"{result} = MatMul({source}, {name})")
        else:
            weights[f"{name}_bias"] = (n,)
            body.append(f"{result}p = MatMul({source}, {name})")
            body.append(f"{result} = Add({result}p, {name}_bias)")

    def norm(source: str, result: str, name: str) -> None:
        weights[f"{name}_weight"] = (c,)
        if shape.groups:
            body.append(f"{result} = RMSNormalization<axis=-1>({source}, {name}_weight)")
        else:
            weights[f"{name}_bias"] = (c,)
            body.append(
                f"{result} = LayerNormalization<axis=-1>({source}, {name}_weight, {name}_bias)"
            )

    groups = shape.groups or shape.heads
    narrow = c // shape.heads * groups
    for i in range(layers):
        norm(f"x{i}", f"n{i}", f"norm{i}")
        for part, n in (("q", c), ("k", narrow), ("v", narrow)):
            linear(f"n{i}", f"{part}{i}", f"{part}_proj{i}", c, n)
        q, k = f"q{i}", f"k{i}"
        if shape.groups:
            for part, heads in (("q", shape.heads), ("k", groups)):
                body.append(
                    f"{part}r{i} = RotaryEmbedding<num_heads={heads}>({part}{i}, cosine, sine)"
                )
            q, k = f"qr{i}", f"kr{i}"
        split = f"q_num_heads={shape.heads}, kv_num_heads={groups}"
        body.append(f"a{i} = Attention<{split}>({q}, {k}, v{i}, keep)")
        linear(f"a{i}", f"o{i}", f"o_proj{i}", c, c)
        body.append(f"y{i} = Add(x{i}, o{i})")
        norm(f"y{i}", f"m{i}", f"mlp_norm{i}")
        if shape.groups:
            linear(f"m{i}", f"g{i}", f"gate{i}", c, inner)
            linear(f"m{i}", f"u{i}", f"up{i}", c, inner)
            body.append(f"s{i} = Sigmoid(g{i})  t{i} = Mul(g{i}, s{i})  h{i} = Mul(t{i}, u{i})")
        else:
            linear(f"m{i}", f"f{i}", f"fc1_{i}", c, inner)
            body.append(f"h{i} = Relu(f{i})")
        linear(f"h{i}", f"d{i}", f"down{i}", inner, c)
        body.append(f"x{i + 1} = Add(y{i}, d{i})")
    norm(f"x{layers}", "y", "last_norm")
    inputs = ["int64[b, s] input_ids", "int64[b, s] attention_mask"]
    if shape.groups:
        inputs.append("int64[b, s] position_ids")
    inputs += [f"float[{', '.join(map(str, dims))}] {name}" for name, dims in weights.items()]
    constants = "int64 axis = {1}, int64[2] row_axes = {1, 3}, int64[2] column_axes = {1, 2}"
    return (
        '<ir_version: 10, opset_import: ["" : 23]>\n'
        f"decoder ({', '.join(inputs)}) => (float[b, s, {c}] y)\n"
        f"<{constants}, int64[1] last = {{2}}> {{\n" + "\n".join(body) + "\n}"
    ), weights


def build(shape: Shape, layers: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The float graph, its weights lazy, and the codes of its matrices."""
    text, weights = text_of(shape, layers)
    model = ir.from_onnx_text(text)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    rng = np.random.default_rng(0)
    block = rng.integers(-127, 128, 1 << 22, np.int8)
    inputs = {str(value.name): value for value in model.graph.inputs}
    codes: dict[str, np.ndarray] = {}
    for at, (name, dims) in enumerate(weights.items()):
        value = inputs[name]
        model.graph.inputs.remove(value)
        if len(dims) == 2:
            codes[name] = np.resize(np.roll(block, 977 * at), dims)
        value.const_value = _lazy(name, dims, codes.get(name))
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model, codes


def _lazy(name: str, dims: tuple[int, ...], codes: np.ndarray | None) -> ir.LazyTensor:
    def evaluate() -> ir.Tensor[Any]:
        if codes is not None:
            array = codes * np.float32(SCALE * (100 if name == "embed" else 1))
        elif name == "frequencies":
            array = (1e4 ** -np.linspace(0, 1, dims[0])).astype(np.float32)
        else:
            array = np.full(dims, 1.0 if name.endswith("weight") else 0.01, np.float32)
        return ir.Tensor(array, name=name)

    return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(dims), name=name)


def plan_of(model: ir.Model, codes: dict[str, np.ndarray], scheme: str) -> PrecisionPlan:
    """Every Linear INT8 or FP8, activations per token."""
    fp8 = scheme == "fp8"
    ops, sites = [], []
    for site in find_sites(model.graph):
        activation = ActivationQuant("token", None, None, np.full(site.channels, 255), fp8=fp8)
        names = tuple(linear.name for linear in site.linears)
        sites.append(SitePlan(site.name, str(site.x.name), activation, names))
    for linear in find_linears(model.graph):
        k, n = linear.in_features, linear.out_features
        own = codes[str(linear.weight.name)]
        weight = QuantizedWeight(own, np.full(n, SCALE, np.float32))
        if fp8:
            # Codes of more than four bits are rounded.
            weight = dataclasses.replace(weight, codes=own.astype(E4M3))
        site_name = next(s.name for s in sites if linear.name in s.ops)
        ops.append(
            OpPlan(
                linear.name,
                site_name,
                "fp8" if fp8 else "int8",
                "",
                k,
                n,
                str(linear.output.name),
                weight,
            )
        )
    return PrecisionPlan(tuple(sites), tuple(ops), "float16")


class Bound(Timed):
    """A session with inputs and outputs bound to the GPU's memory."""

    def __init__(self, session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> None:
        device = "cuda" if session.get_providers()[0].startswith("CUDA") else "cpu"
        self.session, self.binding = session, session.io_binding()
        for name in feed.keys() & {value.name for value in session.get_inputs()}:
            array = ort.OrtValue.ortvalue_from_numpy(feed[name], device)
            self.binding.bind_ortvalue_input(name, array)
        # At one place for all runs, as a captured graph wants it.
        shape = [*feed["input_ids"].shape, session.get_outputs()[0].shape[-1]]
        result = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, device)
        self.binding.bind_ortvalue_output("y", result)
        batch, tokens = feed["attention_mask"].shape
        bind_shared(session, self.binding, batch, tokens, device)
        self.warm_up()


def compare(
    name: str, layers: int, repeats: int, target: OrtCuda, chosen: str, *, cache: bool
) -> list[dict[str, Any]]:
    """Lower both, open both, time both in turns."""
    shape = SHAPES[name]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        paths, sizes = [], []
        for scheme in ("fp16", chosen):
            model, codes = build(shape, layers)
            plan = PrecisionPlan(floats="float16")
            if scheme == chosen:
                plan = plan_of(model, codes, scheme)
                Quantize(plan)(model)
            for pass_ in (*([KvCache()] if cache else []), *target.lower(plan)):
                pass_(model)
            folder = Path(scratch) / scheme
            folder.mkdir()
            path = target.emit(model, folder)
            del model, codes
            embedding = 2 * shape.vocabulary * shape.width
            sizes.append((folder / "model.onnx.data").stat().st_size - embedding)
            paths.append(path)
        sessions = [open_session(path, target.runtime()) for path in paths]
        for feed in CACHED if cache else FEEDS:
            if feed.captured:
                if not target.runs_here:
                    continue
                runtime = dataclasses.replace(target.runtime(), options={"enable_cuda_graph": "1"})
                sessions = [open_session(path, runtime) for path in paths]
            arrays = feed.arrays(shape.vocabulary)
            real = arrays["attention_mask"][:, feed.past :].astype(bool)
            sides = [Bound(session, arrays) for session in sessions]
            times: list[list[float]] = [[], []]
            for _ in range(repeats):
                for side, kept in zip(sides, times, strict=True):
                    kept.append(side.time() * 1e3)
            half, coded = (side.output()[real] for side in sides)
            medians = [statistics.median(kept) for kept in times]
            rows.append(
                {
                    "model": name, "layers": layers, "feed": str(feed), **dataclasses.asdict(feed),
                    "scheme": chosen, "fp16_ms": medians[0], "ms": medians[1],
                    "ratio": medians[0] / medians[1], "weights": sizes[1] / sizes[0],
                    "sqnr_db": float(10 * np.log10((half**2).sum() / ((half - coded) ** 2).sum())),
                    "quarters": [statistics.quantiles(kept, n=4) for kept in times],
                }
            )  # fmt: skip
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """For people."""
    times = (
        f"fp16 {row['fp16_ms']:8.3f} ms  {row['scheme']} {row['ms']:8.3f} ms  {row['ratio']:.2f}x"
    )
    sizes = f"weights {row['weights']:.2f}x  SQNR {row['sqnr_db']:.1f} dB"
    return f"{row['model']:11} {row['layers']} layers  {row['feed']:15} {times}  {sizes}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=list(SHAPES), default=["opt-6.7b", "opt-13b", "llama-3-8b"]
    )
    parser.add_argument("--scheme", choices=["w8a8", "fp8"], default="w8a8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--target", default="", help="a variant, where there is no GPU")
    parser.add_argument("--cache", action="store_true", help="keep keys and values")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    target = OrtCuda(arguments.target)
    rows = [
        row
        for name in arguments.models
        for row in compare(
            name,
            arguments.layers,
            arguments.repeats,
            target,
            arguments.scheme,
            cache=arguments.cache,
        )
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
