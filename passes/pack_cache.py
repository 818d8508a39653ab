"""A cache that holds tokens alone: padding moves behind them before they come to it."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.matching import is_scalar, made_by
from qcompile.passes.pack_tokens import negative, sort_tokens
from qcompile.passes.symbolic_shapes import dims_of

from qcompile.errors import ModelError
from qcompile.names import module_path

_LAST: Final = 5
_BIAS: Final = 10
_BOOL, _INT32, _INT64 = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64

HOSTED: Final = "cache/total_sequence_length"
"""Name of the node that runs on the CPU."""


class PackCache(ir.passes.InPlacePass):
    """`KvCache`'s ``GroupQueryAttention`` with a bias of padding -> without one, tokens first.

    ONNX Runtime's fast kernels on CUDA take no bias, but the length of each row's cache, so that a
    row of the cache is filled from its front, with tokens alone:

    - the new tokens of a row go before its padding, and results are put back (as in `PackTokens`)
    - ``seqlens_k`` = tokens in the row's cache + new places - 1. With it the kernel puts what is
      new behind what the row has, and a token sees all that comes before it, in a prompt, in a step
      and with several tokens on top of a cache. Padding comes last, where no token sees it, and
      what comes next is written over it.

    A window then counts tokens, whatever padding was between them; and which of the tokens in the
    cache were padding has to be said alike each time.

    The op reads ``total_sequence_length`` on the CPU, as int32, and shapes are int64: the Cast, of
    one number for all layers, is the one node of the graph that runs there (`HOSTED`). Summed on
    the GPU instead, ONNX Runtime 1.31.1 reads it before its own copy of it has arrived.

    Raises:
        ModelError: an output that is not made for each token, no input that is, layers that take
            another padding each, or a bias that is of more than padding (ALiBi).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if _has_bias(node)]
        if not found:
            return ir.passes.PassResult(model, modified=False)
        padding, rows = _padding(found[0]), (dims_of(found[0].inputs[0]) or [])[:2]
        if any(_adds(node) for node in found):
            raise ModelError(
                f"{module_path(found[0])} cannot have a cache on this target: its scores have "
                "biases by place (ALiBi), and the kernel takes none"
            )
        present = {value for node in found for value in node.outputs[1:]}
        for value in graph.outputs:
            if value not in present and (dims_of(value) or [])[:2] != rows:
                raise ModelError(f"padding cannot be sorted: {value.name} is not of each token")
        tokens = next((v for v in graph.inputs if v is not padding and dims_of(v) == rows), None)
        if tokens is None or any(_padding(node) is not padding for node in found):
            raise ModelError("padding cannot be sorted: layers or inputs do not share one mask")
        host, tape = ir.tape.Tape(), ir.tape.Tape()
        columns = host.op("Shape", [padding], {"start": 1, "end": 2})
        length = host.op("Cast", [columns], {"to": int(_INT32)})
        for node, value, dtype in zip(host.nodes, (columns, length), (_INT64, _INT32), strict=True):
            node.name = HOSTED if value is length else f"{HOSTED}/Shape"
            value.name, value.dtype = f"{node.name}/output", dtype
        real = tape.op("Cast", [padding], {"to": int(_BOOL)})
        known = tape.op("Cast", [real], {"to": int(_INT32)})
        minus = negative(tape, tokens)
        axis = constant(graph, "cache.axis", np.array(1))
        # Places from the end: the new tokens are the last of what the mask is of.
        newest = tape.op("CumSum", [minus, axis], {"reverse": 1})
        kept = tape.op("GatherElements", [known, newest], {"axis": 1})
        keep = tape.op("Cast", [kept], {"to": int(_BOOL)})
        axes = constant(graph, "cache.axes", np.array([1]))
        missing = tape.op("Add", [kept, minus])
        in_row, absent = (
            tape.op("ReduceSum", [x, axes], {"keepdims": 0}) for x in (known, missing)
        )
        places = tape.op("Sub", [in_row, absent])
        one = constant(graph, "cache.one", np.array(1, np.int32))
        last = tape.op("Sub", [places, one])
        for node in found:
            node.replace_input_with(_LAST, last)
            node.replace_input_with(_LAST + 1, length)
            node.replace_input_with(_BIAS, None)
            if len(node.inputs) == _BIAS + 1:
                node.resize_inputs(_LAST + 2)
        sort_tokens(graph, tape, rows, padding, keep, kept, minus)
        graph.insert_before(graph[0], list(host.nodes))
        drop_unused(model)
        return ir.passes.PassResult(model, modified=True)


def _has_bias(node: ir.Node) -> bool:
    cached = (node.domain, node.op_type) == (CONTRIB, "GroupQueryAttention")
    return cached and len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None


def _adds(attention: ir.Node) -> bool:
    """Whether scores that are not hidden gain anything."""
    expand = made_by(attention.inputs[_BIAS], "Expand")
    where = made_by(expand.inputs[0], "Where") if expand is not None else None
    assert where is not None
    return not is_scalar(where.inputs[1], 0.0)


def _padding(attention: ir.Node) -> ir.Value:
    """The mask [batch, total] that `KvCache` took the length of."""
    last = made_by(attention.inputs[_LAST], "Expand")
    shape = made_by(last.inputs[1], "Shape") if last is not None else None
    assert shape is not None and shape.inputs[0] is not None
    return shape.inputs[0]
