"""ToOpset: a graph of opset 23, stated in an older one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from qcompile.passes.to_opset import ToOpset

from qcompile.errors import ModelError
from tests.passes.rewriting import typed
from tests.support import Feed, from_text, ops, run_model

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
X = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
CASES: dict[str, tuple[int, str, dict[str, np.ndarray], list[str]]] = {
    "axes of a reduction": (
        17,
        """g (float[2,4,6] x, int64[1] a) => (float[2,4] y) {
             y = ReduceMean <keepdims=0> (x, a) }""",
        {"a": np.array([-1])},
        ["ReduceMean"],
    ),
    "equal parts": (
        17,
        """g (float[2,4,6] x) => (float[2,2,6] y, float[2,2,6] z) {
             y, z = Split <axis=1, num_outputs=2> (x) }""",
        {},
        ["Split"],
    ),
    "padding of one axis": (
        17,
        """g (float[2,4,6] x, int64[2] p, float c, int64[1] a) => (float[2,4,9] y) {
             y = Pad (x, p, c, a) }""",
        {"p": np.array([1, 2]), "c": np.array(0.5, np.float32), "a": np.array([-1])},
        ["Pad"],
    ),
    "a part of a shape": (
        14,
        "g (float[2,4,6] x) => (int64[1] y) { y = Shape <start=1, end=2> (x) }",
        {},
        ["Shape", "Slice"],
    ),
    "a Reshape that could be to nothing": (
        13,
        "g (float[2,4,6] x, int64[2] s) => (float[8,6] y) { y = Reshape <allowzero=1> (x, s) }",
        {"s": np.array([-1, 6])},
        ["Reshape"],
    ),
    "modes by their older names": (
        17,
        """g (float[2,4,6] x, float[1,3,3,2] p, int64[4] s) => (float[1,8,3,3] y) {
             i = Reshape (x, s)
             y = GridSample <mode="linear"> (i, p) }""",
        {
            "p": np.random.default_rng(1).uniform(-1, 1, (1, 3, 3, 2)).astype(np.float32),
            "s": np.array([1, 8, 2, 3]),
        },
        ["Reshape", "GridSample"],
    ),
    "what says nothing": (
        13,
        "g (float[2,4,6] x) => (float[2,4,6] y) { y = Cast <to=1, saturate=1> (x) }",
        {},
        ["Cast"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_in_an_older_opset(case: str) -> None:
    opset, text, constants, after = CASES[case]
    model = typed(from_text(HEADER + text, **constants))
    feed: Feed = {"x": X}
    wanted = run_model(model, feed)
    pass_ = ToOpset(opset)
    assert pass_(model).modified
    assert dict(model.opset_imports) == {"": opset} and ops(model) == after
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for name, array in run_model(model, feed).items():
        np.testing.assert_array_equal(array, wanted[name])
    assert not pass_(model).modified


def test_a_part_of_a_shape_in_a_body() -> None:
    text = """g (float[2,4,6] x, bool c) => (int64[1] y) {
      y = If (c) <then_branch = t () => (int64[1] a) { a = Shape <start=1, end=2> (x) },
                  else_branch = e () => (int64[1] b) { b = Shape <start=2> (x) }> }"""
    model = typed(from_text(HEADER + text))
    pass_ = ToOpset(13)
    assert pass_(model).modified
    assert [node.op_type for node in model.graph.all_nodes()].count("Slice") == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for chosen, size in ((True, 4), (False, 6)):
        assert run_model(model, {"x": X, "c": np.array(chosen)})["y"].tolist() == [size]
    assert not pass_(model).modified


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "g (float[2,4,6] x, float[4] w) => (float[2,4,6] y) {"
            " y = GroupNormalization <num_groups=2> (x, w, w) }",
            "opset 17 has no GroupNormalization",
        ),
        ("g (float[2,4,6] x) => (float[2,4,6] y) { y = Gelu (x) }", "opset 17 has no Gelu"),
        (
            "g (float[2,4,6] x, float[4,3] s) => (float[4] y) {"
            " y = ReduceMean <noop_with_empty_axes=1> (x) }",
            "a reduction of no axis",
        ),
        (
            "g (float[2,4,6] x) => (float[2,4,6] y) { y = Cast <to=1, saturate=0> (x) }",
            "opset 17 has no attribute saturate",
        ),
    ],
)
def test_what_the_opset_lacks_is_refused(text: str, message: str) -> None:
    model = from_text(HEADER + text)
    with pytest.raises(ModelError, match=message):
        ToOpset(17)(model)


def test_what_meant_something_else_is_refused() -> None:
    """Before opset 21 GroupNormalization had a scale per group."""
    text = """g (float[2,4,6] x, float[4] w) => (float[2,4,6] y) {
      y = GroupNormalization <num_groups=4> (x, w, w) }"""
    with pytest.raises(ModelError, match="opset 18 has no GroupNormalization"):
        ToOpset(18)(from_text(HEADER + text))


def test_a_reduction_of_an_empty_list_of_axes_is_refused() -> None:
    text = """g (float[2,4,6] x, int64[0] a) => (float[2,4,6] y) {
      y = ReduceMean <noop_with_empty_axes=1> (x, a) }"""
    with pytest.raises(ModelError, match="a reduction of no axis"):
        ToOpset(17)(from_text(HEADER + text, a=np.zeros(0, np.int64)))


def test_other_domains_are_no_standard() -> None:
    text = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
    text += "g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.QuickGelu (x) }"
    with pytest.raises(ModelError, match="only operators of ONNX itself"):
        ToOpset(17)(from_text(text))
