"""SymbolicShapes: names of dimensions survive the ops by which exporters compute shapes."""

from __future__ import annotations

from qcompile.passes.symbolic_shapes import SymbolicShapes, dims_of

from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, from_text


def _dims(text: str) -> dict[str, list[int | str | None] | None]:
    model = typed(from_text(HEADER + text))
    SymbolicShapes()(model)
    assert_idempotent(SymbolicShapes(), model)
    return {str(v.name): dims_of(v) for node in model.graph for v in node.outputs}


def test_reshape_to_computed_shape() -> None:
    found = _dims("""g (float[b,s,24] x) => (float[p,q,r,t] z)
      <int64 zero = {0}, int64 one = {1}, int64[1] at = {0}, int64[1] any = {-1},
       int64[1] size = {8}> {
      dims = Shape (x) n = Gather (dims, zero) m = Gather (dims, one)
      n1 = Unsqueeze (n, at) m1 = Unsqueeze (m, at)
      shape = Concat <axis = 0> (n1, m1, any, size)
      y = Reshape (x, shape) z = Transpose <perm = [0, 2, 1, 3]> (y) }""")
    assert found["y"] == ["b", "s", 3, 8]
    assert found["z"] == ["p", "q", "r", 8]  # declared names are not changed


def test_expand_to_where_of_equal() -> None:
    found = _dims("""g (float[b,1,1,s] x, float[b,s,8] h) => (float[p,q,r,t] y)
      <int64[1] any = {-1}, int64[1] at = {0}, int64 minus = {-1}> {
      n = Shape <start = 0, end = 1> (h) m = Shape <start = 1, end = 2> (h)
      wanted = Concat <axis = 0> (n, any, m, m) length = Shape (wanted)
      ones = ConstantOfShape <value = int64[1] {1}> (length) negative = Mul (ones, minus)
      same = Equal (wanted, negative) target = Where (same, ones, wanted)
      full = Expand (x, target) y = Identity (full) }""")
    assert found["full"] == ["b", 1, "s", "s"]


def test_what_does_not_cancel_stays_unknown() -> None:
    found = _dims("""g (float[b,s,24] x) => (float[p,q] z) <int64[2] shape = {-1, 8}> {
      y = Reshape (x, shape) z = Identity (y) }""")
    assert (found["y"] or [])[0] not in ("b", "s")


def test_different_names_do_not_broadcast_to_one() -> None:
    found = _dims("""g (float[a,8] x, float[b,8] y) => (float[p,8] z) {
      s = Add (x, y) z = Identity (s) }""")
    assert (found["s"] or [])[0] not in ("a", "b")
