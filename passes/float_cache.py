"""A cache of codes back to float, its rounding kept for keys or values alone: to measure by."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant
from qcompile.passes.matching import array_of
from qcompile.passes.observe_cache import cached_attentions

from qcompile.cache import KINDS

_FIRST_SCALE = 12
_QUANTISED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")


class FloatCache(ir.passes.InPlacePass):
    """Attention on cached codes -> on floats, which are rounded as the codes were.

    The kernel computes with what its codes stand for, so that rounding keys and values in front of
    it gives its results, in one go as token by token.

    Args:
        rounded: which of ``key`` and ``value``; the other is kept as it is.
    """

    def __init__(self, *rounded: str) -> None:
        super().__init__()
        self.rounded = rounded

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(cached_attentions(model)):
            bits = node.attributes.get_int("kv_cache_bit_width", 0)
            if not bits:
                continue
            modified = True
            for at, kind in enumerate(KINDS):
                self._restore(model.graph, node, at, kind, bits)
            for name in _QUANTISED:
                node.attributes.pop(name)
            node.resize_inputs(_FIRST_SCALE - 1)
        return ir.passes.PassResult(model, modified=modified)

    def _restore(self, graph: ir.Graph, node: ir.Node, at: int, kind: str, bits: int) -> None:
        new, past, present = node.inputs[1 + at], node.inputs[3 + at], node.outputs[1 + at]
        scale = array_of(node.inputs[_FIRST_SCALE + at])
        assert new is not None and past is not None and scale is not None
        for value in (past, present):
            assert value.shape is not None
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([*value.shape[:3], scale.shape[-1]])
        if kind not in self.rounded:
            return
        last = 2 ** (bits - 1) - 1
        name = f"{node.name}/{kind}"
        step = constant(graph, f"{name}/step", scale.reshape(-1))
        ends = [
            constant(graph, f"{name}/{end}", np.array(code, np.float32))
            for end, code in (("lowest", -last - 1), ("highest", last))
        ]
        tape = ir.tape.Tape()
        codes = tape.op("Clip", [tape.op("Round", [tape.op("Div", [new, step])]), *ends])
        node.replace_input_with(1 + at, tape.op("Mul", [codes, step]))
        graph.insert_before(node, tape.nodes)
