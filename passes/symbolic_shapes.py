"""Shapes with the names of the graph inputs' dimensions carried through, as far as they reach."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from qcompile.passes.matching import array_of, ints, made_by

_Dim = int | str | None
_Dims = list[_Dim]

# ONNX's own inference invents these where it knows nothing.
_INVENTED = re.compile(r"^unk__\d+$")
_UNARY: Final = frozenset(
    [
        "Identity",
        "Cast",
        "Dropout",
        "Relu",
        "Gelu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "Sqrt",
        "Exp",
        "Neg",
        "Abs",
        "Reciprocal",
        "Softmax",
        "Not",
        "IsNaN",
        "LayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
        "Clip",
        "Log",
        "Floor",
        "Sin",
        "Cos",
    ]
)
_BROADCAST: Final = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "And",
        "Or",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Min",
        "Max",
    ]
)
_MAX_VECTOR: Final = 16  # a longer vector is data, not a shape


class SymbolicShapes(ir.passes.InPlacePass):
    """Give values the most precise shape that follows from the graph.

    ONNX's shape inference loses a dimension's name where a shape is computed by ops: the output
    of ``Reshape(x, Concat(Gather(Shape(x), 0), …, -1, 32))`` becomes ``[unk__1, unk__2, …]``.
    Attention can only be recognised where batch and sequence are known to stay what they were.

    1. The contents of small integer vectors are followed through Shape, Gather, Slice, Concat,
       Unsqueeze, Squeeze, Cast, Identity, ConstantOfShape, Mul and Where(Equal), the ops by which
       exporters compute shapes, as numbers and dimension names.
    2. Reshape takes its dimensions from such a vector; -1 is solved where the rest cancels.
    3. Range and Slice from zero to a named dimension take that name. (A position table shorter
       than the sequence makes the model itself fail, so the name is right wherever it runs.)
    4. Transpose, MatMul, Gather, Unsqueeze, Expand, Where, element-wise ops, norms, means and
       Attention pass dimensions on.

    A dimension that is known already is never changed; only unknown or invented ones are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        contents: dict[ir.Value, _Dims] = {}
        modified = False
        for node in model.graph:
            if node.domain not in ("", "ai.onnx") or not node.outputs:
                continue
            vector = _vector(node, contents)
            if vector is not None and len(vector) <= _MAX_VECTOR:
                contents[node.outputs[0]] = vector
            modified |= _refine(node.outputs[0], _infer(node, contents))
        return ir.passes.PassResult(model, modified=modified)


def dims_of(value: ir.Value | None) -> _Dims | None:
    """The dimensions of `value`: numbers, names, None where nothing is known."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _refine(value: ir.Value, found: _Dims | None) -> bool:
    if found is None:
        return False
    known = dims_of(value)
    if known is not None and len(known) != len(found):
        return False  # one side is wrong, and it is not for this pass to say which
    old: _Dims = known or [None] * len(found)
    new = [b if b is not None and _vague(a) else a for a, b in zip(old, found, strict=True)]
    if known == new:
        return False
    value.shape = ir.Shape(new)
    return True


def _vague(dim: _Dim) -> bool:
    return dim is None or (isinstance(dim, str) and bool(_INVENTED.match(dim)))


def _contents(value: ir.Value | None, contents: dict[ir.Value, _Dims]) -> _Dims | None:
    if value is None:
        return None
    if value in contents:
        return contents[value]
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    shape = dims_of(value)
    if shape is None or len(shape) > 1 or (shape and shape[0] not in range(_MAX_VECTOR + 1)):
        return None
    array = array_of(value)
    return None if array is None else [int(i) for i in array.reshape(-1)]


def _vector(node: ir.Node, contents: dict[ir.Value, _Dims]) -> _Dims | None:
    """What a node that computes with shapes holds, a scalar as a vector of one."""
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Shape":
        dims = dims_of(first)
        if dims is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
        return dims[start:end]
    if node.op_type == "Concat":
        parts = [_contents(v, contents) for v in node.inputs]
        if any(p is None for p in parts):
            return None
        return list(itertools.chain.from_iterable(p for p in parts if p is not None))
    if node.op_type == "ConstantOfShape":
        length = _contents(first, contents)
        value = node.attributes.get_tensor("value", None)
        if length is None or len(length) != 1 or not isinstance(length[0], int) or value is None:
            return None
        integral = value.dtype == ir.DataType.INT64 and length[0] <= _MAX_VECTOR
        return [int(value.numpy()[0])] * length[0] if integral else None
    if node.op_type == "Reshape" and _contents(node.inputs[1], contents) == [-1]:
        return _contents(first, contents)
    if node.op_type in ("Mul", "Where"):
        return _arithmetic(node, contents)
    if node.op_type not in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Gather", "Slice"):
        return None
    data = _contents(first, contents)
    if data is None or node.op_type in ("Unsqueeze", "Squeeze", "Cast", "Identity"):
        return data
    given = [_contents(v, contents) for v in node.inputs[1:]]
    if any(g is None or not all(isinstance(i, int) for i in g) for g in given):
        return None
    numbers = [[int(i) for i in g or () if i is not None] for g in given]
    if node.op_type == "Gather":
        inside = all(-len(data) <= i < len(data) for i in numbers[0])
        return [data[i] for i in numbers[0]] if inside else None
    if len(numbers) < 2 or (len(numbers) > 3 and numbers[3] != [1]):
        return None
    return data[numbers[0][0] : numbers[1][0]]


def _arithmetic(node: ir.Node, contents: dict[ir.Value, _Dims]) -> _Dims | None:
    """Mul of numbers; ``Where(Equal(v, -1), a, v)``, which torch's older exporter emits."""
    if node.op_type == "Mul":
        a, b = (_contents(v, contents) for v in node.inputs)
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        width = max(len(a), len(b))
        pairs = zip(a * (width // len(a)), b * (width // len(b)), strict=True)
        return [x * y if isinstance(x, int) and isinstance(y, int) else None for x, y in pairs]
    equal = made_by(node.inputs[0], "Equal")
    if equal is None or equal.inputs[0] is not node.inputs[2]:
        return None
    vector, wanted = (_contents(v, contents) for v in equal.inputs)
    other = _contents(node.inputs[1], contents)
    if vector is None or other is None or wanted is None or any(w != -1 for w in wanted):
        return None
    if not len(vector) == len(other) == len(wanted):
        return None
    return [o if v == -1 else v for v, o in zip(vector, other, strict=True)]


def _infer(node: ir.Node, contents: dict[ir.Value, _Dims]) -> _Dims | None:
    op = node.op_type
    shapes = [dims_of(v) for v in node.inputs]
    if op == "Range":
        start, limit, step = (_contents(v, contents) for v in node.inputs)
        return limit if start == [0] and step == [1] else None
    if not shapes or shapes[0] is None:
        return None
    x = shapes[0]
    if op in _UNARY:
        return x
    if op in _BROADCAST or op == "Where":
        return broadcast(shapes)
    if op == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(len(x)))))
        return [x[i] for i in perm]
    if op == "Reshape":
        target = _contents(node.inputs[1], contents)
        return (
            None if target is None else _reshape(x, target, node.attributes.get_int("allowzero", 0))
        )
    if op == "Expand":
        target = _contents(node.inputs[1], contents)
        return None if target is None else broadcast([x, target])
    if op == "Unsqueeze":
        return _unsqueeze(x, ints(node, "axes", 1))
    if op == "MatMul":
        return _matmul(x, shapes[1])
    if op == "Gather" and shapes[1] is not None:
        axis = node.attributes.get_int("axis", 0) % max(len(x), 1)
        return x[:axis] + shapes[1] + x[axis + 1 :]
    if op == "Attention" and len(shapes) > 2 and shapes[2] is not None:
        return x[:-1] + shapes[2][-1:] if len(x) == 4 and len(shapes[2]) == 4 else None
    if op == "Slice":
        return _slice(node, x, contents)
    if op in ("ReduceMean", "ReduceSum", "ReduceMax"):
        axes = ints(node, "axes", 1)
        if axes is not None and node.attributes.get_int("keepdims", 1) == 1:
            return [1 if i in axes or i - len(x) in axes else d for i, d in enumerate(x)]
    return None


def broadcast(shapes: Sequence[_Dims | None]) -> _Dims | None:
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max(len(s) for s in known)
    result: _Dims = []
    for at in range(-rank, 0):
        dims = [s[at] for s in known if len(s) >= -at]
        others = {d for d in dims if d != 1}
        numbers = {d for d in others if isinstance(d, int)}
        if not others:
            result.append(1)
        elif len(numbers) == 1:
            result.extend(numbers)  # a name beside a number is that number, or one
        elif len(others) == 1:
            result.extend(others)
        else:
            result.append(None)
    return result


def _slice(node: ir.Node, x: _Dims, contents: dict[ir.Value, _Dims]) -> _Dims | None:
    given = [_contents(v, contents) for v in node.inputs[1:]]
    given += [[1]] if len(given) == 3 else []
    if len(given) != 4 or any(g is None or len(g) != 1 for g in given):
        return None
    start, end, axis, step = (g[0] for g in given if g is not None)
    if start != 0 or step != 1 or not isinstance(axis, int) or not isinstance(end, str):
        return None
    result = list(x)
    result[axis] = end if isinstance(x[axis], int) and x[axis] != 1 else None
    return result


def _unsqueeze(x: _Dims, axes: list[int] | None) -> _Dims | None:
    if axes is None:
        return None
    rank = len(x) + len(axes)
    at = {a % rank for a in axes}
    rest = iter(x)
    return [1 if i in at else next(rest) for i in range(rank)]


def _matmul(a: _Dims, b: _Dims | None) -> _Dims | None:
    if b is None or len(a) < 2 or len(b) < 2:
        return None
    batch = broadcast([a[:-2], b[:-2]]) if a[:-2] or b[:-2] else []
    return None if batch is None else [*batch, a[-2], b[-1]]


def _reshape(x: _Dims, target: _Dims, allowzero: int) -> _Dims:
    result: _Dims = list(target)
    if not allowzero:
        result = [x[i] if d == 0 and i < len(x) else d for i, d in enumerate(result)]
    if -1 not in result:
        return result
    at = result.index(-1)
    result[at] = None
    left, right = list(x), [d for i, d in enumerate(result) if i != at]
    if any(d is None for d in [*left, *right]):
        return result
    # What stands on both sides cancels, and numbers divide: -1 is known if nothing else is left.
    for dim in [d for d in right if isinstance(d, str)]:
        if dim not in left:
            return result
        left.remove(dim)
        right.remove(dim)
    names = [d for d in left if isinstance(d, str)]
    above, below = _size(left), _size(right)
    if not names and below > 0 and above % below == 0:
        result[at] = above // below
    elif len(names) == 1 and above == below:
        result[at] = names[0]
    return result


def _size(dims: _Dims) -> int:
    size = 1
    for dim in dims:
        size *= dim if isinstance(dim, int) else 1
    return size
