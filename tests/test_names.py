"""Module paths, from each of the places that they come from."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompile.names import (
    MODULE_PATH_KEY,
    apart,
    join_paths,
    joined_name,
    module_path,
    set_module_path,
)

SCOPES = "pkg.torch.onnx.name_scopes"


def node(name: str | None = None, **metadata: str) -> ir.Node:
    made = ir.Node("", "MatMul", [], name=name)
    made.metadata_props.update({key.replace("__", "."): value for key, value in metadata.items()})
    return made


def scoped(text: str, name: str = "node_MatMul_3") -> ir.Node:
    made = node(name)
    made.metadata_props[SCOPES] = text
    return made


def test_a_recorded_path_comes_first() -> None:
    made = scoped("['', 'model', 'model.fc1', 'linear']")
    set_module_path(made, "decoder.fc1")
    assert made.metadata_props[MODULE_PATH_KEY] == "decoder.fc1"
    assert module_path(made) == "decoder.fc1"


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ("['', 'model', 'model.layers.0.fc1', 'linear']", "model.layers.0.fc1"),
        ('["", "model", "model.fc1", "linear_1"]', "model.fc1"),
        ("['fc1', 'linear']", "fc1"),
    ],
)
def test_scopes_of_the_exporter(scopes: str, expected: str) -> None:
    assert module_path(scoped(scopes)) == expected


@pytest.mark.parametrize("scopes", ["['', 'matmul']", "['linear']", "[]", "not a list", "['a"])
def test_scopes_that_name_no_module_leave_the_nodes_name(scopes: str) -> None:
    assert module_path(scoped(scopes)) == "node_MatMul_3"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/model/layers.0/mlp/fc1/MatMul", "model.layers.0.mlp.fc1"),
        ("/model/layers.0/mlp/fc1/Gemm_1", "model.layers.0.mlp.fc1"),
        ("/encoder/fc/Add", "encoder.fc"),
        ("/fc/Softmax", "fc"),
        ("plain", "plain"),
        ("", ""),
        (None, ""),
    ],
)
def test_node_names(name: str | None, expected: str) -> None:
    assert module_path(node(name)) == expected


@pytest.mark.parametrize("name", ["/MatMul", "/MatMul_2", "/Gemm"])
def test_an_op_outside_every_module_still_has_a_name(name: str) -> None:
    assert module_path(node(name))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.b.q"], "a.b.q"),
        (["a.b.q", "a.b.q"], "a.b.q"),
        (["a.b.q", "a.b.k", "a.b.v"], "a.b.{q,k,v}"),
        (["a.x.q", "a.y.q"], "a.{x.q,y.q}"),
        (["q", "k"], "{q,k}"),
        (["a.b", "a.b.c"], "a.{b,b.c}"),
        (["a.b.c", "d.b.c"], "{a.b.c,d.b.c}"),
    ],
)
def test_joined_paths(paths: list[str], expected: str) -> None:
    assert join_paths(paths) == expected


def test_a_joined_name_stands_for_all_and_for_itself() -> None:
    assert apart(joined_name(["a.q", "a.k"])) == ["a.q + a.k", "a.q", "a.k"]
    assert "fc1 + relu" in apart("fc1 + relu"), "the source's own names may look like it"
