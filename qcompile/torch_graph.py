"""A float graph evaluated by PyTorch, for its gradients: ONNX Runtime gives none.

Only what depends on a Linear is evaluated here; masks, positions and embeddings are computed by
ONNX Runtime and come in as constants. The ops follow the ONNX operator specification, opset 23.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from qcompile.linears import is_constant

Tensor: TypeAlias = torch.Tensor
Values: TypeAlias = dict[ir.Value, Tensor]
_Inputs: TypeAlias = list[Any]
_Op: TypeAlias = Callable[[ir.Node, _Inputs], Any]


class UnsupportedOpError(Exception):
    """An op that is not known here, or not in this form. The message names it."""


def downstream(graph: ir.Graph, roots: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes of `graph` that `roots` reach, they included, in graph order.

    Raises:
        UnsupportedOpError: the body of a control-flow op reads what they compute.
    """
    reached = set(roots)
    order = []
    for node in graph:
        if node in reached:
            order.append(node)
            users = [use.node for output in node.outputs for use in output.uses()]
            if any(user.graph is not graph for user in users):
                raise UnsupportedOpError("the body of a control-flow op")
            reached.update(users)
    return order


def frontier(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The values that `nodes` read and do not compute, constants left out."""
    made = {output for node in nodes for output in node.outputs}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    return [v for v in read if v not in made and not is_constant(v)]


def check_supported(nodes: Sequence[ir.Node]) -> None:
    """Raises UnsupportedOpError for the first op that `evaluate` does not know."""
    for node in nodes:
        if node.op_type not in _OPS or node.domain not in ("", "ai.onnx"):
            raise UnsupportedOpError(f"{node.domain or 'ai.onnx'}.{node.op_type}")
        extra = () if node.op_type == "Split" else node.outputs[1:]
        if any(output.uses() or output.is_graph_output() for output in extra):
            raise UnsupportedOpError(f"a second output of {node.op_type}")


def evaluate(
    nodes: Sequence[ir.Node],
    given: Mapping[ir.Value, np.ndarray],
    constants: dict[ir.Value, Tensor],
    hook: Callable[[ir.Node, list[Any]], Tensor] | None = None,
) -> Values:
    """Run `nodes` in order.

    Args:
        nodes: from `downstream`.
        given: the values of `frontier`.
        constants: initializers as tensors; filled as they are met, so that calls can share it.
        hook: computes every MatMul of its inputs.

    Returns:
        Every value computed, and what was given.

    Raises:
        UnsupportedOpError: an op in a form that is not known here.
    """
    values: Values = {value: torch.from_numpy(np.array(array)) for value, array in given.items()}

    def read(value: ir.Value | None) -> Tensor | None:
        if value is None or value in values:
            return None if value is None else values[value]
        if value not in constants:
            tensor = value.const_value
            assert tensor is not None, f"{value.name} is neither computed nor constant"
            with warnings.catch_warnings():
                # A memory-mapped array cannot be written to, and nothing here writes.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                constants[value] = torch.from_numpy(tensor.numpy())
        return constants[value]

    for node in nodes:
        inputs = [read(value) for value in node.inputs]
        try:
            if hook is not None and node.op_type == "MatMul":
                made = hook(node, inputs)
            else:
                made = _OPS[node.op_type](node, inputs)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            if "allocate memory" in str(error):
                raise MemoryError from error
            raise UnsupportedOpError(f"{node.op_type} as it is here") from error
        for output, tensor in zip(
            node.outputs, made if isinstance(made, tuple | list) else (made,), strict=False
        ):
            values[output] = tensor
    return values


def _ints(tensor: Tensor | None) -> list[int]:
    return [] if tensor is None else [int(n) for n in tensor.reshape(-1).tolist()]


def _attention(node: ir.Node, inputs: _Inputs) -> Tensor:
    query, key, value, mask = (*inputs[:4], None)[:4]
    if any(v is not None for v in inputs[4:]):
        raise UnsupportedOpError("Attention with a cache")
    flat = query.dim() == 3
    heads = node.attributes.get_int("q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", heads)
    if flat:
        query, key, value = (
            t.unflatten(-1, (n, -1)).transpose(1, 2)
            for t, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
    scale = node.attributes.get_float("scale", 1.0 / math.sqrt(query.shape[-1]))
    scores = query @ key.transpose(-1, -2) * scale
    if cap := node.attributes.get_float("softcap", 0.0):
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if node.attributes.get_int("is_causal", 0):
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    # A row that is masked whole has no softmax: the runtimes give zeros. Its gradient must not be
    # NaN either, so it never sees the softmax.
    whole = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(whole, 0.0), -1).masked_fill(whole, 0.0)
    result = weights @ value
    merged: Tensor = result.transpose(1, 2).flatten(2) if flat else result
    return merged


def _rotary(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, cos, sin = inputs[:3]
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(-1, (node.attributes.get_int("num_heads", 0), -1)).transpose(1, 2)
    if len(inputs) > 3 and inputs[3] is not None:
        cos, sin = cos[inputs[3]], sin[inputs[3]]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = node.attributes.get_int("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if node.attributes.get_int("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    result = torch.cat((turned, rest), -1)
    return result.transpose(1, 2).flatten(2) if flat else result


def _layer_norm(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, weight, bias = (*inputs, None)[:3]
    axes = _axes_from(node, x)
    shape = [x.shape[a] for a in axes]
    if any(v is not None and list(v.shape) != shape for v in (weight, bias)):
        raise UnsupportedOpError("LayerNormalization with a broadcast scale")
    return F.layer_norm(x, shape, weight, bias, node.attributes.get_float("epsilon", 1e-5))


def _rms_norm(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, weight = inputs[:2]
    mean = x.square().mean(_axes_from(node, x), keepdim=True)
    result: Tensor = x * (mean + node.attributes.get_float("epsilon", 1e-5)).rsqrt() * weight
    return result


def _axes_from(node: ir.Node, x: Tensor) -> list[int]:
    axis = node.attributes.get_int("axis", -1) % x.dim()
    return list(range(axis, x.dim()))


def _reshape(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, shape = inputs[0], _ints(inputs[1])
    if not node.attributes.get_int("allowzero", 0):
        shape = [x.shape[at] if n == 0 else n for at, n in enumerate(shape)]
    result: Tensor = x.reshape(shape)
    return result


def _split(node: ir.Node, inputs: _Inputs) -> Any:
    x, axis = inputs[0], node.attributes.get_int("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return x.split(_ints(inputs[1]), axis)
    parts = node.attributes.get_int("num_outputs", len(node.outputs))
    return x.split(-(-x.shape[axis] // parts), axis)


def _slice(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, starts, ends = inputs[0], _ints(inputs[1]), _ints(inputs[2])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise UnsupportedOpError("Slice with a negative step")
        index[axis] = slice(start, end, step)
    result: Tensor = x[tuple(index)]
    return result


def _gather(node: ir.Node, inputs: _Inputs) -> Tensor:
    x, index = inputs[0], inputs[1].long()
    axis = node.attributes.get_int("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    picked: Tensor = x.index_select(axis, index.reshape(-1))
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _reduce(function: Callable[..., Tensor]) -> _Op:
    def reduce(node: ir.Node, inputs: _Inputs) -> Tensor:
        axes = _ints(inputs[1]) if len(inputs) > 1 else list(node.attributes.get_ints("axes", ()))
        if not axes and node.attributes.get_int("noop_with_empty_axes", False):
            return inputs[0]  # type: ignore[no-any-return]
        if not axes:
            axes = list(range(inputs[0].dim()))
        return function(inputs[0], axes, keepdim=bool(node.attributes.get_int("keepdims", 1)))

    return reduce


def _squeeze(node: ir.Node, inputs: _Inputs) -> Tensor:
    axes = _ints(inputs[1]) if len(inputs) > 1 else list(node.attributes.get_ints("axes", ()))
    result: Tensor = inputs[0].squeeze(axes) if axes else inputs[0].squeeze()
    return result


def _unsqueeze(node: ir.Node, inputs: _Inputs) -> Tensor:
    axes = _ints(inputs[1]) if len(inputs) > 1 else list(node.attributes.get_ints("axes", ()))
    x, rank = inputs[0], inputs[0].dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    result: Tensor = x
    return result


def _cast(node: ir.Node, inputs: _Inputs) -> Tensor:
    to = ir.DataType(node.attributes.get_int("to", 1))
    try:
        dtype = torch.from_numpy(np.zeros(0, to.numpy())).dtype
    except TypeError as error:
        raise UnsupportedOpError(f"Cast to {to.name.lower()}") from error
    return inputs[0].to(dtype)  # type: ignore[no-any-return]


def _gemm(node: ir.Node, inputs: _Inputs) -> Tensor:
    a, b, c = (*inputs, None)[:3]
    get = node.attributes
    a = a.T if get.get_int("transA", 0) else a
    b = b.T if get.get_int("transB", 0) else b
    product: Tensor = get.get_float("alpha", 1.0) * (a @ b)
    return product if c is None else product + get.get_float("beta", 1.0) * c


def _gelu(node: ir.Node, inputs: _Inputs) -> Tensor:
    return F.gelu(inputs[0], approximate=node.attributes.get_string("approximate", "none"))


def _constant(node: ir.Node, inputs: _Inputs) -> Tensor:
    if "value" not in node.attributes:
        raise UnsupportedOpError("Constant without a tensor")
    return torch.from_numpy(np.array(node.attributes["value"].as_tensor().numpy()))


def _plain(function: Callable[..., Any]) -> _Op:
    return lambda node, inputs: function(*inputs)


def _transpose(node: ir.Node, inputs: _Inputs) -> Tensor:
    x = inputs[0]
    result: Tensor = x.permute(*node.attributes.get_ints("perm", tuple(range(x.dim()))[::-1]))
    return result


_OPS: Final[Mapping[str, _Op]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "Attention": _attention,
    "Cast": _cast,
    "Concat": lambda node, inputs: torch.cat(inputs, node.attributes.get_int("axis", 0)),
    "Constant": _constant,
    "Cos": _plain(torch.cos),
    "Div": _plain(
        lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")
    ),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _plain(lambda x, shape: x * x.new_ones(_ints(shape))),
    "Flatten": lambda node, inputs: inputs[0].reshape(
        math.prod(inputs[0].shape[: node.attributes.get_int("axis", 1)]), -1
    ),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": _plain(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, inputs: F.leaky_relu(
        inputs[0], node.attributes.get_float("alpha", 0.01)
    ),
    "MatMul": _plain(torch.matmul),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Pow": _plain(torch.pow),
    "RMSNormalization": _rms_norm,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": lambda node, inputs: torch.tensor(inputs[0].shape)[
        node.attributes.get_int("start", 0) : node.attributes.get_int("end", inputs[0].dim())
    ],
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": lambda node, inputs: torch.softmax(inputs[0], node.attributes.get_int("axis", -1)),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
